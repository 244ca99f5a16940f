"""A server of the S3 protocol in a process of its own, and a proxy that breaks its connections."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import boto3

KEYS = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
BUCKET = "bucket"


def options(port: int) -> dict[str, Any]:
    """``storage_options`` for a port of this machine."""
    return {"endpoint_url": f"http://127.0.0.1:{port}", **KEYS}


@contextmanager
def s3_server() -> Iterator[int]:
    """Moto's server with one empty bucket; its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.05)
        boto3.client("s3", **options(port)).create_bucket(Bucket=BUCKET)
        yield port
    finally:
        server.kill()
        server.wait()


def upload(folder: Path, prefix: str, port: int) -> str:
    """Copy a folder into the bucket; its URL."""
    client = boto3.client("s3", **options(port))
    for path in folder.rglob("*"):
        if path.is_file():
            client.put_object(Bucket=BUCKET, Key=f"{prefix}/{path.relative_to(folder)}", Body=path.read_bytes())
    return f"s3://{BUCKET}/{prefix}"


class BreakingProxy:
    """Passes bytes to a server and ends answers about ``name`` after ``limit`` bytes, the first ``times`` times.

    Attributes:
        port: Port of this machine on which it listens.
        broken: Answers that it has ended.
    """

    def __init__(self, target: int, name: str, times: int, limit: int = 2000) -> None:
        self.target, self.name, self.times, self.limit, self.broken = target, name.encode(), times, limit, 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError), client, socket.create_connection(("127.0.0.1", self.target)) as server:
            request = client.recv(2**16)
            server.sendall(request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
            breaks = self.name in request.split(b"\r\n", 1)[0] and self.broken < self.times
            self.broken += breaks
            sent = 0
            while piece := server.recv(2**16):
                if breaks and sent + len(piece) > self.limit:
                    client.sendall(piece[: self.limit - sent])
                    return
                client.sendall(piece)
                sent += len(piece)

"""A server on this machine that speaks as much of the Hugging Face Hub as huggingface_hub uses for one model."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"


class HubServer(ThreadingHTTPServer):
    """Repositories in memory: their files by commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.created: dict[str, dict[str, Any]] = {}  # bodies by the name of the repository
        self.heads: dict[str, str] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}  # large files by their sha256


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        sent = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials"}, 401)
        for pattern, method in ROUTES.items():
            command, _, expression = pattern.partition(" ")
            found = re.fullmatch(expression, path)
            if found and self.command in command.split("|"):
                return method(self, body, *found.groups())
        return self.answer({"error": "not found"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = route

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name'].rpartition('/')[2]}"
        self.server.created[name] = asked
        self.answer({"url": f"{self.server.endpoint}/{name}", "name": name, "id": name})

    def preupload(self, body: bytes, _: str, __: str) -> None:
        files = [file["path"] for file in json.loads(body)["files"]]
        modes = [{"path": path, "uploadMode": "lfs" if path.endswith(".safetensors") else "regular"} for path in files]
        self.answer({"files": [{**mode, "shouldIgnore": False} for mode in modes]})

    def batch(self, body: bytes, _: str) -> None:
        objects = json.loads(body)["objects"]
        upload = [{"upload": {"href": f"{self.server.endpoint}/lfs/{each['oid']}"}} for each in objects]
        described = [{**each, "actions": action} for each, action in zip(objects, upload, strict=True)]
        self.answer({"transfer": "basic", "objects": described})

    def put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self.answer(b"")

    def commit(self, body: bytes, repo: str, _: str) -> None:
        files: dict[str, bytes] = dict(self.server.commits.get(self.server.heads.get(repo, ""), {}))
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        sha = hashlib.sha1(body).hexdigest()
        self.server.commits[sha], self.server.heads[repo] = files, sha
        address = f"{self.server.endpoint}/{repo}/commit/{sha}"
        self.answer({"success": True, "commitUrl": address, "commitOid": sha})

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        sha = self.server.heads.get(repo) if revision == "main" else revision
        if sha not in self.server.commits:
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return None
        return sha, self.server.commits[sha]

    def info(self, _: bytes, repo: str, revision: str) -> None:
        found = self.files(repo, revision)
        if found is not None:
            self.answer({"id": repo, "sha": found[0], "siblings": [{"rfilename": name} for name in found[1]]})

    def tree(self, _: bytes, repo: str, revision: str) -> None:
        found = self.files(repo, revision)
        if found is not None:
            files = found[1].items()
            self.answer([{"type": "file", "path": name, "size": len(data), "oid": etag(data)} for name, data in files])

    def resolve(self, _: bytes, repo: str, revision: str, name: str) -> None:
        found = self.files(repo, revision)
        if found is None:
            return
        sha, files = found
        if name not in files:
            self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        self.answer(files[name], headers={"ETag": f'"{etag(files[name])}"', "X-Repo-Commit": sha})

    def fine(self, _: bytes) -> None:
        self.answer({"errors": [], "warnings": []})


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


ROUTES: dict[str, Callable[..., None]] = {
    "HEAD|GET /": Handler.fine,
    "POST /api/validate-yaml": Handler.fine,
    "POST /api/repos/create": Handler.create,
    "POST /api/models/(.+?)/preupload/(.+)": Handler.preupload,
    "POST /(.+)[.]git/info/lfs/objects/batch": Handler.batch,
    "PUT /lfs/(.+)": Handler.put,
    "POST /api/models/(.+?)/commit/(.+)": Handler.commit,
    "GET /api/models/(.+?)/revision/(.+)": Handler.info,
    "GET /api/models/(.+?)/tree/(.+)": Handler.tree,
    "HEAD|GET /(.+?)/resolve/(.+?)/(.+)": Handler.resolve,
}


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A server that runs until the context ends."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

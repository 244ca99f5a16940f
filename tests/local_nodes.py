"""Nodes with addresses and host names of their own on this machine, and a SLURM of two of them."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "munged", "ip", "unshare")
NAMES = ("simonode1", "simonode2")
CONFIG = """
ClusterName=simo
SlurmctldHost={host}({controller})
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
MinJobAge=3600
KillWait=30
NodeName={names[0]} NodeAddr={addresses[0]} CPUs=2 State=UNKNOWN
NodeName={names[1]} NodeAddr={addresses[1]} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Bridge:
    """Two network namespaces with addresses of their own on one bridge.

    Args:
        folder: For the ``/etc/hosts`` of each.
        names: Their host names.
        hosts: Text of ``/etc/hosts`` for each.
        network: First three numbers of the addresses; this machine has .254.
    """

    def __init__(self, folder: Path, names: tuple[str, ...], hosts: tuple[str, ...], network: str) -> None:
        self.folder, self.names, self.network = folder, names, network
        self.bridge = f"simobr{os.getpid() % 10**6}"
        self.addresses = [f"{network}.{number + 1}" for number in range(len(names))]
        for name, text in zip(names, hosts, strict=True):
            (folder / f"hosts_{name}").write_text(text)

    def start(self) -> None:
        """Raises CalledProcessError where it is not allowed."""
        self._ip("link", "add", self.bridge, "type", "bridge")
        self._ip("addr", "add", f"{self.network}.254/24", "dev", self.bridge)
        self._ip("link", "set", self.bridge, "up")
        for number, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            outside = f"sv{os.getpid() % 10**6}n{number}"
            self._ip("netns", "add", name)
            self._ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", name)
            self._ip("link", "set", outside, "master", self.bridge, "up")
            self._ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            self._ip("-n", name, "link", "set", "eth0", "up")
            self._ip("-n", name, "link", "set", "lo", "up")

    def in_node(self, number: int, *command: str | Path) -> list[str]:
        """A command with a node's network, host name and ``/etc/hosts``; ``ip netns exec`` would hide the cgroups."""
        name = self.names[number]
        inside = f'mount --bind {self.folder / f"hosts_{name}"} /etc/hosts; hostname {name}; exec "$@"'
        start = ["nsenter", f"--net=/run/netns/{name}", "unshare", "--uts", "--mount", "sh", "-c", inside, "node"]
        return [*start, *map(str, command)]

    def stop(self) -> None:
        for name in self.names:
            self._ip("netns", "del", name, check=False)
        self._ip("link", "del", self.bridge, check=False)

    @staticmethod
    def _ip(*words: str, check: bool = True) -> None:
        subprocess.run(["ip", *words], check=check, capture_output=True)


class SlurmOfTwoNodes:
    """Started and stopped by ``with``; ``environment`` lets SLURM's commands find it."""

    def __init__(self, folder: Path) -> None:
        missing = [name for name in PROGRAMS if shutil.which(name) is None]
        if os.geteuid() != 0 or missing:
            pytest.skip(f"a SLURM of two nodes needs root and slurm-wlm, munge, iproute2; missing: {missing}")
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        names = "".join(f"10.99.84.{number + 1} {name}\n" for number, name in enumerate(NAMES))
        hosts = f"127.0.0.1 localhost\n{names}10.99.84.254 {socket.gethostname()}\n"
        self.bridge = Bridge(folder, NAMES, (hosts, hosts), "10.99.84")
        self.started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "SlurmOfTwoNodes":
        for name in ("state", *NAMES):
            (self.folder / name).mkdir()
        text = CONFIG.format(
            host=socket.gethostname(), controller="10.99.84.254", folder=self.folder, names=NAMES,
            addresses=self.bridge.addresses,
        )  # fmt: skip
        (self.folder / "slurm.conf").write_text(text)
        try:
            self.bridge.start()
        except subprocess.CalledProcessError as error:
            self.bridge.stop()
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
        if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode:
            for path in ("/run/munge", "/var/log/munge", "/var/lib/munge"):
                Path(path).mkdir(exist_ok=True)
                shutil.chown(path, "munge", "munge")
            subprocess.run(["runuser", "-u", "munge", "--", shutil.which("munged") or "munged"], check=True)
        self._start("slurmctld", "-D")
        for number in range(2):
            self._start(*self.bridge.in_node(number, "slurmd", "-D", "-N", NAMES[number]))
        for _ in range(30):
            shown = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True, env=self.environment)
            if shown.stdout.split() == ["idle"]:
                return self
            time.sleep(1)
        logs = "\n".join(path.read_text()[-1000:] for path in self.folder.glob("*.log"))
        self.__exit__()
        raise AssertionError(f"the nodes did not become idle: {shown.stdout} {shown.stderr}\n{logs}")

    def _start(self, *command: str) -> None:
        quiet = subprocess.DEVNULL
        self.started.append(subprocess.Popen(command, env=self.environment, stdout=quiet, stderr=quiet))

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.started):
            process.terminate()
            process.wait(timeout=30)
        self.bridge.stop()

"""Two hosts on one machine: network namespaces joined by a veth pair, each with a hostname, the second with an sshd.

They share the file system: every one starts in a folder of its own, and what it must not need can be hidden from it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import uuid
from pathlib import Path
from typing import Iterator, Sequence

from tests.multinode.harness import MARK, Machine

INTERFACE = "um0"
ADDRESSES = ("10.213.7.1", "10.213.7.2")
NAMES = ("alpha", "beta")
PORT = 29500


def why_not(needs_ssh: bool = False) -> str | None:
    """Why there can be no hosts here; None: there can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "needs root, for network namespaces"
    missing = [name for name in ("ip", "unshare", *(("sshd", "ssh", "ssh-keygen") if needs_ssh else ())) if _which(name) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    probe = f"umt{uuid.uuid4().hex[:6]}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"cannot make network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Hosts:
    """Two hosts, from `two_hosts`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.namespaces = [f"um{self.mark[:6]}{index}" for index in range(2)]
        self.machines: list[Machine] = []
        self.sshd: subprocess.Popen | None = None

    def build(self) -> None:
        for namespace in self.namespaces:
            _run("ip", "netns", "add", namespace)
        first, second = (f"v{namespace}" for namespace in self.namespaces)
        _run("ip", "link", "add", first, "type", "veth", "peer", "name", second)
        for namespace, end, address in zip(self.namespaces, (first, second), ADDRESSES):
            _run("ip", "link", "set", end, "netns", namespace, "name", INTERFACE)
            _run("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", INTERFACE)
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
        self.connect()

    def remove(self) -> None:
        for machine in [*self.machines, self.on_second()]:
            machine.kill()
        if self.sshd is not None:
            self.sshd.kill()
            self.sshd.wait()
        for namespace in self.namespaces:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)

    def cut(self) -> None:
        """Unplug the second host."""
        _run("ip", "-n", self.namespaces[1], "link", "set", INTERFACE, "down")

    def connect(self) -> None:
        for namespace in self.namespaces:
            _run("ip", "-n", namespace, "link", "set", INTERFACE, "up")

    def prefix(self, index: int, hidden: Path | None = None) -> list[str]:
        """Before a command, to run it on a host, to which the folder `hidden` is empty."""
        # `ip netns exec` gives it mounts of its own as well.
        in_namespace = ["ip", "netns", "exec", self.namespaces[index], "unshare", "--uts"]
        hide = f"mount -t tmpfs none '{hidden}'; " if hidden is not None else ""
        return [*in_namespace, "sh", "-c", f'hostname {NAMES[index]}; {hide}exec "$@"', "sh"]

    def start(self, index: int, command: Sequence[str], environment: dict[str, str], folder: Path | None = None) -> Machine:
        """`python *command` on a host, in FOLDER/<its name>."""
        place = (folder or self.folder) / NAMES[index]
        machine = Machine(place, command, environment, self.prefix(index), f"{self.mark}{index}")
        self.machines.append(machine)
        return machine

    def start_everywhere(self, command: Sequence[str], environment: dict[str, str] | None = None) -> list[Machine]:
        """Way (b): the same command on both."""
        common = {"NNODES": "2", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(PORT), **(environment or {})}
        return [self.start(index, command, {**common, "NODE_RANK": str(index)}) for index in range(2)]

    def start_by_ssh(self, command: Sequence[str], environment: dict[str, str] | None = None) -> Machine:
        """Way (a): the command on the first alone, with the variables of the reference's job."""
        assert self.sshd is not None
        hosts = {f"MLP_WORKER_{index}_HOST": address for index, address in enumerate(ADDRESSES)}
        common = {"MLP_ROLE_INDEX": "0", "MLP_WORKER_NUM": "2", "MLP_WORKER_0_PORT": str(PORT), **hosts}
        return self.start(0, command, {**common, **(environment or {})})

    def on_second(self) -> Machine:
        """What runs on the second host without having been started there: to be asked for its processes."""
        machine = Machine.__new__(Machine)
        machine.folder, machine.mark, machine.process = self.folder / NAMES[1], f"{self.mark}1", None
        return machine

    # -- ssh

    def start_sshd(self, hidden: Path | None = None) -> list[str]:
        """An sshd on the second host; returns the settings with which a job gets there. hidden: a folder that is empty there."""
        keys = self.folder / "ssh"
        keys.mkdir(parents=True)
        for name in ("host", "user"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name))
        Path("/run/sshd").mkdir(parents=True, exist_ok=True)
        config = keys / "sshd_config"
        config.write_text(
            f"ListenAddress {ADDRESSES[1]}:2222\nHostKey {keys / 'host'}\nPidFile none\nAuthorizedKeysFile {keys / 'user.pub'}\n"
            "StrictModes no\nUsePAM no\nPermitRootLogin yes\nPasswordAuthentication no\nLogLevel ERROR\n"
            # What it starts is known by it; and it must not be slowed down by the threads of a login shell's defaults.
            f"SetEnv {MARK}={self.mark}1 OMP_NUM_THREADS=1\n"
        )
        with open(keys / "log", "w") as log:
            sshd = [*self.prefix(1, hidden), str(_which("sshd")), "-D", "-e", "-f", str(config)]
            self.sshd = subprocess.Popen(sshd, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "ConnectTimeout=5"]
        options = [f"IdentityFile={keys / 'user'}", *options]
        return ["system.ssh_port=2222", "system.ssh_user=root", f"system.ssh_options=[{','.join(options)}]"]


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Built, and removed with all that runs on them."""
    hosts = Hosts(folder)
    try:
        hosts.build()
        yield hosts
    finally:
        hosts.remove()

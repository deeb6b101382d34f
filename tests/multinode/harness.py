"""Machines of a job: processes on loopback, each with a working directory of its own, or in network namespaces (hosts.py).

What a machine and its children are is told by a variable in their environment, so that none can be left behind unseen.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import uuid
from pathlib import Path
from typing import Callable, Sequence

from tests.distributed.harness import ROOT, clean_environment

MARK = "UNMASK_TEST_MACHINE"
LAUNCHER_TIMEOUT_SECONDS = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment_of(pid: int) -> dict[str, str]:
    """Of a process; {} where it has ended, or is ending."""
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in content.decode(errors="replace").split("\0") if "=" in entry)


class Machine:
    """The launcher of one machine, its output and all processes that came from it."""

    def __init__(
        self, folder: Path, command: Sequence[str], environment: dict[str, str], prefix: Sequence[str] = (), mark: str | None = None
    ) -> None:
        """prefix: before the command, to be somewhere else; mark: of a job that is on several machines."""
        self.folder, self.mark = folder, mark or uuid.uuid4().hex
        self.process: subprocess.Popen | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, *command],
                cwd=folder,
                env={**clean_environment(), **environment, MARK: self.mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def lines(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.strip()]

    def processes(self) -> list[int]:
        """Every living one that came from the launcher, itself included."""
        found = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return [pid for pid in found if environment_of(pid).get(MARK) == self.mark]

    def ranks(self) -> dict[int, int]:
        """RANK -> process id, of those that are no children of ranks."""
        found = {}
        for pid in sorted(self.processes()):
            environment = environment_of(pid)
            if "UNMASK_ERROR_FILE" in environment and os.getpgid(pid) == pid:
                found[int(environment["RANK"])] = pid
        return found

    def wait(self, timeout_seconds: float = LAUNCHER_TIMEOUT_SECONDS) -> int:
        try:
            return self.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.folder.name} has not ended within {timeout_seconds} s:\n{self.output}") from None

    def wait_for(self, condition: Callable[[], bool] | str, timeout_seconds: float = 60.0) -> None:
        """Until the output has a text, or a condition holds."""
        deadline = time.monotonic() + timeout_seconds
        while not (condition in self.output if isinstance(condition, str) else condition()):
            assert time.monotonic() < deadline, f"{self.folder.name}: waited {timeout_seconds} s for {condition}:\n{self.output}"
            assert self.process.poll() is None, f"{self.folder.name} has ended before {condition}:\n{self.output}"
            time.sleep(0.02)

    def assert_nothing_is_left(self, timeout_seconds: float = 15.0) -> None:
        deadline = time.monotonic() + timeout_seconds
        while left := self.processes():
            commands = [Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ") for pid in left if environment_of(pid)]
            assert time.monotonic() < deadline, f"{self.folder.name} has left behind: {commands}"
            time.sleep(0.05)

    def kill(self) -> None:
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if self.process is not None:
            self.process.wait()


def on_loopback(
    folder: Path, command: Sequence[str], number: int = 2, environment: Sequence[dict[str, str | None]] | None = None
) -> list[Machine]:
    """The same command as several machines of this host, each in FOLDER/machine_<i>: way (b), by the generic variables.
    environment: of each, before those; None: without that one."""
    port = free_port()
    machines = []
    for index in range(number):
        place = {"NODE_RANK": str(index), "NNODES": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        own = environment[index] if environment is not None else {}
        variables = {name: value for name, value in {**place, **own}.items() if value is not None}
        machines.append(Machine(folder / f"machine_{index}", command, variables))
    return machines


def small_job(folder: Path, body: str) -> str:
    """A job of a second: a script that is launched as rl.py is, whose ranks run `body` (rank, folder, mark, wait_for are known)."""
    script = folder / "job.py"
    start = '\n\nif __name__ == "__main__":\n    run_on_all_machines("rl", main)\n'
    script.write_text(SMALL_JOB.format(root=str(ROOT), folder=str(folder)) + textwrap.indent(body, "    ") + start)
    return str(script)


SMALL_JOB = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from common.errors import UserError, entry_point
from common.launch import launch, needs_launch
from common.nodes_start import run_on_all_machines
from configs.load import load_config

folder = Path({folder!r})
rank = int(os.environ.get("RANK", "-1"))
def mark(name): (folder / f"{{name}}_{{rank}}").write_text(str(os.getpid()))
def wait_for(name, ranks=(0, 1)):
    while not all((folder / f"{{name}}_{{r}}").exists() for r in ranks): time.sleep(0.01)

@entry_point
def main(argv, link=None):
    config = load_config("rl", argv)
    if needs_launch(config, link):
        launch("rl", config, sys.argv[0], argv, link)
    body(argv)

def body(argv):
"""
SMALL_SETTINGS = [
    "config=configs/rl_tiny.yaml",
    "model.pretrained_model=tiny-random",
    "model.prepare_config=null",
    "experiment.num_node=2",
    "experiment.num_processes=1",
    "experiment.project=run",
    "system.silence_timeout_seconds=2",
]

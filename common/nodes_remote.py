"""The launchers of the other machines, started from machine 0 over ssh by DeepSpeed's multi-node runner.

What is run there is `deepspeed.launcher.launch`, as DeepSpeed's PDSHRunner writes it down, told of one process per machine: our own
launcher, which starts the ranks. pdsh, where it is installed, reaches all machines with one command; plain ssh is the same command,
once per machine. Output of the others comes to machine 0's terminal, what they say before the start only if that is their end.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Sequence

from common.errors import UserError
from common.launch import die_with_parent
from common.nodes import STARTED_BY_MACHINE_0, Place

if TYPE_CHECKING:
    from configs.schema import System

EXPORTED = ("PYTHONPATH", "LD_LIBRARY_PATH")
"""What our launcher needs on another machine before it has heard of machine 0."""
CLOSE_SECONDS = 10.0
"""How long ssh may take to end once all machines have said that they are through."""


def choose(launcher: str) -> str:
    """`system.launcher` where the variables name the machines' addresses; auto: pdsh, if it is installed, else ssh."""
    if launcher != "auto":
        return launcher
    return "pdsh" if shutil.which("pdsh") else "ssh"


class Remote:
    """The commands that run on the other machines, as processes here."""

    def __init__(self, place: Place, system: System, script: str, argv: Sequence[str]) -> None:
        """Starts them. Raises UserError where pdsh or ssh is not installed."""
        kind = choose(system.launcher)
        if shutil.which(kind) is None or shutil.which("ssh") is None:
            raise UserError(f"system.launcher: {kind} is not installed here: install it, or start the command on every machine")
        self.hosts = place.hosts
        self.of: list[list[int]] = []  # which machines a process is for
        self.processes: list[subprocess.Popen] = []
        self.held: list[list[bytes]] = []  # lines that are not on the terminal yet
        self._partial: list[bytes] = []
        self.released = False
        parent = os.getpid()
        for machines, command, environment in remote_commands(kind, place, system, script, argv):
            process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C goes to the other launchers over their link
                preexec_fn=lambda: die_with_parent(parent),
            )
            assert process.stdout is not None
            os.set_blocking(process.stdout.fileno(), False)
            self.of.append(machines)
            self.processes.append(process)
            self.held.append([])
            self._partial.append(b"")

    def absent(self) -> dict[int, str]:
        """Machines that will not report, by what ssh or they themselves said last. To be asked before the start."""
        self._read()
        gone = {}
        for machines, process, lines in zip(self.of, self.processes, self.held):
            for machine in machines:
                own = [line for line in lines if len(machines) == 1 or line.startswith(self.hosts[machine].encode() + b":")]
                # pdsh goes on while another machine's ssh does.
                end = f"{self.hosts[machine]}: ssh exited with exit code".encode()
                if process.poll() is not None or any(end in line for line in lines):
                    gone[machine] = self._why(machine, own, process.returncode)
        return gone

    def _why(self, machine: int, lines: list[bytes], code: int | None) -> str:
        host = self.hosts[machine]
        texts = [line.decode(errors="replace").strip().removeprefix(f"{host}:").strip() for line in lines]
        said = [text for text in texts if text and "exited with exit code" not in text and not text.startswith("[")]
        return f"cannot be started: {said[-1]}" if said else f"cannot be started: ssh ended with exit code {code}, without a word"

    def forward(self) -> None:
        """To be called again and again: put on the terminal what the others have written."""
        if not self.released:  # the start has come: what they said until then was of no consequence
            self.released = True
            for lines in self.held:
                lines.clear()
        self._read()
        for lines in self.held:
            for line in lines:
                sys.stderr.buffer.write(line + b"\n")
            if lines:
                sys.stderr.flush()
            lines.clear()

    def _read(self) -> None:
        for index, process in enumerate(self.processes):
            with contextlib.suppress(BlockingIOError, ValueError):
                while data := os.read(process.stdout.fileno(), 1 << 16):
                    *lines, self._partial[index] = (self._partial[index] + data).split(b"\n")
                    self.held[index] += lines

    def close(self) -> None:
        """Wait for them, but not long, and end what is left: the launchers over there end by themselves when their link does."""
        deadline = time.monotonic() + CLOSE_SECONDS
        while any(process.poll() is None for process in self.processes) and time.monotonic() < deadline:
            self._read()
            if self.released:
                self.forward()
            time.sleep(0.05)
        if self.released:
            self.forward()
        for process in self.processes:
            for pid in [process.pid, *_children(process.pid)]:  # each ssh of pdsh is a session of its own
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()


def _children(parent: int) -> list[int]:
    """Process ids of the living children (Linux; elsewhere none)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
    return found


def remote_commands(
    kind: str, place: Place, system: System, script: str, argv: Sequence[str]
) -> list[tuple[list[int], list[str], dict[str, str]]]:
    """(machines, command, environment variables for it) of every process to be started here. Imports DeepSpeed."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # this process has no use for a GPU, nor for a warning that there is none
    from deepspeed.launcher.multinode_runner import PDSHRunner
    from deepspeed.launcher.runner import encode_world_info, parse_args

    others = list(range(1, place.number))
    # Of two values of an option ssh takes the first.
    named = [*system.ssh_options, "BatchMode=yes", "ServerAliveInterval=10", "ServerAliveCountMax=3"]
    options = [word for option in named for word in ("-o", option)]
    hosts = {place.hosts[i]: [0] for i in others}  # device 0: DeepSpeed starts one process per device
    if len(hosts) != len(others):
        raise UserError(f"MLP_WORKER_<i>_HOST: got {', '.join(place.hosts)}: every machine needs an address of its own")
    arguments = ["--launcher", "pdsh", "--no_local_rank", "--master_addr", place.address, "--master_port", str(place.port)]
    if system.ssh_port is not None:
        arguments += ["--ssh_port", str(system.ssh_port)]
    if system.ssh_user is not None:
        arguments += [f"--launcher_args=-l {system.ssh_user}"]
    runner = PDSHRunner(parse_args([*arguments, str(Path(script).resolve()), *argv]), encode_world_info(hosts))
    # The remote shell reads what follows; pdsh reads % before it.
    runner.user_script = f"--log_level=critical {shlex.quote(str(Path(script).resolve()))}"
    runner.user_arguments = [shlex.quote(argument).replace("%", "%%") for argument in argv]
    runner.exports = {name: shlex.quote(os.environ[name]) for name in EXPORTED if name in os.environ}
    runner.exports[STARTED_BY_MACHINE_0] = f"{place.address}:{place.port}"
    environment = dict(os.environ)
    environment["PDSH_SSH_ARGS_APPEND"] = " ".join([environment.get("PDSH_SSH_ARGS_APPEND", ""), *options])
    command, _, environment = runner.get_cmd(environment, hosts)
    if kind == "pdsh":
        return [(others, command, environment)]
    words = command[command.index(_first_word(command)) :]
    commands: list[tuple[list[int], list[str], dict[str, Any]]] = []
    for place_in_list, machine in enumerate(others):
        remote = " ".join(words).replace("--node_rank=%n", f"--node_rank={place_in_list}").replace("%%", "%")
        target = ["-p", str(system.ssh_port)] if system.ssh_port is not None else []
        target += ["-l", system.ssh_user] if system.ssh_user is not None else []
        commands.append(([machine], ["ssh", "-n", *options, *target, place.hosts[machine], remote], {}))
    return commands


def _first_word(command: list[str]) -> str:
    """Where pdsh's own words end and those for the remote shell begin: with the exports."""
    return next(word for word in command if word.startswith("export "))

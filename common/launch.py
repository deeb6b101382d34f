"""One process per device: count the devices, start the processes, and end them together.

The parent neither imports torch nor does any work of its own, so a job starts as fast as its ranks do. It speaks the same
environment variables as torch's and accelerate's launchers (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, ...): a job that those
have started finds itself launched already. What is ours is how it ends: the first rank that fails ends the others and is named
with its cause; a user's mistake is one line and exit code 2, however many ranks made it; Ctrl-C is passed on once and waited
for; and no rank outlives the parent, not even one that was killed. On several machines there is one such parent on each, and
what ends one ends all (common/nodes_link.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Sequence

from common.deepspeed_files import read_deepspeed_file
from common.errors import ERROR_FILE, INTERRUPTED, INTERRUPTED_CODE, UserError, warn_once
from common.nodes_link import HURRY, INTERRUPT, KILL, STOP, TERMINATE, Failure, Link

if TYPE_CHECKING:
    from configs.schema import Config

GRACE_SECONDS = 10.0
"""From the end of the first rank that failed to SIGKILL for those that have not ended."""
INTERRUPT_GRACE_SECONDS = 60.0
"""After Ctrl-C, from the end of the first rank to SIGTERM for the others (they may be writing a checkpoint)."""
POLL_SECONDS = 0.05
SAME_SIGNAL_SECONDS = 2.0
"""Slurm and Kubernetes send a signal to every machine: what came here is not a second one where another machine just told of it."""
_LAUNCHERS_VARIABLES = ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")
"""Every process of torchrun's and of ours has the first, every one of accelerate's the second, that of one process too."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def already_launched() -> bool:
    """Whether this process is one that a launcher (ours, torchrun, accelerate launch) has started, or one of several that find each
    other in another way. RANK=0 and WORLD_SIZE=1 alone are no launcher's: job operators give them to the container of a machine."""
    return any(name in os.environ for name in _LAUNCHERS_VARIABLES) or world_size() > 1


def world_size() -> int:
    """Processes of the job, as whoever started this one says it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def local_world_size() -> int:
    """Those of them on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def writes_the_run(link: Link | None = None) -> bool:
    """Whether this process, or one of those that it starts, is the first of the job, which alone writes the run directory."""
    return os.environ.get("RANK", "0") == "0" and (link is None or link.place.index == 0)


def visible_gpus() -> int:
    """NVIDIA GPUs that this process may use, counted without importing torch; 0 with a CPU build of torch."""
    try:
        if importlib.metadata.version("torch").endswith("+cpu"):
            return 0
    except importlib.metadata.PackageNotFoundError:
        pass
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None and allowed.split(",")[0].strip() in ("", "-1"):
        return 0
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
        present = sum(line.startswith("GPU ") for line in listing.splitlines())
    except (OSError, subprocess.SubprocessError):
        present = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if allowed is None:
        return present
    # CUDA reads the list up to the first id that is not one.
    return min(present, allowed.split(",").index("-1") if "-1" in allowed.split(",") else len(allowed.split(",")))


def processes_on_this_machine(config: Config) -> int:
    """`experiment.num_processes`, or all visible GPUs (no more than the DeepSpeed file names), or 1 where there are none."""
    visible, asked = visible_gpus(), config.experiment.num_processes
    if asked is not None:
        if asked < 1:
            raise UserError(f"experiment.num_processes: got {asked}, must be at least 1 (or null: one per GPU)")
        if 0 < visible < asked:
            raise UserError(
                f"experiment.num_processes: {asked} processes asked for, but {visible} GPUs are visible: set {visible} or less"
            )
        return asked
    if config.experiment.deepspeed_file is None:
        return max(1, visible)
    file = read_deepspeed_file(config.experiment.deepspeed_file)
    named = file.num_processes // file.num_machines if file.num_processes else visible
    if named < visible:
        warn_once(
            f"{named} of {visible} GPUs are used: experiment.deepspeed_file={config.experiment.deepspeed_file} names {named}: name "
            f"a file of {visible}, or set experiment.num_processes={visible}"
        )
    return max(1, min(named, visible))


def needs_launch(config: Config, link: Link | None = None) -> int | None:
    """How many processes this job still has to be started as on this machine; None: it runs here, in this process.

    link: to the other machines (common/nodes_start.py); None: there are none. Raises UserError where the config asks for others.
    """
    if already_launched():
        return None
    machines = config.experiment.num_node
    if link is None and machines > 1:
        raise UserError(
            f"experiment.num_node: got {machines}, but this command is for one machine: start multinode_rl.py or "
            "multinode_eval.py (docs/multinode.md), or set it to 1"
        )
    if link is not None and machines != link.place.number:
        raise UserError(
            f"experiment.num_node: got {machines}, but there are {link.place.number} machines, say {link.place.source}: "
            f"set it to {link.place.number}"
        )
    number = processes_on_this_machine(config)
    return number if number > 1 or link is not None else None


def launch(job: str, config: Config, script: str, argv: Sequence[str], link: Link | None = None) -> NoReturn:
    """Run `python script *argv` in as many processes as `needs_launch` says, and leave with their exit code. job: rl, eval, sft."""
    number = needs_launch(config, link)
    assert number is not None, "asked to launch a job that runs in this process"
    command = [sys.executable, script, *argv]
    if link is not None:
        from common.nodes_start import agree  # imports this module

        agree(link, job, config, number)
        command.append(f"experiment.node_index={link.place.index}")
    sys.exit(run_ranks(command, number, link))


def run_ranks(command: Sequence[str], num_processes: int, link: Link | None = None) -> int:
    """Run `command` as `num_processes` ranks, each with the same arguments, until all have ended or one has failed.

    link: started, to the other machines, which run as many. Returns the exit code: that of the rank that failed first (128 + signal
    where it was killed), or 0. Must be called from the main thread, before any other is started.
    """
    with tempfile.TemporaryDirectory(prefix="unmask-launch-") as folder:
        return _Ranks(list(command), num_processes, Path(folder), link).run()


def die_with_parent(parent: int) -> None:
    """Called in a child, given its parent's id: be killed when the parent ends, however it ends (Linux; elsewhere nothing)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call above
        os.kill(os.getpid(), signal.SIGKILL)


def free_port(address: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on; address: of this machine, "" for all that it has."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


class _Ranks:
    """The processes of one machine, from their start to the end of the last, here and on the other machines."""

    def __init__(self, command: list[str], num_processes: int, folder: Path, link: Link | None = None) -> None:
        self.command, self.num_processes, self.folder, self.link = command, num_processes, folder, link
        self.processes: list[subprocess.Popen] = []
        self.signals: list[int] = []  # received and not yet acted on
        self.interrupted = False
        self.told_at = float("-inf")  # when another machine told of a signal
        self.stopping = False  # another machine has failed
        self.failed: list[int] = []  # the ranks that were the first to be seen to fail
        self.failed_at = 0.0
        self.sent: set[tuple[int, int]] = set()  # (rank, signal) of what ran and got it from here, to be ended
        self.next_blow: float | None = None  # when those that still run are to be ended, and ...
        self.blow = signal.SIGTERM  # ... how

    def run(self) -> int:
        handlers = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        code, line = 1, None
        try:
            self._start()
            while self._running() or not self._others_are_through():
                time.sleep(POLL_SECONDS) if self.link is None else self.link.wait(POLL_SECONDS)
                for _ in range(len(self.signals)):
                    self._signal(self.signals.pop(0))
                for order in self.link.tick() if self.link is not None else []:
                    self._obey(order)
                self._watch()
        finally:
            for rank in range(len(self.processes)):
                self._kill(rank, signal.SIGKILL)  # its whole group: what it has started itself goes as well
            for process in self.processes:
                process.wait()
            code, line = self._end()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if line is not None:
            print(line, file=sys.stderr, flush=True)
        return code

    def _note(self, number: int, frame: object) -> None:
        self.signals.append(number)

    def _start(self) -> None:
        go = self.link.go if self.link is not None else None
        assert (go is None) == (self.link is None), "the link has not been started"
        machine, machines = (self.link.place.index, self.link.place.number) if self.link is not None else (0, 1)
        common = {
            "WORLD_SIZE": str(self.num_processes * machines),
            "LOCAL_WORLD_SIZE": str(self.num_processes),
            "MASTER_ADDR": go.address if go is not None else "127.0.0.1",
            "MASTER_PORT": str(go.port if go is not None else free_port()),
            # Left alone, every rank starts as many threads as there are cores, and they get in each other's way.
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        parent = os.getpid()
        for local_rank in range(self.num_processes):
            rank = self._global(local_rank)
            own = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), ERROR_FILE: str(self._cause_file(local_rank))}
            if self.link is not None:
                own["GROUP_RANK"] = str(machine)
            process = subprocess.Popen(
                self.command,
                env={**os.environ, **common, **own},
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # the terminal's Ctrl-C comes to us alone; a rank and its children are one group
                preexec_fn=lambda: die_with_parent(parent),
            )
            self.processes.append(process)

    def _global(self, rank: int) -> int:
        """Of all machines' ranks which one a rank of this machine is."""
        return rank if self.link is None else self.link.place.index * self.num_processes + rank

    def _running(self) -> list[int]:
        return [rank for rank, process in enumerate(self.processes) if process.poll() is None]

    # -- the other machines

    def _others_are_through(self) -> bool:
        """Whether there is nothing to wait for once the own processes have ended, which the others are told."""
        if self.link is None:
            return True
        if not self.link.has_ended:
            self._watch()  # the last to end may have failed
            self.link.tell_end(*self._outcome())
        return self.link.is_over()

    def _obey(self, order: str) -> None:
        """Do what another machine's signal or end asks for."""
        if order == STOP:
            self._watch()  # a rank of ours may have been the first
            self.stopping = True
            self._strike(signal.SIGTERM)
        elif order == HURRY:
            if self.next_blow is None:
                self.next_blow = time.monotonic() + INTERRUPT_GRACE_SECONDS
        else:
            self.told_at = time.monotonic()
            self._pass_on({INTERRUPT: signal.SIGINT, KILL: signal.SIGINT, TERMINATE: signal.SIGTERM}[order], order == KILL)

    def _signal(self, number: int) -> None:
        """A signal that came here; the other machines hear of it."""
        again = self.interrupted
        if again and time.monotonic() - self.told_at < SAME_SIGNAL_SECONDS:
            return
        if self.link is not None:
            self.link.tell_order(TERMINATE if number != signal.SIGINT else KILL if again else INTERRUPT)
        self._pass_on(number, again)

    # -- the own processes

    def _pass_on(self, number: int, again: bool) -> None:
        """Ctrl-C goes to every rank once, and we wait for them; a second one kills. SIGTERM and SIGHUP end the job."""
        first, self.interrupted = not self.interrupted, True
        if number == signal.SIGINT and not again:
            if not first:
                return
            print("Ctrl-C: waiting for the processes to end; press it again to kill them", file=sys.stderr, flush=True)
            for rank in self._running():
                with contextlib.suppress(ProcessLookupError):
                    self.processes[rank].send_signal(signal.SIGINT)  # the rank alone: it looks after its own children
        elif number == signal.SIGINT:
            self._strike(signal.SIGKILL)
        else:
            self._strike(signal.SIGTERM)

    def _watch(self) -> None:
        """Once a rank has ended as it should not, end the others: they would wait for it in a collective for hours.

        A rank that has left its cause but does not end (a thread, a collective holds it) is given the same grace as they are.
        """
        running = self._running()
        ended = [rank for rank in range(self.num_processes) if rank not in running]
        crashed = [rank for rank in ended if self.processes[rank].returncode != 0]
        failing = [rank for rank in running if self._cause_file(rank).exists()]
        if not self.failed and not self.interrupted and not self.stopping and (crashed or failing):
            self.failed, self.failed_at = crashed + failing, time.time()
            if self.link is not None:
                self.link.tell_failure()
        if crashed and not self.interrupted and self.blow == signal.SIGTERM:
            self._strike(signal.SIGTERM)
        elif self.next_blow is not None and time.monotonic() > self.next_blow:
            self._strike(self.blow)
        elif self.next_blow is None and self.interrupted and ended:
            self.next_blow = time.monotonic() + INTERRUPT_GRACE_SECONDS
        elif self.next_blow is None and failing:
            self.next_blow = time.monotonic() + GRACE_SECONDS

    def _strike(self, number: int) -> None:
        for rank in self._running():
            self._kill(rank, number)
        self.blow, self.next_blow = signal.SIGKILL, time.monotonic() + GRACE_SECONDS

    def _kill(self, rank: int, number: int) -> None:
        if self.processes[rank].poll() is None:
            self.sent.add((rank, number))
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.processes[rank].pid, number)

    def _cause_file(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}"

    def _culprit(self) -> int:
        """Of the ranks that were the first to be seen to fail, the one that began: killed from outside, else the first to leave its
        cause. The others fail because of it ("connection closed by peer"), and may be seen before it is: to them a killed rank is
        gone, its connections broken, before the system lets go of it (and writes its core).
        """
        codes = [process.returncode for process in self.processes]
        from_outside = {rank for rank, code in enumerate(codes) if code < 0 and (rank, -code) not in self.sent}
        # Ctrl-C is passed on by us; with SIGABRT torch ends itself where another rank has gone.
        died = {rank for rank in from_outside if codes[rank] not in (-signal.SIGINT, -signal.SIGABRT)}
        seen_late = {rank for rank in died if not self._cause_file(rank).exists()}

        def when(rank: int) -> tuple[float, int]:
            file = self._cause_file(rank)
            left = file.stat().st_mtime if file.exists() else float("inf")
            return (-1.0 if rank in from_outside else left), rank

        return min({*self.failed, *seen_late}, key=when)

    # -- how it ends

    def _outcome(self) -> tuple[int, Failure | None]:
        """The exit code of this machine's ranks, all of which have ended, and which of them was the cause, if one was."""
        codes = [process.returncode for process in self.processes]
        if not self.failed and any(codes) and not self.stopping:
            self.failed, self.failed_at = [rank for rank, code in enumerate(codes) if code != 0], time.time()
        if not self.failed:
            return 0, None
        culprit = self._culprit()
        who = f"process {self._global(culprit)} of {len(codes) * (self.link.place.number if self.link is not None else 1)}"
        if self.link is not None:
            who += f" (machine {self.link.place.index}, {socket.gethostname()})"
        file = self._cause_file(culprit)
        left, _, cause = file.read_text(encoding="utf-8").partition(" ") if file.exists() else ("", "", "")
        if left:  # however the rank was ended then: this is what it wanted to end with
            is_whole_line = int(left) in (2, INTERRUPTED_CODE)  # common/errors.py: a user's mistake, Ctrl-C
            line = cause if is_whole_line else f"error: {who} failed: {cause}"
            return int(left), Failure(2, time.time() - file.stat().st_mtime, int(left), line)
        code = codes[culprit]
        exit_code = 128 - code if code < 0 else code
        if self.interrupted:
            was_early = exit_code == INTERRUPTED_CODE  # before it could say so itself
            return exit_code, Failure(2, time.time() - self.failed_at, exit_code, INTERRUPTED) if was_early else None
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = " (out of memory? see dmesg)" if code == -signal.SIGKILL else ""
        # What torch aborts by itself (SIGABRT) may be because of another machine's end.
        order = 1 if code < 0 and code != -signal.SIGABRT else 2
        return exit_code, Failure(order, time.time() - self.failed_at, exit_code, f"error: {who} {how}{hint}")

    def _end(self) -> tuple[int, str | None]:
        """The exit code of the job, and what to say of it."""
        if self.link is None:
            code, failure = self._outcome()
            return code, None if failure is None else failure.line
        code, line = self.link.leave(1, f"error: the launcher on {socket.gethostname()} failed")
        return code, None if self.link.place.started_by_machine_0 else line

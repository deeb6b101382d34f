"""Running programs that may do anything, from the outside: start, feed, watch, end.

    Sandbox.run_script      one program, one input: its output, or why there is none
    Sandbox.run_functions   one program, statements that test its functions: a verdict for each

The trusted side. What happens inside is in reward/sandbox_runner.py; docs/code_reward.md says what is protected from what.
The judge of a program is this process (scripts) or a second sandbox (functions): never the program's own process.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from reward.function_names import is_setup, parse
from reward.sandbox_limits import Limits, kernel, num_threads_of_user, usage

RUNNER = Path(__file__).with_name("sandbox_runner.py")
START_SECONDS = 60


@dataclass(frozen=True)
class Run:
    """What a program did with one input."""

    outcome: Literal["exit", "time", "memory", "processes", "output"]
    exit_code: int
    """Negative: the signal. 0 only where outcome is exit."""
    output: bytes = b""

    @property
    def note(self) -> str | None:
        """Why it counts as failed, whatever the output; None: it ran to its end."""
        if self.outcome != "exit":
            return f"{self.outcome} limit"
        return None if self.exit_code == 0 else f"exit code {self.exit_code}"


@dataclass(frozen=True)
class Verdict:
    passed: bool
    note: str | None = None


class SandboxError(RuntimeError):
    """The sandbox itself does not work: nothing is known about the program."""


def _file_with(content: bytes) -> int:
    """A nameless file to read `content` from."""
    fd = os.memfd_create("job")
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


@dataclass
class _Process:
    """An init and its program, seen from outside."""

    pid: int
    status: int
    """Descriptor on which init says how the program ended."""
    limits: Limits
    began: float = field(default_factory=time.monotonic)
    seconds_before: float | None = 0.0

    def restart_clock(self) -> None:
        self.began, self.seconds_before = time.monotonic(), None

    def over(self) -> str | None:
        """Which limit it exceeds: "time", "memory", "processes"."""
        elapsed = time.monotonic() - self.began
        used = usage(self.pid)
        if self.seconds_before is None:  # taken when first asked for: most tests end before
            self.seconds_before = used.seconds
        if elapsed > self.limits.clock_seconds or used.seconds - self.seconds_before > self.limits.seconds:
            return "time"
        if used.memory_bytes > self.limits.memory_bytes:
            return "memory"
        return "processes" if used.num_processes > self.limits.num_processes + 1 else None

    def exit_code(self) -> int:
        """Of the program, once `status` is readable. Raises SandboxError where init could not start it."""
        text = os.read(self.status, 4096).decode()
        if text.startswith("failed"):
            raise SandboxError(f"a program could not be started: {text}")
        return int(text) if text else -signal.SIGKILL

    def check_started(self) -> None:
        if select.select([self.status], [], [], 0)[0]:
            self.exit_code()


class Sandbox:
    """Starts programs, one at a time (with its judge, where it has one). Everything of a program is gone when a method returns."""

    def __init__(self, use_namespaces: bool = True) -> None:
        self.namespaces = self.landlock = self.filter = False
        self.problem: str | None = None
        """Why there are no namespaces."""
        self._uid_outside: int | None = None
        parent, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control = parent
        mount_point = tempfile.mkdtemp(prefix="unmask-sandbox-")
        try:
            self._process = self._start(child, {"plain": not use_namespaces, "mount_point": mount_point})
            message = self._receive()
            if "unshared" in message:
                self._send({"mapped": self._map_ids(self._process.pid)})
                message = self._receive()
            self.namespaces, self.problem = message["namespaces"], message["problem"]
            self.landlock, self.filter = message["landlock"], message["filter"]
        finally:
            child.close()
            os.rmdir(mount_point)

    def _start(self, control: socket.socket, settings: dict) -> subprocess.Popen:
        """The zygote, with `control` as descriptor 3 and an environment that holds nothing of ours."""
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        environment = {"PYTHONHASHSEED": "0", "PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", **threads}
        code = (
            "import os, sys; fd, path = int(sys.argv[1]), sys.argv[2]; os.dup2(fd, 3); os.closerange(4, 65536); "
            "os.set_inheritable(3, True); os.execv(sys.executable, [sys.executable, '-s', path, sys.argv[3]])"
        )
        arguments = [str(control.fileno()), str(RUNNER), json.dumps(settings)]
        return subprocess.Popen(
            [sys.executable, "-s", "-S", "-c", code, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[control.fileno()],
            env=environment,
            start_new_session=True,
        )

    def _map_ids(self, pid: int) -> bool:
        """Who the zygote is in its user namespace. As root, programs are a user that nothing else is, else they are us."""
        inside, own = 1000, (os.geteuid(), os.getegid())
        try:
            if own[0] == 0:
                outside = 40000 + os.getpid() % 20000
                for kind in ("uid_map", "gid_map"):
                    Path(f"/proc/{pid}/{kind}").write_text(f"0 0 1\n{inside} {outside} 1\n")
                self._uid_outside = outside
            else:
                Path(f"/proc/{pid}/setgroups").write_text("deny")
                for kind, number in zip(("uid_map", "gid_map"), own):
                    Path(f"/proc/{pid}/{kind}").write_text(f"{inside} {number} 1\n")
        except OSError:
            return False
        return True

    def unprotected(self) -> str | None:
        """One line on what programs could do here that they should not; None: all that this sandbox knows of is shut."""
        if self.namespaces:
            return None
        holes = ["read your files, the tests of the data set among them, and write wherever you may"] * (not self.landlock)
        holes += ["use the network and send signals to your processes"] * (not self.filter)
        holes += ["see which processes run, and leave children behind for as long as it takes to find them"]
        why = f" ({self.problem})" if self.problem else ""
        return f"no user namespaces on this machine{why}: generated programs can " + "; ".join(holes)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._control.close()  # the zygote ends with it, and its forks with the zygote
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, message: dict, fds: list[int] = ()) -> None:
        socket.send_fds(self._control, [json.dumps(message).encode()], list(fds))

    def _receive(self) -> dict:
        if not select.select([self._control], [], [], START_SECONDS)[0]:
            raise SandboxError("the sandbox does not answer")
        data = self._control.recv(1 << 16)
        if not data:
            raise SandboxError(f"the sandbox ended (exit code {self._process.wait()}); its own message is above")
        return json.loads(data)

    # ---- processes -----------------------------------------------------------------------------------------------------

    def _program_uids(self) -> tuple[int, int] | None:
        """Without namespaces, where we are root: users that nothing else is, of the program and of its judge."""
        if self.namespaces or os.geteuid() != 0:
            return None
        return 40000 + os.getpid() % 10000, 50000 + os.getpid() % 10000

    def _spawn(
        self, job: dict, limits: Limits, scratch: str | None, num_tests=1, judge=False, stdin=b"", stdout=None, channel=None
    ) -> _Process:
        num_used, uid = 0, None
        if self._uid_outside is not None:
            uid = 1000
        elif self._program_uids() is not None:
            uid = self._program_uids()[judge]
            if scratch is not None:
                os.chown(scratch, uid, uid)
        elif not (self.namespaces and kernel() >= (5, 14)):  # the limit counts all that this user runs
            num_used = num_threads_of_user()
        settings = {
            "limits": limits.of_process(num_used, num_tests),
            "scratch_bytes": limits.file_bytes,
            "scratch": scratch,
            "uid": uid,
            "judge": judge,
        }
        status, status_write = os.pipe()
        null = os.open(os.devnull, os.O_RDWR)
        job_file, input_file = _file_with(json.dumps(job).encode()), _file_with(stdin)
        own = [job_file, input_file, null, status_write]
        fds = [job_file, input_file, null if stdout is None else stdout, null if channel is None else channel, status_write]
        try:
            self._send({"spawn": settings}, fds)
            return _Process(self._receive()["pid"], status, limits)
        finally:
            for fd in own:
                os.close(fd)

    def _remove(self, scratch: str | None) -> None:
        """Without namespaces: the files of a program, which nothing else can hold open any more."""
        if scratch is None:
            return
        shutil.rmtree(scratch, ignore_errors=True)
        if self._program_uids() is not None and os.path.isdir("/dev/shm"):
            for entry in os.scandir("/dev/shm"):
                if entry.stat(follow_symlinks=False).st_uid in self._program_uids():
                    os.unlink(entry.path)

    def _end(self, process: _Process) -> None:
        """End everything that the process is and started; returns when it has."""
        try:
            os.kill(process.pid, signal.SIGKILL if self.namespaces else signal.SIGTERM)
        except ProcessLookupError:
            pass
        self._send({"reap": process.pid})
        self._receive()
        os.close(process.status)

    def _scratch(self) -> str | None:
        """Without namespaces the scratch directory is a real one."""
        return None if self.namespaces else tempfile.mkdtemp(prefix="unmask-program-")

    # ---- scripts -------------------------------------------------------------------------------------------------------

    def run_script(self, code: str, stdin: str, limits: Limits, num_expected: int = 0) -> Run:
        """Run `code` as the main program with `stdin`. `num_expected`: bytes of output that are expected."""
        scratch = self._scratch()
        read, write = os.pipe()
        process = None
        try:
            job = {"kind": "script", "code": code}
            process = self._spawn(job, limits, scratch, stdin=stdin.encode("utf-8", "surrogatepass"), stdout=write)
            os.close(write)
            write = None
            return self._watch_script(process, read, limits.output_bytes + 2 * num_expected)
        finally:
            if process is not None:
                self._end(process)
            for fd in (read, write):
                if fd is not None:
                    os.close(fd)
            self._remove(scratch)

    def _watch_script(self, process: _Process, read: int, max_output: int) -> Run:
        parts: list[bytes] = []
        size, wait = 0, 0.02
        os.set_blocking(read, False)
        while True:
            ready = select.select([read, process.status], [], [], wait)[0]
            if read in ready:
                part = os.read(read, 1 << 20)
                size += len(part)
                parts.append(part)
                if size > max_output:
                    return Run("output", -signal.SIGKILL)
                if not part:  # closed early: only its end counts now
                    select.select([process.status], [], [], wait)
            if process.status in ready:
                code = process.exit_code()
                parts.append(_drain(read, max_output - size))
                return Run("time" if code == -signal.SIGXCPU else "exit", code, b"".join(parts))
            if not ready or time.monotonic() - process.began > 0.05:
                if over := process.over():
                    return Run(over, -signal.SIGKILL)
                wait = min(wait * 1.5, 0.1)

    # ---- functions -----------------------------------------------------------------------------------------------------

    def run_functions(self, code: str, tests: list[str], prefix: str, limits: Limits) -> list[Verdict]:
        """Run `code` once, then each statement of `tests` against it, in order and in one namespace.

        Where a test ends the program or exceeds a limit, the tests behind it are run against a new start of it.
        """
        verdicts: list[Verdict | None] = [None] * len(tests)
        first = 0
        while first < len(tests):
            prepare = [n for n in range(first) if is_setup(parse(tests[n]))]
            self._run_functions_from(first, prepare, code, tests, prefix, limits, verdicts)
            while first < len(tests) and verdicts[first] is not None:
                first += 1
        return verdicts

    def _run_functions_from(self, first, prepare, code, tests, prefix, limits, verdicts) -> None:
        """Fill in at least verdicts[first]."""
        scratch, judge_scratch = self._scratch(), self._scratch()
        ours, theirs = socket.socketpair()
        read, write = os.pipe()
        processes = []
        program, num_tests = {"kind": "function", "code": code}, len(tests) + 1  # with the start of the program
        try:
            processes.append(self._spawn(program, limits, scratch, num_tests, channel=theirs.fileno()))
            job = {"code": code, "tests": tests, "prefix": prefix, "first": first, "prepare": prepare}
            # The judge's own limits only keep a test from hanging: processor time is measured at the program.
            judge_limits = Limits(10 * limits.seconds + 10, limits.memory_bytes, limits.num_processes, limits.file_bytes)
            judge = self._spawn(job, judge_limits, judge_scratch, num_tests, judge=True, stdout=write, channel=ours.fileno())
            processes.append(judge)
            ours.close(), theirs.close(), os.close(write)
            write = None
            self._watch_functions(*processes, read, first, verdicts)
        finally:
            for process in processes:
                self._end(process)
            ours.close(), theirs.close()
            for fd in (read, write):
                if fd is not None:
                    os.close(fd)
            self._remove(scratch)
            self._remove(judge_scratch)

    def _watch_functions(self, program: _Process, judge: _Process, read: int, first: int, verdicts: list) -> None:
        buffer, current, wait = b"", first, 0.02
        while current < len(verdicts):
            ready = select.select([read], [], [], wait)[0]
            if ready:
                part = os.read(read, 1 << 16)
                if not part:  # a test has ended the judge
                    judge.check_started()
                    verdicts[current] = Verdict(False, "the test ended its judge")
                    return
                buffer += part
                *lines, buffer = buffer.split(b"\n")
                for message in map(json.loads, lines):
                    if "failed" in message:
                        program.check_started()
                        verdicts[first:] = [Verdict(False, message["failed"])] * (len(verdicts) - first)
                        return
                    if "test" in message:
                        verdicts[message["test"]] = Verdict(message["passed"], message["note"])
                        current = message["test"] + 1
                    if "ended" in message:
                        return
                program.restart_clock()
                judge.restart_clock()
                wait = 0.02
            elif over := program.over() or judge.over():
                verdicts[current] = Verdict(False, f"{over} limit")
                return
            else:
                wait = min(wait * 1.5, 0.1)


def _drain(fd: int, num_bytes: int) -> bytes:
    """What is in a pipe whose writers have ended, up to `num_bytes`."""
    parts = []
    while num_bytes > 0:
        try:
            part = os.read(fd, min(num_bytes, 1 << 20))
        except BlockingIOError:
            break
        if not part:
            break
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


# ---- one job of reward/worker_pool.py ------------------------------------------------------------------------------------

_sandbox: Sandbox | None = None


def run_job(job: dict[str, Any]) -> Any:
    """{"kind": "probe"} -> {"unprotected": text or null}; a program with its tests -> [[passed, note], ...]."""
    global _sandbox
    if _sandbox is None:
        _sandbox = Sandbox(job["use_namespaces"])
    if job["kind"] == "probe":
        return {"unprotected": _sandbox.unprotected()}
    limits = Limits(seconds=job["seconds"], memory_bytes=job["memory_bytes"])
    if job["kind"] == "function":
        verdicts = _sandbox.run_functions(job["code"], job["tests"], job["prefix"], limits)
        return [[verdict.passed, verdict.note] for verdict in verdicts]
    run = _sandbox.run_script(job["code"], job["input"], limits, len(job["output"].encode("utf-8", "surrogatepass")))
    if run.note is not None:
        return [[False, run.note]]
    from reward.code_text import same_output

    passed = same_output(run.output.decode("utf-8", "replace"), job["output"])
    return [[passed, None if passed else "wrong output"]]

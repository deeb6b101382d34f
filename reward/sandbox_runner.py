"""The process that all sandboxed programs are forks of, and what happens in such a fork. Run as a file by reward/sandbox.py.

    zygote   lives in user, network, mount and ipc namespaces of its own, with a root that shows Python and nothing else. It
             never sees a program or a test: a fork of it inherits nothing that is worth reading.
    init     one fork per program: process 1 of a pid namespace of its own, with a /tmp of its own. Its end is the end of
             every process that the program started.
    program  the fork of init that is shut in and runs the program (or the tests, see reward/function_judge.py).

Where the machine grants no namespaces, zygote and init stay in those of the parent (`plain` below): init then collects what
the program leaves behind (it is its subreaper), and a system call filter takes the network and signals to others away.

Requests come over a SEQPACKET socket (descriptor 3): one JSON object each, the file descriptors with it.
    {"spawn": {...}}    -> {"pid": int}          descriptors: job, stdin, stdout, channel, status
    {"reap": pid}       -> {"status": int}       after everything that the fork started has ended
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: the repo's root, not this folder

from reward import sandbox_linux as linux

# Loaded once, here: what programs import most costs them nothing.
PRELOADED = (
    "ast atexit base64 bisect cmath collections copy dataclasses datetime decimal enum fractions functools gc heapq io itertools "
    "math numbers operator queue random re statistics string threading traceback types typing"
).split()
DESCRIPTORS = 5  # of a spawn request


# ---- zygote ------------------------------------------------------------------------------------------------------------


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, from /proc: children before grandchildren."""
    found = [pid]
    try:
        for one in found:  # grows meanwhile
            for task in os.listdir(f"/proc/{one}/task"):
                with open(f"/proc/{one}/task/{task}/children", "rb") as file:
                    found += map(int, file.read().split())
        return found[1:]
    except OSError:
        return _descendants_by_parents(pid)  # one ended meanwhile, or a kernel without lists of children


def _descendants_by_parents(pid: int) -> list[int]:
    found, parents = [], {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parents[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
            except (OSError, IndexError):
                continue  # ended meanwhile
    level = {pid}
    while level:
        level = {child for child, parent in parents.items() if parent in level}
        found += level
    return found


def kill_all_below(keep: frozenset[int] = frozenset()) -> None:
    """End every descendant of this process but those `keep` and their descendants, and collect them."""
    kept = set(keep)
    for pid in keep:
        kept.update(descendants(pid))
    while True:
        left = [pid for pid in descendants(os.getpid()) if pid not in kept]
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass  # ended meanwhile
        if not left:
            return
        for pid in left:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                pass  # a grandchild: it becomes ours once its parent has ended
        time.sleep(0.001)


class Zygote:
    def __init__(self, control: socket.socket, settings: dict) -> None:
        self.control = control
        self.plain = settings["plain"]
        self.inits: set[int] = set()
        problem = None
        if not self.plain:
            try:
                self.enter_namespaces(settings["mount_point"])
            except OSError as error:
                self.plain, problem = True, str(error)
        if self.plain:
            linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
        linux.die_with_parent()
        linux.hide_memory()
        self.send(
            {
                "namespaces": not self.plain,
                "problem": problem,
                "landlock": linux.landlock_version() > 0,
                "filter": linux.has_filter(),
            }
        )

    def enter_namespaces(self, mount_point: str) -> None:
        kinds = linux.CLONE_NEWNS | linux.CLONE_NEWNET | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS | linux.CLONE_NEWCGROUP
        linux.unshare(linux.CLONE_NEWUSER | kinds)
        self.send({"unshared": True})  # the parent writes the maps of user ids: from inside only one's own could be mapped
        if not json.loads(self.control.recv(1024))["mapped"]:
            raise OSError(0, "user ids cannot be mapped")
        # A trial of what every program needs, so that a machine without it is known now.
        linux.enter_root(mount_point)
        pid = self.fork_init()
        if pid == 0:
            try:
                linux.unshare(linux.CLONE_NEWNS)
                linux.mount_scratch(1 << 20)
            except OSError as error:
                os._exit(error.errno)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code:
            raise OSError(code, f"mount /tmp: {os.strerror(code)}")

    def fork_init(self) -> int:
        """fork, into a new pid namespace where there are any."""
        return os.fork() if self.plain else linux.fork_into_pid_namespace()

    def send(self, message: dict) -> None:
        self.control.send(json.dumps(message).encode())

    def serve(self) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(self.control, 1 << 16, DESCRIPTORS)
            if not data:
                break  # the parent has closed its end
            request = json.loads(data)
            if "spawn" in request:
                pid = self.fork_init()
                if pid == 0:
                    self.control.detach()
                    run_init(request["spawn"], fds, self.plain)
                self.inits.add(pid)
                self.send({"pid": pid})
            else:
                pid = request["reap"]
                _, status = os.waitpid(pid, 0)
                self.inits.discard(pid)
                if self.plain:
                    kill_all_below(keep=frozenset(self.inits))
                self.send({"status": os.waitstatus_to_exitcode(status)})
            for fd in fds:
                os.close(fd)
        for pid in self.inits:
            os.kill(pid, signal.SIGTERM if self.plain else signal.SIGKILL)


# ---- init --------------------------------------------------------------------------------------------------------------


class Stop(BaseException):
    pass


def _stop(*_: object) -> None:
    raise Stop


def run_init(settings: dict, fds: list[int], plain: bool) -> None:
    """Fork the program, wait for its end, report it on the status descriptor, and end everything. Never returns."""
    status = fds[DESCRIPTORS - 1]
    code = 255
    try:
        linux.die_with_parent(signal.SIGTERM if plain else signal.SIGKILL)
        if plain:
            linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
            signal.signal(signal.SIGTERM, _stop)
        else:
            linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWIPC)
            linux.mount_scratch(settings["scratch_bytes"])
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.close(status)
            try:
                run_program(settings, fds[: DESCRIPTORS - 1], plain)
            finally:  # whatever the program did to be here
                os._exit(1)
        for fd in fds[: DESCRIPTORS - 1]:
            os.close(fd)
        while True:
            ended, how = os.waitpid(-1, 0)
            if ended == pid:
                code = os.waitstatus_to_exitcode(how)
                break
    except Stop:
        pass
    except OSError as error:
        os.write(status, f"failed: {error}".encode())
    finally:
        try:
            if plain:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                kill_all_below()
                shutil.rmtree(settings["scratch"], ignore_errors=True)  # here too: the parent may have been killed
            os.write(status, str(code).encode())
        finally:
            os._exit(0)


# ---- program -----------------------------------------------------------------------------------------------------------


def read_all(fd: int) -> bytes:
    parts = []
    os.lseek(fd, 0, os.SEEK_SET)
    while part := os.read(fd, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def shut_in(settings: dict, plain: bool) -> None:
    """Give up what a program does not need. The order matters: limits while they may be set, the filter last."""
    os.setsid()
    if plain:
        os.chdir(settings["scratch"])
    linux.set_limits({getattr(resource, f"RLIMIT_{name}"): value for name, value in settings["limits"].items()})
    os.umask(0o022)
    uid = settings["uid"]
    if plain and linux.landlock_version():
        linux.restrict_files(settings["scratch"], shared_memory=settings["uid"] is not None)
    kept = 0
    if uid is not None:  # a user other than the one that the parent is
        if plain and not linux.all_may_enter(linux.python_folders()):
            kept = 1 << linux.CAP_DAC_READ_SEARCH  # a Python in root's home
        linux.become(uid, keep_capabilities=kept != 0)
    linux.prctl(linux.PR_SET_DUMPABLE, 0 if settings["judge"] else 1)
    linux.drop_capabilities(kept)
    if linux.has_filter():
        # Where neither another user nor Landlock keeps signals in, not even a program's own children may be sent any.
        only_itself = plain and uid is None and linux.landlock_version() < linux.LANDLOCK_SCOPES
        linux.filter_system_calls(own_namespaces=not plain, only_itself=only_itself)
    if plain:
        linux.die_with_parent()


def run_program(settings: dict, fds: list[int], plain: bool) -> None:
    job_fd, stdin, stdout, channel = fds
    job = json.loads(read_all(job_fd))
    null = os.open("/dev/null", os.O_RDWR)
    # Descriptors above all that are taken first, so that none is overwritten before it is moved.
    high = [os.dup2(fd, 100 + n) for n, fd in enumerate((stdin, stdout, null, channel))]
    for n, fd in enumerate(high):
        os.dup2(fd, n)
    os.closerange(4, 1 << 16)
    shut_in(settings, plain)
    if not plain and "/dev/stdin" in job.get("code", ""):  # a link to here: there is no /proc
        Path("/tmp/.stdin").write_bytes(read_all(0))
        os.lseek(0, 0, os.SEEK_SET)
    os.environ.clear()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        fd = ("stdin", "stdout", "stderr").index(name)
        stream = open(fd, mode, encoding="utf-8", errors="surrogateescape" if fd < 2 else "backslashreplace", closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv = ["program.py"]
    if settings["judge"]:
        from reward.function_judge import judge

        judge(job)
    elif job["kind"] == "function":
        from reward.function_guest import serve

        serve(job)
    else:
        run_script(job["code"])


def run_script(code: str) -> None:
    """Run a program as `python program.py` would, up to its exit code, and end the process."""
    import atexit
    import threading
    import types

    module = types.ModuleType("__main__")
    module.__dict__.update(__file__="program.py", __builtins__=__builtins__)
    sys.modules["__main__"] = module
    status = 0
    try:
        exec(compile(code, "program.py", "exec"), module.__dict__)
    except SystemExit as exit:
        status = 0 if exit.code is None else exit.code if isinstance(exit.code, int) else 1
    except BaseException:
        status = 1
    try:
        threading._shutdown()  # threads that are not daemons finish
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        status = 1
    os._exit(status & 0xFF)


def main() -> None:
    settings = json.loads(sys.argv[1])
    control = socket.socket(fileno=3)
    for name in PRELOADED:
        __import__(name)
    import gc

    import reward.function_guest
    import reward.function_judge  # noqa: F401

    sys.path.pop(0)
    gc.collect()
    gc.freeze()  # a collection in a fork would copy all of these pages
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # where memory runs out, programs go first
    except OSError:
        pass  # no /proc, or read-only: the limits still hold
    Zygote(control, settings).serve()


if __name__ == "__main__":
    main()

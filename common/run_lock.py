"""One job at a time in one place: a file that the job holds locked while it runs.

The lock is the kernel's (flock), so it goes with its holder, however that ends: SIGKILL leaves the file behind, unlocked, and the
next job takes it over. Over NFS Linux makes a lock of the server's of it, which other machines see. Where a file system has no
locks the job runs without, and says so.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
import weakref
from pathlib import Path

from common.errors import UserError, is_disk_full, warn

SUFFIX = ".lock"
PATIENCE_SECONDS = 2.0
"""A job that was killed holds its lock until the system has let go of all its memory."""
_TAKEN = (errno.EAGAIN, errno.EACCES)
_held: set[int] = set()
"""Descriptors of this process's locks. A lock is gone when every copy of its descriptor is: a forked child closes its own."""


def _forget_in_child() -> None:
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)


class RunLock:
    """A lock that its holder keeps until `release`, its own end, or the end of this object."""

    def __init__(self, path: Path, what: str, instead: str = "another run directory (experiment.project)") -> None:
        """path: of the file, made where it is not there, its folders too. For messages: what is held ("runs/x"), and what somebody
        may choose instead of it."""
        self.path, self.what, self.instead = path, what, instead
        self._release: weakref.finalize | None = None

    def check(self) -> None:
        """Raises UserError where somebody holds it. Writes nothing."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                descriptor = os.open(self.path, os.O_RDWR)  # to write, as NFS wants it
            except OSError:  # not there, or not ours to write in: whoever wants to take it is told
                return
            try:
                if _try(descriptor):
                    return
            except OSError:  # no locks here
                return
            finally:
                os.close(descriptor)
            self._wait(deadline)

    def acquire(self) -> None:
        """Hold it. Raises UserError where somebody else does, or where the file cannot be made."""
        assert self._release is None, f"{self.path} is held already"
        deadline = time.monotonic() + PATIENCE_SECONDS
        made: list[Path] = []
        try:
            while True:
                self._make_folders(made)
                try:
                    descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
                except FileNotFoundError:  # a job that ended has just taken away the folder that it had made
                    if time.monotonic() > deadline:
                        raise
                    continue
                if self._lock(descriptor):
                    break
                os.close(descriptor)
                self._wait(deadline)
        except OSError as error:
            _remove_empty(made)
            if is_disk_full(error):
                raise
            raise UserError(f"{self.what}: cannot be made ({error.strerror}: {error.filename}): choose {self.instead}") from error
        _held.add(descriptor)
        self._release = weakref.finalize(self, _release, descriptor, self.path, os.getpid(), made)

    def release(self) -> None:
        """Let go, and leave nothing behind but what others have written. Without effect where it is not held."""
        if self._release is not None:
            self._release()
            self._release = None

    def _lock(self, descriptor: int) -> bool:
        """Whether the open file was locked, and is the one that has the name: its last holder may just have removed it."""
        try:
            if not _try(descriptor):
                return False
        except OSError as error:
            warn(
                f"{self.path}: no locks on this file system ({error.strerror}): nothing but yourself keeps a second job from "
                f"writing to {self.path.parent} at the same time"
            )
        try:
            if not os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                return False
        except FileNotFoundError:
            return False
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}, started {time.strftime('%F %T')}\n".encode(), 0)
        return True

    def _wait(self, deadline: float) -> None:
        if time.monotonic() < deadline:
            time.sleep(0.05)
            return
        try:
            holder = self.path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            holder = ""
        raise UserError(
            f"{self.what} is in use by {holder or 'another process'}: wait until it has ended, end it, or choose {self.instead}"
        )

    def _make_folders(self, made: list[Path]) -> None:
        missing = [folder for folder in self.path.parents if not folder.exists()]
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                made.append(folder)


def _try(descriptor: int) -> bool:
    """Lock an open file; False where somebody else has. Raises OSError where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        raise
    return True


def _release(descriptor: int, path: Path, owner: int, made: list[Path]) -> None:
    if os.getpid() != owner:  # a forked child at its end
        return
    _held.discard(descriptor)
    with contextlib.suppress(OSError):  # removed by hand, with the whole run directory
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            path.unlink()
    os.close(descriptor)
    _remove_empty(made)


def _remove_empty(folders: list[Path]) -> None:
    """Those of these folders, each within the one before it, in which there is nothing."""
    for folder in reversed(folders):
        try:
            folder.rmdir()
        except OSError:
            return

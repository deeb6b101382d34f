"""One holder at a time, whoever it is, and none that outlives its process."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import common.run_lock
from common.errors import UserError
from common.run_lock import RunLock
from tests.distributed.harness import ROOT, clean_environment

HOLD = """
import os, subprocess, sys, time
from pathlib import Path
from common.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]), "it")
lock.acquire()
{more}
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(common.run_lock, "PATIENCE_SECONDS", 0.2)


def holder(path: Path, more: str = "") -> subprocess.Popen:
    """A process that holds the lock."""
    command = [sys.executable, "-c", HOLD.format(more=more), str(path)]
    process = subprocess.Popen(command, cwd=ROOT, env=clean_environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == str(process.pid)
    return process


def test_a_second_holder_is_told_of_the_first(tmp_path: Path):
    path = tmp_path / "runs" / "x" / ".run.lock"
    before = time.strftime("%F")
    first = holder(path)
    words = f"^runs/x is in use by process {first.pid} on {re.escape(socket.gethostname())}, started {before} ..:..:..: wait until"
    for second in (RunLock(path, "runs/x"), RunLock(path, "runs/x")):
        with pytest.raises(UserError, match=words):
            second.check()
        with pytest.raises(UserError, match=words):
            second.acquire()
    RunLock(path.with_name(".results-test.lock"), "runs/x").acquire()  # another file is another lock
    first.kill()
    first.wait()


def test_it_goes_with_a_killed_holder_though_its_children_live(tmp_path: Path):
    """Children of every kind: started, and forked without an exec."""
    path = tmp_path / ".run.lock"
    more = "children = [subprocess.Popen(['sleep', '60']).pid, os.fork()]\nif children[1] == 0: time.sleep(60)\n"
    more += f"Path({str(tmp_path / 'children')!r}).write_text(repr(children))"
    first = holder(path, more)
    children = eval((tmp_path / "children").read_text())
    try:
        with pytest.raises(UserError):
            RunLock(path, "it").acquire()
        first.kill()
        first.wait()
        assert path.read_text().startswith(f"process {first.pid} on ")
        for child in children:
            os.kill(child, 0)  # lives
        second = RunLock(path, "it")
        second.check()
        second.acquire()
        assert path.read_text().startswith(f"process {os.getpid()} on ")
        second.release()
        assert not path.exists()
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)


def test_what_it_made_it_takes_away(tmp_path: Path):
    path = tmp_path / "a" / "b" / ".run.lock"
    lock = RunLock(path, "it")
    lock.acquire()
    assert path.is_file()
    lock.release()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    lock.acquire()
    (tmp_path / "a" / "file").write_text("of another")
    lock.release()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


def test_it_goes_with_the_object_and_not_with_a_forked_child(tmp_path: Path):
    path = tmp_path / ".run.lock"
    lock = RunLock(path, "it")
    lock.acquire()
    child = os.fork()
    if child == 0:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert path.exists()
    with pytest.raises(UserError):
        RunLock(path, "it").check()
    del lock
    assert not path.exists()


def test_a_file_that_its_last_holder_has_removed_is_not_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Between opening and locking: whoever held it has gone, and somebody else has made it anew."""
    path = tmp_path / ".run.lock"
    original, seen = common.run_lock._try, []

    def replaced_before(descriptor: int) -> bool:
        if not seen:
            path.unlink()
            path.write_text("new")
        seen.append(os.fstat(descriptor).st_ino)
        return original(descriptor)

    monkeypatch.setattr(common.run_lock, "_try", replaced_before)
    lock = RunLock(path, "it")
    lock.acquire()
    assert len(seen) == 2 and seen[1] == path.stat().st_ino


@pytest.mark.parametrize("place", ["/proc/foo/.run.lock", "/proc/self/foo/bar/.run.lock", "/dev/null/x/.run.lock"])
def test_a_place_where_nothing_can_be_made(place: str):
    with pytest.raises(UserError, match=r"^it: cannot be made \(.*: choose another run directory"):
        RunLock(Path(place), "it").acquire()


def test_a_link_to_nowhere(tmp_path: Path):
    (tmp_path / "run").symlink_to(tmp_path / "gone" / "run")
    with pytest.raises(UserError, match="cannot be made"):
        RunLock(tmp_path / "run" / ".run.lock", "it").acquire()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock = RunLock(tmp_path / ".run.lock", "it")
    lock.check()
    lock.acquire()
    lock.release()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no locks on this file system (Operation not supported)" in said

"""What is removed is on the disk in its new form first."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

import common.files
from common.files import replace_directory
from common.run_dir import RunDir


@pytest.fixture
def log(monkeypatch) -> list[tuple[str, str]]:
    """(sync or remove, the path's last part) in order; an exchange and a rename too."""
    done: list[tuple[str, str]] = []
    fsync, rmtree, rename, exchange = os.fsync, shutil.rmtree, Path.rename, common.files.exchange

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))

    def removed(path, *args, **options) -> None:
        if Path(path).exists():
            done.append(("remove", Path(path).name))
        rmtree(path, *args, **options)

    def renamed(self: Path, target: Path) -> Path:
        done.append(("name", Path(target).name))
        return rename(self, target)

    def exchanged(one: Path, other: Path) -> bool:
        done.append(("name", other.name))
        return exchange(one, other)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(shutil, "rmtree", removed)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(common.files, "exchange", exchanged)
    return done


def write(folder: Path) -> None:
    (folder / "value").mkdir()
    for name in ("weights.bin", "value/state.bin", "run.json"):
        (folder / name).write_text("x")


def write_state(directory: RunDir, step: int) -> None:
    directory.write_state(step, write, is_main=True, barrier=lambda: None)


def test_an_older_state_goes_when_the_new_one_is_on_the_disk(tmp_path, log):
    directory = RunDir(tmp_path / "run")
    write_state(directory, 1)
    log.clear()
    write_state(directory, 2)
    contents = {("sync", name) for name in ("weights.bin", "state.bin", "run.json", "value", ".step_000002.partial")}
    named = log.index(("name", "step_000002"))
    assert set(log[:named]) == contents and len(log[:named]) == len(contents)
    assert log[named + 1 :] == [("sync", "state"), ("remove", "step_000001")]
    assert directory.latest_state().name == "step_000002"


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_state_of_the_same_step_is_replaced_as_a_whole(tmp_path, log, monkeypatch, exchanges):
    directory = RunDir(tmp_path / "run")
    write_state(directory, 1)
    (directory.latest_state() / "run.json").write_text("old")
    if not exchanges:
        monkeypatch.setattr(common.files, "exchange", lambda one, other: False)
    log.clear()
    write_state(directory, 1)
    last_name = max(index for index, (what, _) in enumerate(log) if what == "name")
    assert log[last_name] == ("name", "step_000001") and log[last_name + 1] == ("sync", "state")
    assert [what for what, _ in log[last_name + 2 :]] == ["remove"]
    assert [path.name for path in directory.states.iterdir()] == ["step_000001"]
    assert (directory.latest_state() / "run.json").read_text() == "x"


def test_a_disk_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    """The system's error comes at the sync, when all has been written."""
    old, new = tmp_path / "ckpt", tmp_path / ".ckpt.partial"
    for folder, text in ((old, "old"), (new, "new")):
        folder.mkdir()
        (folder / "weights.bin").write_text(text)

    def fails(number: int):
        def fsync(descriptor: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fsync)

    fails(errno.EIO)
    with pytest.raises(OSError):
        replace_directory(new, old)
    assert (old / "weights.bin").read_text() == "old"
    fails(errno.EINVAL)  # a file system that knows no such thing
    replace_directory(new, old)
    assert (old / "weights.bin").read_text() == "new" and not new.exists()

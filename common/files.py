"""Replacing what others may be reading: a directory changes as a whole, or not at all."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
from pathlib import Path

_AT_FDCWD = -100  # fcntl.h
_RENAME_EXCHANGE = 2  # linux/fs.h
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
"""What a kernel or file system answers (NFS, some of FUSE) that exchanges no names or syncs no directory; EPERM: forbidden by a
sandbox."""


def exchange(one: Path, other: Path) -> bool:
    """Let two paths of one file system swap what they name, in one instant; False where that cannot be done here."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:  # not Linux, or a C library from before 2018
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def replace_directory(new: Path, folder: Path) -> None:
    """Move the directory `new` to `folder`, in the place of the one there may be.

    Whoever opens `folder` finds the old one or the new one, whole, at every instant. Where the file system cannot exchange names
    there is an instant between two renames in which `folder` is missing; `recover_directories` mends a kill in it. When this
    returns, the new one is on the disk under its name; only then the old one is removed, so that a machine that loses its power
    has one of them.
    """
    sync(new)
    old = _aside(folder)
    if not folder.exists():
        new.rename(folder)
    elif exchange(new, folder):
        old = new
    else:
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        new.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=old != new)


def sync(folder: Path) -> None:
    """Have all that is in a directory on the disk, names and contents, when this returns. What is there already costs nothing."""
    for parent, _, files in os.walk(folder):
        for path in (*(Path(parent, name) for name in files), Path(parent)):
            _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    finally:
        os.close(descriptor)


def link_directory(source: Path, folder: Path) -> None:
    """Make `folder` a copy of the checkpoint in `source`, in the place of the directory there may be, without writing its weights
    a second time: they are hard links (copies where there are none), which is safe as checkpoints are only replaced as a whole.
    What a user may edit, config.json and the like, is copied."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=_link)
    replace_directory(partial, folder)


def _link(source: str, target: str) -> None:
    if not source.endswith(".safetensors"):
        shutil.copyfile(source, target)
        return
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (*_CANNOT, errno.EMLINK, errno.EXDEV):
            raise
        shutil.copyfile(source, target)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def recover_directories(parent: Path) -> None:
    """Clear up in `parent` behind a writer that was killed: a directory without its name gets it back, leftovers go."""
    if not parent.is_dir():
        return
    for aside in parent.glob(".*.old"):
        folder = aside.with_name(aside.name.removeprefix(".").removesuffix(".old"))
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(folder)
    remove_partials(parent)


def remove_partials(parent: Path, prefix: str = "") -> None:
    """Remove the half-written files and directories (`.NAME.partial`) that a killed writer left in `parent`; prefix: of the names
    that are this writer's, where others write there too."""
    for partial in parent.glob(f".{glob.escape(prefix)}*.partial"):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)

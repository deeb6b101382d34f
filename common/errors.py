"""The one exception that a user's mistake raises, and the way it ends a program."""

from __future__ import annotations

import errno
import functools
import os
import sys
from pathlib import Path
from typing import Callable, NoReturn

ERROR_FILE = "UNMASK_ERROR_FILE"
"""Environment variable: where a rank leaves the cause of its end for the launcher, which tells it once (common/launch.py)."""


class UserError(ValueError):
    """A mistake that the user can mend: what is wrong, what was got, what to do, in one line."""


def leave_cause(cause: str, exit_code: int = 1) -> bool:
    """Leave `cause` and the exit code to end with for the launcher of this rank; False where none of ours waits for it."""
    path = os.environ.get(ERROR_FILE)
    if path is None:
        return False
    Path(path).write_text(f"{exit_code} {cause}", encoding="utf-8")
    return True


def fail(error: UserError) -> NoReturn:
    """Print the one line of `error` (a rank: have the launcher print it) and leave with exit code 2."""
    if not leave_cause(f"error: {error}", exit_code=2):
        print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether `error`, or what it came from, says that nothing more can be written.

    safetensors keeps the system's words only; torch.save says where its archive breaks off, and keeps not even those.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        text = str(error)
        if "No space left on device" in text or "Disk quota exceeded" in text:
            return True
        if isinstance(error, RuntimeError) and "inline_container" in text and ("unexpected pos" in text or "write failed" in text):
            return True
        error = error.__cause__ or error.__context__
    return False


def warn(message: str) -> None:
    """Print one line that the user should see; the run goes on."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def entry_point(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate a program's `main`: a mistake or a full disk becomes one line on stderr and exit code 2, Ctrl-C one line and 130."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            fail(error)
        except KeyboardInterrupt:
            line = "interrupted; start the same command again to go on"
            if not leave_cause(line, exit_code=130):
                print(line, file=sys.stderr, flush=True)
            sys.exit(130)
        except Exception as error:
            if is_disk_full(error):
                where = f" while writing {error.filename}" if getattr(error, "filename", None) else ""
                fail(UserError(f"the disk is full{where}: free some space and start again, the run goes on from its last state"))
            leave_cause(f"{type(error).__name__}: {error}")
            raise

    return wrapped

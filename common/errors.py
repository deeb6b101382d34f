"""The one exception that a user's mistake raises, and the way it ends a program."""

from __future__ import annotations

import functools
import sys
from typing import Callable, NoReturn


class UserError(ValueError):
    """A mistake that the user can mend: what is wrong, what was got, what to do, in one line."""


def fail(error: UserError) -> NoReturn:
    """Print the one line of `error` and leave with exit code 2."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


def entry_point(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate a program's `main`: a UserError becomes one line on stderr and exit code 2, never a traceback."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            fail(error)

    return wrapped

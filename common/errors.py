"""The one exception that a user's mistake raises, and the way it ends a program."""

from __future__ import annotations

import errno
import functools
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Callable, NoReturn

ERROR_FILE = "UNMASK_ERROR_FILE"
"""Environment variable: where a rank leaves the cause of its end for the launcher, which tells it once (common/launch.py)."""


INTERRUPTED, INTERRUPTED_CODE = "interrupted; start the same command again to go on", 130
"""What Ctrl-C ends a program with."""


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


ROOT = Path(__file__).resolve().parents[1]
MEMORY_ADVICE = {
    "train": "lower training.max_tokens_per_microbatch (or training.head_chunk), recompute all activations "
    "(training.gradient_checkpointing_enable=true), or share more: ZeRO-3, training.lora, more GPUs",
    "sample": "lower rollout.max_active or rollout.max_token",
    "": "share more (ZeRO-3, training.lora, more GPUs), or lower training.max_tokens_per_microbatch and rollout.max_active",
}
"""By the room that ran out of memory."""


def memory_is_full(error: BaseException | None) -> str | None:
    """One line that says where the memory of the GPU (or the machine) was used up and what to change; None for any other error."""
    while error is not None:
        text, kinds = str(error), {kind.__name__ for kind in type(error).__mro__}
        on_host = "MemoryError" in kinds or "DefaultCPUAllocator" in text
        on_gpu = "OutOfMemoryError" in kinds or (
            "RuntimeError" in kinds and ("out of memory" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text)
        )
        if on_gpu or on_host:
            break
        error = error.__cause__ or error.__context__
    else:
        return None
    room, place = "", ""
    for frame, number in traceback.walk_tb(error.__traceback__):  # the innermost of ours comes last
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and not path.relative_to(ROOT).parts[0].startswith("."):
            own = path.relative_to(ROOT)
            room, place = own.parts[0] if own.parts[0] in MEMORY_ADVICE else room, f" in {own}, line {number}"
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ [KMGT]iB)", text)
    return (
        f"the {'GPU' if on_gpu else 'machine'}'s memory is full{place}{f' ({asked[1]} more were wanted)' if asked else ''}: "
        f"{MEMORY_ADVICE[room]}; python -m train.memory_estimate says what takes how much. Started again the run goes on from its "
        "last state (with other settings: experiment.start_from_scratch=false)"
    )


def warn(message: str) -> None:
    """Print one line that the user should see; the run goes on."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def warn_once(message: str) -> None:
    """Warn once per run: the processes that this one starts find the message in their environment."""
    told = os.environ.get("UNMASK_TOLD", "").splitlines()
    if os.environ.get("RANK", "0") == "0" and message not in told:
        os.environ["UNMASK_TOLD"] = "\n".join([*told, message])
        warn(message)


def entry_point(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate a program's `main`: a mistake or a full disk becomes one line on stderr and exit code 2, full memory one line and 1,
    Ctrl-C one line and 130."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            fail(error)
        except KeyboardInterrupt:
            if not leave_cause(INTERRUPTED, INTERRUPTED_CODE):
                print(INTERRUPTED, file=sys.stderr, flush=True)
            sys.exit(INTERRUPTED_CODE)
        except Exception as error:
            if is_disk_full(error):
                where = f" while writing {error.filename}" if getattr(error, "filename", None) else ""
                fail(UserError(f"the disk is full{where}: free some space and start again, the run goes on from its last state"))
            full = memory_is_full(error)
            if full is not None:
                if not leave_cause(full):
                    print(f"error: {full}", file=sys.stderr, flush=True)
                sys.exit(1)
            leave_cause(f"{type(error).__name__}: {error}")
            raise

    return wrapped

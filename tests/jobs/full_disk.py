"""A plugin of test_bad_input.py: every write below the folder FULL_DISK of the run directory (or to its metrics.jsonl) fails.

It fails as it does on a full disk, in the words of the libraries that write there.
"""

from __future__ import annotations

import builtins
import errno
import os
from pathlib import Path
from typing import Any

POINT = os.environ.get("FULL_DISK")
_open = builtins.open


def full_open(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
    if not isinstance(file, int) and POINT in str(file) and set(mode) & set("wax+"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
    return _open(file, mode, *args, **options)


if POINT == "ckpt":
    import huggingface_hub
    from safetensors import SafetensorError

    def full_save(tensors: Any, folder: Any, **options: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    huggingface_hub.save_torch_state_dict = full_save
elif POINT == "state":
    import torch

    def full_torch_save(value: Any, file: Any, *args: Any, **options: Any) -> None:
        Path(file).write_bytes(b"PK")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

    torch.save = full_torch_save
elif POINT:
    builtins.open = full_open
    Path.open = lambda self, mode="r", *args, **options: full_open(self, mode, *args, **options)

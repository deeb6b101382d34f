"""When a kernel runs and when its torch reference does; triton where it is installed.

Kernels are written with `triton`, `tl` and `jit` from here, so that their files can be imported where triton is not installed.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import Any, Callable, Iterator

from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # CPU installs: the references are all that runs
    triton = tl = None

    def jit(function: Callable[..., Any]) -> Callable[..., Any]:
        return function


INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run in triton's interpreter, on the CPU as well: for tests. Read once, as triton itself does."""


def use_kernel(tensor: Tensor) -> bool:
    """Whether work on `tensor` is a kernel's: on CUDA, or in the interpreter."""
    return triton is not None and (tensor.is_cuda or INTERPRET)


_plain = False


def use_fused(tensor: Tensor) -> bool:
    """Whether the decoder and its head compute with fused kernels: on CUDA. In the interpreter the decoder stays the plain
    reference that kernels are compared with."""
    return triton is not None and tensor.is_cuda and not _plain


@contextmanager
def plain_torch() -> Iterator[None]:
    """Inside, the decoder and its head run in plain torch on a GPU too (backwards of what was computed inside included)."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before

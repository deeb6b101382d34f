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


_fused = False


def use_fused(tensor: Tensor) -> bool:
    """Whether the decoder and its head compute with fused kernels: on CUDA, where `set_fused` said so. In the interpreter the
    decoder stays the plain reference that kernels are compared with."""
    return _fused and triton is not None and tensor.is_cuda


def fused_is_on() -> bool:
    """What `set_fused` said last."""
    return _fused


def set_fused(on: bool) -> bool:
    """`training.fused_kernels`: from now on, in this process. Returns what was before."""
    global _fused
    before, _fused = _fused, on
    return before


@contextmanager
def fused_kernels(on: bool) -> Iterator[None]:
    """`set_fused`, inside (backwards of what was computed inside included)."""
    before = set_fused(on)
    try:
        yield
    finally:
        set_fused(before)

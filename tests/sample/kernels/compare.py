"""How near a kernel's result has to be. Not a test itself."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator

import torch
from torch import Tensor

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}
"""Largest relative error of rounding once."""


def assert_near(got: Tensor, want: Tensor, roundings: float = 3) -> None:
    """The error's norm stays below `roundings` of got's type, in units of want's norm; in float32, whose sums are taken in
    another order, below 16 times as many. An entry may be off by as much of the largest entry, 8 times."""
    assert got.shape == want.shape, (got.shape, want.shape)
    got64, want64 = got.double(), want.to(got.device).double()
    assert got64.isfinite().all()
    bound = roundings * ROUNDING[got.dtype] * (16 if got.dtype == torch.float32 else 1)
    error = got64 - want64
    assert error.norm() <= bound * want64.norm(), (error.norm() / want64.norm()).item()
    assert error.abs().max() <= 8 * bound * want64.abs().max(), (error.abs().max() / want64.abs().max()).item()


@contextmanager
def poisoned() -> Iterator[None]:
    """What `torch.empty` gives is full of NaN in here: an entry that a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)

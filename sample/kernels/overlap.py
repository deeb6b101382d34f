"""Kernels that start while the one before them still runs (programmatic dependent launch, Hopper and newer).

Between two dependent kernels of a graph the GPU idles for about a microsecond: with few sequences, whose kernels take some each, a
tenth of a forward. A kernel launched with `launch_options` may start as soon as every program of the one before has said so
(`begin`, `finish`) or is done; in `begin` it waits until all memory of the one before is written.

What a kernel does before `begin` must not read what kernels launched this way write: only weights, and what was written before the
forward (positions, plan, block table). A forward begins with the embedding, an ordinary kernel, so nothing of it starts earlier.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.kernels.launch import INTERPRET, jit, tl

MAX_ROWS = 32
"""Of a forward whose kernels overlap; with more rows nothing is gained."""
SMALL, LARGE = 2, 1
"""Where kernels of few and of many bytes let the next one start: 0 they do not overlap, 1 first thing, 2 at their end. One
sequence, 4B, a layer: (0, 0) 76.0 us, (1, 1) 75.0, (1, 2) 74.3, (2, 2) 73.7, (2, 1) 72.2; a few sequences: 5% less than (0, 0)."""


def launch_options(x: Tensor, num_rows: int, large: bool = False) -> dict[str, Any]:
    """Arguments of a kernel that has a parameter OVERLAP, for work on x."""
    overlap = LARGE if large else SMALL
    can = x.is_cuda and not INTERPRET and torch.cuda.get_device_capability(x.device)[0] >= 9
    if not (overlap and can and num_rows <= MAX_ROWS):
        return {"OVERLAP": 0}
    return {"OVERLAP": overlap, "launch_pdl": True}


@jit
def begin(OVERLAP: tl.constexpr):
    if OVERLAP == 1:
        tl.extra.cuda.gdc_launch_dependents()
    if OVERLAP > 0:
        tl.extra.cuda.gdc_wait()


@jit
def finish(OVERLAP: tl.constexpr):
    if OVERLAP == 2:
        tl.extra.cuda.gdc_launch_dependents()

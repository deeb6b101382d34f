"""Kernels that start while the one before them still runs (programmatic dependent launch, Hopper and newer).

Between two dependent kernels of a graph the GPU idles for about a microsecond, and a product that streams its weight needs some
more to get going: with few sequences that is a third of a forward. A kernel launched with `launch_options` may start as soon as
every program of the one before has begun; `begin` tells the next one to do the same and waits until all memory of the one before
is written. What a kernel does before `begin` must not read what other kernels write: weights are all that is safe.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sample.kernels.launch import INTERPRET, jit, tl

ENABLED = True
"""For measurements."""


def launch_options(x: Tensor) -> dict[str, Any]:
    """Arguments of a kernel that has a parameter OVERLAP, for work on x."""
    if not (ENABLED and x.is_cuda and not INTERPRET and torch.cuda.get_device_capability(x.device)[0] >= 9):
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}


@jit
def begin(OVERLAP: tl.constexpr):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

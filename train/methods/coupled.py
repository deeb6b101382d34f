"""Coupled masks (arXiv 2506.20639): every random mask together with its complement, so that a pair predicts each token once."""

from __future__ import annotations

from typing import Any

import numpy as np

from train.methods.random_masking import draw_masks, mask_slices
from train.methods.registry import METHODS, Method
from train.traces import TRACES, Grid, Response, Trace, lay_out


def with_complements(grid: Grid, masks: np.ndarray) -> np.ndarray:
    """Masks bool [T, W, B] -> [2T, W, B]: each, and behind it what it leaves of the response."""
    return np.stack([masks, grid.is_response & ~masks], axis=1).reshape(-1, *masks.shape[1:])


@TRACES.register("coupled_mask")
def coupled_mask_slices(response: Response, block_size: int, training: Any, generator: np.random.Generator) -> Trace:
    """`training.mask_times_per_sample` pairs; a mask has the even rank, its complement the odd one behind it."""
    grid = lay_out(response, block_size)
    return mask_slices(grid, with_complements(grid, draw_masks(grid, training, generator)), training.post_num)


METHODS.register("coupled", Method(trace="coupled_mask", objective="clipped", stage="rl"))

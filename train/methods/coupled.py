"""Coupled masks (arXiv 2506.20639): every random mask together with its complement, so that a pair predicts each token once."""

from __future__ import annotations

from typing import Any

import numpy as np

from train.methods.random_masking import draw_masks, mask_slices, with_complements
from train.methods.registry import METHODS, Method
from train.traces import TRACES, Response, Trace, lay_out


@TRACES.register("coupled_mask")
def coupled_mask_slices(response: Response, block_size: int, training: Any, generator: np.random.Generator) -> Trace:
    """`training.mask_times_per_sample` pairs; a mask has the even rank, its complement the odd one behind it."""
    grid = lay_out(response, block_size)
    masks = with_complements(grid.is_response, draw_masks(grid.is_response, training, generator))
    return mask_slices(grid, masks, training.post_num)


METHODS.register("coupled", Method(trace="coupled_mask", objective="clipped", stage="rl"))

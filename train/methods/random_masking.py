"""Random masks: the likelihood of a response under masks that sampling never saw. RL on them, and semi-autoregressive SFT."""

from __future__ import annotations

from typing import Any

import numpy as np

from train.methods.registry import METHODS, Method
from train.traces import TRACES, Grid, Response, Trace, lay_out, limit_pads


def draw_masks(grid: Grid, training: Any, generator: np.random.Generator) -> np.ndarray:
    """bool [T, W, B]: `training.mask_times_per_sample` masks over a response, in every block a ratio from [lower_p, upper_p]."""
    times, (num_blocks, block_size) = training.mask_times_per_sample, grid.is_response.shape
    ratio = generator.uniform(training.lower_p, training.upper_p, size=(times, num_blocks, 1))
    return (generator.random((times, num_blocks, block_size)) < ratio) & grid.is_response


def mask_slices(grid: Grid, hidden: np.ndarray, post_num: int | None) -> Trace:
    """The slices of masks bool [T, W, B] over a response: each hides and predicts its mask; one rank per mask."""
    times, num_blocks, block_size = hidden.shape
    rank, block = np.repeat(np.arange(times), num_blocks), np.tile(np.arange(num_blocks), times)
    hidden = hidden.reshape(-1, block_size)
    predicted = limit_pads(hidden & grid.trained[block], rank, grid.is_pad[block], post_num)
    return Trace(block + grid.first_block, hidden, predicted, rank).nonempty()


@TRACES.register("random_mask")
def random_mask_slices(response: Response, block_size: int, training: Any, generator: np.random.Generator) -> Trace:
    """`training.mask_times_per_sample` independent masks of the response."""
    grid = lay_out(response, block_size)
    return mask_slices(grid, draw_masks(grid, training, generator), training.post_num)


METHODS.register("random_masking", Method(trace="random_mask", objective="clipped", stage="rl"))
METHODS.register("semi-ar", Method(trace="random_mask", objective="likelihood", stage="sft"))

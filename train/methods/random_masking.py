"""Random masks: the likelihood of a response under masks that sampling never saw."""

from __future__ import annotations

from typing import Any

import numpy as np

from train.methods.registry import METHODS, Method
from train.traces import TRACES, Grid, Response, Trace, lay_out, limit_pads


def draw_masks(grid: Grid, training: Any, generator: np.random.Generator) -> np.ndarray:
    """bool [T, W, B]: `training.mask_times_per_sample` masks over a response. Every token is masked with the probability of its
    ratio, and the ratio is uniform in [lower_p, upper_p]: one for a block, a token or the response (`training.mask_ratio`)."""
    times, (num_blocks, block_size) = training.mask_times_per_sample, grid.is_response.shape
    shape = {"per_block": (num_blocks, 1), "per_token": (num_blocks, block_size), "per_response": (1, 1)}[training.mask_ratio]
    ratio = generator.uniform(training.lower_p, training.upper_p, size=(times, *shape))
    return (generator.random((times, num_blocks, block_size)) < ratio) & grid.is_response


def mask_slices(grid: Grid, hidden: np.ndarray, post_num: int | None, weight_by_ratio: bool = False) -> Trace:
    """The slices of masks bool [T, W, B] over a response: each hides and predicts its mask; one rank per mask.

    A block in which nothing is masked makes no slice: it costs no token and trains none.

    weight_by_ratio: slices weigh n/m, m the masked ones among the n response tokens of their block. With the ratio uniform in
    [0, 1] all m from 0 to n are equally likely, and the expectation of the weighted loss is that of the likelihood bound of masked
    diffusion (1/t for a ratio t, arXiv 2502.09992) times n/(n + 1). The counted ratio is taken and not the drawn one: given m, the
    mean of 1/t is (n + 1)/m, so it is the same bound with less variance, and never above n where t comes near 0.
    """
    times, num_blocks, block_size = hidden.shape
    rank, block = np.repeat(np.arange(times), num_blocks), np.tile(np.arange(num_blocks), times)
    hidden = hidden.reshape(-1, block_size)
    weight = None
    if weight_by_ratio:
        weight = grid.is_response.sum(axis=1)[block] / np.maximum(hidden.sum(axis=1), 1)
    predicted = limit_pads(hidden & grid.trained[block], rank, grid.is_pad[block], post_num)
    return Trace(block + grid.first_block, hidden, predicted, rank, weight).nonempty()


@TRACES.register("random_mask")
def random_mask_slices(response: Response, block_size: int, training: Any, generator: np.random.Generator) -> Trace:
    """`training.mask_times_per_sample` independent masks of the response."""
    grid = lay_out(response, block_size)
    return mask_slices(grid, draw_masks(grid, training, generator), training.post_num)


METHODS.register("random_masking", Method(trace="random_mask", objective="clipped", stage="rl"))

"""Random masks: the likelihood of a response under masks that sampling never saw; for RL, and as LLaDA and Dream are finetuned."""

from __future__ import annotations

from typing import Any

import numpy as np

from train.methods.registry import METHODS, Method
from train.traces import TRACES, Grid, Response, Trace, lay_out, limit_pads


def draw_masks(is_response: np.ndarray, training: Any, generator: np.random.Generator) -> np.ndarray:
    """bool [T, W, B]: `training.mask_times_per_sample` masks over the response tokens bool [W, B]. Every token is masked with the
    probability of its ratio, and the ratio is uniform in [lower_p, upper_p]: one for a block, a token or the response
    (`training.mask_ratio`; where a canvas is one block, per_block is per_response)."""
    times, (num_blocks, block_size) = training.mask_times_per_sample, is_response.shape
    shape = {"per_block": (num_blocks, 1), "per_token": (num_blocks, block_size), "per_response": (1, 1)}[training.mask_ratio]
    ratio = generator.uniform(training.lower_p, training.upper_p, size=(times, *shape))
    return (generator.random((times, num_blocks, block_size)) < ratio) & is_response


def with_complements(is_response: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Masks bool [T, W, B] -> [2T, W, B]: each, and behind it what it leaves of the response."""
    return np.stack([masks, is_response & ~masks], axis=1).reshape(-1, *masks.shape[1:])


def mask_slices(grid: Grid, hidden: np.ndarray, post_num: int | None, weight_by_ratio: bool = False) -> Trace:
    """The slices of masks bool [T, W, B] over a response: each hides and predicts its mask, and hides the tail of a canvas; one
    rank per mask.

    A block in which nothing is masked makes no slice: it costs no token and trains none.

    weight_by_ratio: slices weigh n/m, m the masked ones among the n response tokens of their block. With the ratio uniform in
    [0, 1] all m from 0 to n are equally likely, and the expectation of the weighted loss is that of the likelihood bound of masked
    diffusion (1/t for a ratio t, arXiv 2502.09992) times n/(n + 1). The counted ratio is taken and not the drawn one: given m, the
    mean of 1/t is (n + 1)/m, so it is the same bound with less variance, and never above n where t comes near 0.
    """
    times, num_blocks, block_size = hidden.shape
    rank, block = np.repeat(np.arange(times), num_blocks), np.tile(np.arange(num_blocks), times)
    is_tail = grid.is_tail[block]
    hidden = hidden.reshape(-1, block_size) & ~is_tail
    weight = None
    if weight_by_ratio:
        weight = (grid.is_response & ~grid.is_tail).sum(axis=1)[block] / np.maximum(hidden.sum(axis=1), 1)
    predicted = limit_pads(hidden & grid.trained[block], rank, grid.is_pad[block], post_num)
    return Trace(block + grid.first_block, hidden | is_tail, predicted, rank, weight).nonempty()


@TRACES.register("random_mask")
def random_mask_slices(response: Response, block_size: int, training: Any, generator: np.random.Generator) -> Trace:
    """`training.mask_times_per_sample` masks of the response, with `training.complementary_mask` each with its complement.

    A block whose draw is empty trains nothing with this mask (with `loss_weight_by_ratio` the sum is a likelihood bound just
    because of that, so it is not drawn again); with complements every token is trained by every pair.
    """
    grid = lay_out(response, block_size)
    masks = draw_masks(grid.is_response, training, generator)
    if training.complementary_mask:
        masks = with_complements(grid.is_response, masks)
    return mask_slices(grid, masks, training.post_num, training.loss_weight_by_ratio)


METHODS.register("random_masking", Method(trace="random_mask", objective="clipped", stage="any"))

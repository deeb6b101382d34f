"""Semi-autoregressive finetuning: random masks over given responses, block by block behind the clean text before them."""

from __future__ import annotations

from typing import Any

import numpy as np

from train.methods.coupled import with_complements
from train.methods.random_masking import draw_masks, mask_slices
from train.methods.registry import METHODS, Method
from train.traces import TRACES, Response, Trace, lay_out


@TRACES.register("semi_ar")
def semi_ar_slices(response: Response, block_size: int, training: Any, generator: np.random.Generator) -> Trace:
    """`training.mask_times_per_sample` masks of the response, with `training.complementary_mask` each with its complement.

    A block whose draw is empty trains nothing with this mask (with `loss_weight_by_ratio` the sum is a likelihood bound just
    because of that, so it is not drawn again); with complements every token is trained by every pair.
    """
    grid = lay_out(response, block_size)
    masks = draw_masks(grid, training, generator)
    if training.complementary_mask:
        masks = with_complements(grid, masks)
    return mask_slices(grid, masks, training.post_num, training.loss_weight_by_ratio)


METHODS.register("semi-ar", Method(trace="semi_ar", objective="likelihood", stage="sft"))

"""Semi-autoregressive finetuning: random masks over given responses, block by block behind the clean text before them."""

from __future__ import annotations

from typing import Any

import numpy as np

from train.methods.random_masking import draw_masks, random_mask_slices, with_complements
from train.methods.registry import METHODS, Method
from train.traces import TRACES, Response, Trace, lay_out, limit_pads


@TRACES.register("semi_ar")
def semi_ar_slices(response: Response, block_size: int, training: Any, generator: np.random.Generator) -> Trace:
    """The masks of `random_mask`, block by block of `training.block_size`, as semi-autoregressive sampling goes.

    Block attention: slices are such blocks already, and see the clean text before them alone. Full attention (`block_size` is the
    width of the canvas): `canvas_slices`. A canvas that is no wider than a block is one row under one mask either way.
    """
    if block_size == training.block_size:
        return random_mask_slices(response, block_size, training, generator)
    return canvas_slices(response, block_size, training, generator)


def canvas_slices(response: Response, width: int, training: Any, generator: np.random.Generator) -> Trace:
    """One slice of the whole canvas for every mask and block: clean before the block, the block under its drawn mask, masks behind
    it as far as the canvas goes. Each is a row of its own.

    Blocks count from the start of the response, as they do when a canvas is sampled; the last one may be shorter.
    T masks, W blocks, L response tokens.
    """
    grid, prompt, length, size = lay_out(response, width), len(response.prompt_ids), len(response.response_ids), training.block_size
    num_blocks = -(-length // size)
    is_response = np.arange(num_blocks * size).reshape(num_blocks, size) < length
    masks = draw_masks(is_response, training, generator)
    if training.complementary_mask:
        masks = with_complements(is_response, masks)
    trained, is_pad, is_tail = (x[0, prompt:] for x in (grid.trained, grid.is_pad, grid.is_tail))  # [L]
    block, block_of = np.arange(num_blocks)[:, None], np.arange(length) // size
    own = (block_of == block) & ~is_tail  # [W, L]
    drawn = masks.reshape(len(masks), 1, -1)[..., :length] & own  # [T, W, L]
    rank = np.arange(drawn.shape[0] * num_blocks)

    def rows(response_part: np.ndarray) -> np.ndarray:  # [T, W, L] -> [T * W, width]
        return np.pad(response_part.reshape(-1, length), ((0, 0), (prompt, 0)))

    predicted = limit_pads(rows(drawn & trained), rank, rows(np.broadcast_to(is_pad, drawn.shape)), training.post_num)
    weight = None
    if training.loss_weight_by_ratio:
        weight = (own.sum(axis=1) / np.maximum(drawn.sum(axis=2), 1)).ravel()
    hidden = rows(drawn | (block_of > block) | is_tail)
    return Trace(np.zeros(len(rank), np.int64), hidden, predicted, rank, weight).nonempty()


METHODS.register("semi-ar", Method(trace="semi_ar", objective="likelihood", stage="sft"))

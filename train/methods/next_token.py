"""Plain next-token finetuning, for families that predict a token at the position before it: Dream keeps what its autoregressive
start could do."""

from __future__ import annotations

from typing import Any

import numpy as np

from train.methods.registry import METHODS, Method
from train.traces import TRACES, Response, Trace, lay_out, limit_pads


@TRACES.register("next_token")
def next_token_slices(response: Response, block_size: int, training: Any, generator: np.random.Generator) -> Trace:
    """One row: every trained token, predicted by the clean token before it under the causal mask.

    Slices are of one token (`Method.block_size`), so that the clean sequence is causal (models/attention.py). The token at
    position 0 has none before it and is not trained.
    """
    assert block_size == 1, "the clean sequence is causal in blocks of one token"
    grid = lay_out(response, block_size)
    block = np.arange(len(grid.trained)) + grid.first_block
    rank = np.zeros(len(block), np.int64)
    predicted = limit_pads(grid.trained & (block > 0)[:, None], rank, grid.is_pad, training.post_num)
    return Trace(block, predicted, predicted, rank, reads_clean=True).nonempty()


METHODS.register("ar", Method(trace="next_token", objective="likelihood", stage="sft", block_size=1))

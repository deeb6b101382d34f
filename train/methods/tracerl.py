"""TraceRL (arXiv 2509.06949): learning along the very steps in which a response was unmasked; with data, SFT on given steps."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.errors import UserError
from train.methods.registry import METHODS, Method
from train.traces import NEVER, TRACES, Response, Trace, dense_rank, lay_out, limit_pads


@TRACES.register("trace")
def trace_slices(response: Response, block_size: int, training: Any, generator: np.random.Generator) -> Trace:
    """TraceRL (arXiv 2509.06949): along the steps in which the response was unmasked.

    Within a block (full attention: the response) the distinct steps are sorted and joined `training.shrink` at a time. The slice of
    (block, k) hides every token of rank >= k and predicts those of rank k: what the model saw, and what it chose, at that step.
    """
    if response.step_map is None:
        raise UserError("training.method: it needs a step map and the data has none: sample one, or choose semi-ar")
    grid = lay_out(response, block_size)
    steps = np.where(response.step_map > 0, response.step_map, NEVER).astype(np.int64)
    # Prompt tokens are step 0, before all others: rank 0 in their block, taken off again.
    steps = grid.lay(steps, 0)
    has_prompt = ~grid.is_response.all(axis=1, keepdims=True)
    distinct = np.where(grid.is_response, dense_rank(steps) - has_prompt, -1)
    rank = np.where(distinct >= 0, distinct // training.shrink, -1)  # [W, B], -1 = prompt
    revealed = (steps != NEVER) & grid.is_response
    num_ranks = int(rank.max()) + 1
    k = np.arange(num_ranks)[None, :, None]
    hidden = rank[:, None] >= k  # [W, R, B]
    predicted = (rank[:, None] == k) & (revealed & grid.trained)[:, None]
    block = np.broadcast_to(np.arange(len(rank))[:, None], hidden.shape[:2])
    slice_rank = np.broadcast_to(k[..., 0], hidden.shape[:2])
    exists = predicted.any(axis=2)
    hidden, predicted, block, slice_rank = hidden[exists], predicted[exists], block[exists], slice_rank[exists]
    predicted = limit_pads(predicted, slice_rank, grid.is_pad[block], training.post_num)
    return Trace(block + grid.first_block, hidden, predicted, slice_rank).nonempty()


METHODS.register("TraceRL", Method(trace="trace", objective="clipped", stage="rl", follows_steps=True))
METHODS.register("trace", Method(trace="trace", objective="likelihood", stage="sft"))

"""From a response to its slices: what is masked, and which tokens each slice trains.

A slice is one block as the model saw it at one step. A trace method (a file in train/methods) is a function of one response that
says, for every slice, which block it is, which tokens are hidden and which are predicted; train/documents.py and train/packing.py
do the rest. For full-attention families prompt and response are one block (train/layout.py), so a slice is the whole canvas at one
step. Nothing here imports torch.

Shapes: S slices, B block size, W = number of blocks that hold a response token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable

import numpy as np

from common.errors import UserError
from common.registry import Registry

NEVER = np.iinfo(np.int64).max
"""Step of a token that was never revealed: later than every step, so it is a mask in every slice."""


@dataclass
class Response:
    """One response as training sees it, whatever it came from (a rollout, an SFT record)."""

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    """Whole blocks together with the prompt: (prompt + response) % block size == 0."""
    num_trained: int
    """Tokens from the start of the response that may be trained; those behind are context."""
    step_map: np.ndarray | None = None
    """1-based step that revealed each response token, 0 = never; None where the method does not ask for one."""
    is_pad: np.ndarray | None = None
    """Padding inside the trained part (SFT data, padded rollouts): `post_num` limits how many of them a row trains."""
    hides_tail: bool = False
    """Whether random masks hide all that stands behind the trained part (full attention, where it would tell the end)."""

    def __post_init__(self) -> None:
        assert self.step_map is None or len(self.step_map) == len(self.response_ids)
        assert 0 <= self.num_trained <= len(self.response_ids)


def sampled_response(rollout: Any, max_response: int, block_size: int, fill_id: int, is_cut: bool = False) -> Response:
    """What training keeps of a rollout (or of an SFT record made from one): all tokens as context, for they were visible while
    their block was denoised, and the first `max_response` up to the stop for training. is_cut: no context behind these either.

    Where training blocks are larger than those of sampling, the last one may reach behind the response: there stands what sampling
    never got to, so it is a mask at every step (`fill_id` where a mask method shows it).
    """
    kept = slice(max_response if is_cut else None)
    response_ids, step_map = rollout.response_ids[kept], rollout.step_map
    num_fill = -(len(rollout.prompt_ids) + len(response_ids)) % block_size
    steps = None if step_map is None else np.asarray(step_map[kept] + [0] * num_fill, dtype=np.int64)
    return Response(
        prompt_ids=np.asarray(rollout.prompt_ids, dtype=np.int64),
        response_ids=np.asarray(response_ids + [fill_id] * num_fill, dtype=np.int64),
        num_trained=min(rollout.num_response, max_response),
        step_map=steps,
    )


@dataclass
class Trace:
    """The slices of one response. Rows are slices, columns the positions of their block."""

    block: np.ndarray
    """[S] block of each slice, counted from position 0 of the prompt."""
    hidden: np.ndarray
    """bool [S, B] positions that the model sees as masks."""
    predicted: np.ndarray
    """bool [S, B] positions that this slice trains: a subset of the hidden ones."""
    rank: np.ndarray
    """[S] the k of the pair (response, k): rank of the slice's collapsed step among the distinct ones of its block. All slices of
    one rank are one row of the reference."""
    weight: np.ndarray = field(default=None)  # type: ignore[assignment]
    """float [S] factor on the loss of the slice's tokens (1/ratio weighting); ones where the method has none."""
    reads_clean: bool = False
    """Whether each token is predicted by the clean token before it (plain next-token): slices then take no place in a pack."""

    def __post_init__(self) -> None:
        if self.weight is None:
            self.weight = np.ones(len(self.block))
        assert not (self.predicted & ~self.hidden).any(), "a visible token cannot be predicted"

    def select(self, keep: np.ndarray) -> Trace:
        """The slices where `keep` (bool or indices over S)."""
        return Trace(
            self.block[keep], self.hidden[keep], self.predicted[keep], self.rank[keep], self.weight[keep], self.reads_clean
        )

    def nonempty(self) -> Trace:
        return self.select(self.predicted.any(axis=1))


TraceMethod = Callable[[Response, int, Any, np.random.Generator], Trace]
"""(response, block size, the config's `training` section, generator keyed on seed, step, task and sample) -> Trace."""

TRACES: Registry[TraceMethod] = Registry("trace method")


@dataclass
class Grid:
    """A response laid on the block grid of absolute positions; entries outside the response are prompt."""

    first_block: int
    is_response: np.ndarray
    """bool [W, B]"""
    trained: np.ndarray
    """bool [W, B] response tokens that may be trained."""
    is_pad: np.ndarray
    """bool [W, B]"""
    is_tail: np.ndarray
    """bool [W, B] response tokens that every random mask hides."""

    def lay(self, values: np.ndarray, fill: Any) -> np.ndarray:
        """Per-response-token values [L] -> [W, B], `fill` on prompt positions."""
        out = np.full(self.is_response.shape, fill, dtype=values.dtype)
        out[self.is_response] = values
        return out


def lay_out(response: Response, block_size: int) -> Grid:
    """The blocks that hold response tokens. Raises UserError where prompt and response do not fill whole blocks."""
    prompt, length = len(response.prompt_ids), len(response.response_ids)
    if (prompt + length) % block_size:
        raise UserError(
            f"a response ends inside a block (prompt {prompt} + response {length} tokens, block size {block_size}): pad it"
        )
    first = prompt // block_size
    num_blocks = (prompt + length) // block_size - first
    position = np.arange(num_blocks * block_size).reshape(num_blocks, block_size) + first * block_size - prompt
    is_response = position >= 0
    trained = is_response & (position < response.num_trained)
    grid = Grid(first, is_response, trained, np.zeros_like(is_response), is_response & ~trained & response.hides_tail)
    if response.is_pad is not None:
        grid.is_pad = grid.lay(response.is_pad, False)
    return grid


def dense_rank(values: np.ndarray) -> np.ndarray:
    """Rank of each entry among the distinct values of its row, from 0. [W, B] -> [W, B]."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    is_new = np.concatenate([np.zeros((len(values), 1), bool), ordered[:, 1:] != ordered[:, :-1]], axis=1)
    ranks = np.empty_like(values)
    np.put_along_axis(ranks, order, is_new.cumsum(axis=1), axis=1)
    return ranks


def limit_pads(predicted: np.ndarray, rank: np.ndarray, is_pad: np.ndarray, post_num: int | None) -> np.ndarray:
    """Of every row (all slices of one rank, in order of position) train only the first `post_num` pads; None: all of them.

    predicted, is_pad bool [S, B], rank [S]; slices of one rank stand in block order.
    """
    if post_num is None or not is_pad.any():
        return predicted
    predicted = predicted.copy()
    for k in np.unique(rank):
        rows = np.flatnonzero(rank == k)
        pads = predicted[rows] & is_pad[rows]
        too_many = pads & (pads.ravel().cumsum().reshape(pads.shape) > post_num)
        predicted[rows] &= ~too_many
    return predicted

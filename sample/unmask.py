"""Which masked positions of a block to reveal: pure functions over all sequences at once, without a host sync.

Shapes: S sequences, B positions of their current block. A strategy is a function here and a line in sample/registry.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sample.canvas_schedule import split

if TYPE_CHECKING:
    from sample.engine import SamplingSettings


@dataclass
class Candidates:
    """What a strategy may look at. Only masked positions are ever revealed; values at the others mean nothing."""

    masked: Tensor
    """bool [S, B]."""
    score: Tensor
    """float32 [S, B]: the target (sample/sampling.py); higher is revealed earlier."""
    entropy: Tensor
    """float32 [S, B], nats."""
    count: Tensor
    """int64 [S]: n(s), how many the schedule reveals in this forward. More than remain masked means all."""
    least: int | None = None
    """How many are revealed at least by a strategy that finds their number itself; None: `count`."""
    ranking: Tensor | None = None
    """float32 [S, B]: what positions are ranked by, where that is not the score that thresholds see (`alg_temp`)."""


def schedule(block_size: int, num_steps: int, device: torch.device | str = "cpu") -> Tensor:
    """int64 [num_steps]: `block_size` split into `num_steps` integers."""
    return torch.tensor(split(block_size, num_steps), device=device)


def rank(score: Tensor, masked: Tensor) -> Tensor:
    """int64 [S, B]: how many masked positions of its row come before each; by descending score, ties from left to right.

    All pairs, not a sort: B is small, and this is one fused comparison.
    """
    position = torch.arange(score.shape[1], device=score.device)
    one, other = score[:, :, None], score[:, None, :]
    before = (other > one) | ((other == one) & (position < position[:, None]))
    return (before & masked[:, None, :]).sum(-1)


def place(c: Candidates) -> Tensor:
    """int64 [S, B]: how many masked positions come before each in the order in which they are to be revealed."""
    return rank(c.score if c.ranking is None else c.ranking, c.masked)


def low_confidence_static(c: Candidates, s: SamplingSettings) -> Tensor:
    """The n(s) of highest score."""
    return c.masked & (place(c) < c.count[:, None])


def low_confidence_dynamic(c: Candidates, s: SamplingSettings) -> Tensor:
    """All whose score is above the threshold and the n(s), or `least`, of highest score."""
    least = c.count[:, None] if c.least is None else c.least
    return c.masked & ((c.score > s.threshold) | (place(c) < least))


def sequential(c: Candidates, s: SamplingSettings) -> Tensor:
    """The first n(s)."""
    return c.masked & (c.masked.cumsum(1) <= c.count[:, None])


def entropy_bounded(c: Candidates, s: SamplingSettings) -> Tensor:
    """In ascending entropy the largest set with sum H - max H <= entropy_bound, at least one (arXiv 2505.24857).

    With H ascending, the set that ends at a position is bounded by the sum of the entropies that come before it.
    """
    order = rank(-c.entropy, c.masked)
    before = (order[:, None, :] < order[:, :, None]) & c.masked[:, None, :]
    spent = torch.where(before, c.entropy[:, None, :], 0.0).sum(-1)
    return c.masked & ((spent <= s.entropy_bound) | (order == 0))

"""From logits to tokens: temperature, top-k, top-p, Gumbel-max, and the numbers recorded with every token.

Shapes: M masked rows, V vocabulary. Forbidden ids come in with logits of -inf: they are never drawn and carry no probability.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable

import torch
from torch import Tensor

from models.decoder import Decoder
from models.logits import scaled_logits
from sample import noise
from sample.registry import TARGETS

if TYPE_CHECKING:
    from sample.engine import SamplingSettings

LOWEST = torch.finfo(torch.float32).min
LOGITS_AT_A_TIME = 2**26
"""Entries of the largest [rows, vocabulary] tensor: 256 MiB, of several. The paged engine has a limit of its own."""


@dataclass
class Distribution:
    """What a target may look at: the token distribution of every masked row."""

    logprobs: Tensor
    """float32 [M, V]: before top-k/top-p, or after them where `rollout.confidence` is filtered (-inf: removed); under the
    temperature, or at 1 (`Family.scores_unscaled`)."""
    tokens: Tensor
    """int64 [M]: the tokens that were drawn."""
    entropy: Tensor
    """float32 [M], nats, of `logprobs`."""
    keys: Tensor
    """int32 [M, 2]: the rows' noise keys."""


@dataclass
class Draws:
    """One drawn token per masked row, each [M]."""

    tokens: Tensor
    logprobs: Tensor
    """Of the token under the temperature (1 where it is 0), before top-k/top-p."""
    entropy: Tensor
    """Of the same distribution, nats."""
    score: Tensor
    """The target, by which positions are ranked."""
    score_entropy: Tensor
    """Entropy of the distribution that the target was computed on."""


def entropy_of(logprobs: Tensor) -> Tensor:
    """Entropy [M], nats, of log-probabilities [M, V]; -inf counts as probability 0."""
    return -(logprobs.exp() * logprobs.clamp(min=LOWEST)).sum(-1)


def kept(logprobs: Tensor, top_k: int, top_p: float, top_p_first: bool = False) -> Tensor:
    """bool [M, V]: the ids that top-k, then top-p leave. top_k 0 and top_p 1 are off.

    Top-p works on the renormalised survivors of top-k (with `top_p_first` on all ids) and keeps the smallest prefix, in descending
    order, that reaches the mass: an id goes when the mass before it already exceeds top_p. The most probable id stays always.
    """
    vocab_size = logprobs.shape[1]
    if 0 < top_k < vocab_size:
        values, ids = logprobs.topk(top_k, dim=-1)
    else:
        values, ids = logprobs.sort(dim=-1, descending=True, stable=True)
    keep = values > -torch.inf
    if top_p < 1:
        p = values.exp() if top_p_first else values.softmax(-1)
        keep &= p.cumsum(-1) - p <= top_p
    keep[:, 0] = True
    return torch.zeros_like(logprobs, dtype=torch.bool).scatter_(1, ids, keep)


def draw(logits: Tensor, keys: Tensor, s: SamplingSettings) -> Draws:
    """Draw one token per row of `logits` [M, V]: float32, divided by the temperature, forbidden ids at -inf (models/logits.py).

    `keys` int32 [M, 2] are the rows' noise keys (sample/noise.py); greedy settings do not use them.
    """
    logprobs = logits.log_softmax(-1)
    entropy = entropy_of(logprobs)
    keep = kept(logprobs, s.top_k, s.top_p, s.top_p_first) if s.top_k > 0 or s.top_p < 1 else None
    choice = logprobs if keep is None else logprobs.masked_fill(~keep, -torch.inf)
    if s.is_greedy:
        tokens = choice.argmax(-1)
    else:
        tokens = (choice + noise.gumbel(keys, logits.shape[1])).argmax(-1)
    seen = logprobs
    if s.score_temperature != s.logits_temperature:
        seen = (logits * (s.logits_temperature / s.score_temperature)).log_softmax(-1)
    if s.confidence == "filtered" and keep is not None:
        seen = seen.masked_fill(~keep, -torch.inf).log_softmax(-1)
    scored = Distribution(seen, tokens, entropy if seen is logprobs else entropy_of(seen), keys)
    score = TARGETS.get(s.target, "rollout.target")(scored)
    return Draws(tokens, logprobs.gather(1, tokens[:, None])[:, 0], entropy, score, scored.entropy)


def draw_rows(decoder: Decoder, hidden: Tensor, keys: Tensor, s: SamplingSettings, forbidden: Tensor | None) -> Draws:
    """One token per row of `hidden` [M, D]. `keys` as of `draw`; `forbidden` int64: ids without probability."""

    def draw_some(rows: Tensor, keys: Tensor, first: int) -> Draws:
        return draw(decoder.lm_head(rows, lambda x, weight: scaled_logits(x, weight, s.logits_temperature, forbidden)), keys, s)

    return in_parts(draw_some, hidden, keys, decoder.config.vocab_size)


def in_parts(
    draw_some: Callable[[Tensor, Tensor, int], Draws],
    hidden: Tensor,
    keys: Tensor,
    vocab_size: int,
    logits_at_a_time: int | None = None,
) -> Draws:
    """`draw_some` of so many rows of hidden [M, D] and keys [M, 2] at a time that their logits stay small; it is also told the
    number of its first row. logits_at_a_time: entries, LOGITS_AT_A_TIME where it is None."""
    at_a_time = max(1, (logits_at_a_time or LOGITS_AT_A_TIME) // vocab_size)
    firsts = range(0, len(hidden), at_a_time)
    parts = [draw_some(*some) for some in zip(hidden.split(at_a_time), keys.split(at_a_time), firsts)]
    if len(parts) == 1:
        return parts[0]
    return Draws(*(torch.cat([getattr(part, name) for part in parts]) for name in Draws.__annotations__))


def confidence(d: Distribution) -> Tensor:
    """Probability of the drawn token."""
    return d.logprobs.gather(1, d.tokens[:, None])[:, 0].exp()


def margin_confidence(d: Distribution) -> Tensor:
    """Probability of the most probable id less that of the second."""
    first, second = d.logprobs.topk(2, dim=-1).values.exp().unbind(-1)
    return first - second


def neg_entropy(d: Distribution) -> Tensor:
    """Entropy, nats, negated."""
    return -d.entropy


def random_score(d: Distribution) -> Tensor:
    """Uniform on (0, 1), drawn anew at every forward."""
    return noise.uniform(d.keys, torch.full((1,), noise.RANDOM_SCORE_ID, device=d.keys.device))[:, 0]

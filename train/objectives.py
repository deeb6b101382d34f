"""Objectives: what an update minimises, as a weighted sum over predictions. A new one is one function and one line in
train/registry.py.

Global normalisation: a weight is 1 over numbers that are known before the step (counts over all micro-batches and ranks), so the
loss of the step is the plain sum of the losses of its parts, however they are cut:

    loss = sum over micro-batches, ranks and predictions of weight_k * loss_k
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable

import numpy as np
import torch
from torch import Tensor

from train.documents import Predictions
from train.registry import OBJECTIVES  # noqa: F401  (plugins register theirs by this name)

CLAMP = 10.0
"""Bound on log-ratios before they are exponentiated."""


@dataclass
class ObjectiveInput:
    """Everything per prediction, each [M], float32. Only `logprobs` carries a gradient."""

    logprobs: Tensor
    """Under the weights that are updated."""
    old_logprobs: Tensor
    """Under the weights before the first update on this batch (or the engine's)."""
    kl_logprobs: Tensor
    """Under the policy that the KL term holds to: old, or a frozen reference."""
    engine_logprobs: Tensor
    """As recorded while sampling."""
    advantages: Tensor
    weights: Tensor
    kl_weights: Tensor


@dataclass
class Measures:
    """Numbers for the log."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    """Sums over predictions; divided there by their number over the step."""
    extremes: dict[str, Tensor] = field(default_factory=dict)
    """Largest values over predictions (names that end in _max) and least ones (_min)."""


@dataclass
class ObjectiveOutput:
    loss: Tensor
    """Scalar, the weighted sum."""
    measures: Measures = field(default_factory=Measures)


Objective = Callable[[ObjectiveInput, Any], ObjectiveOutput]
"""(input, the config's `training` section) -> output."""


def kl_estimate(logprobs: Tensor, other: Tensor, k3: bool) -> Tensor:
    """Per-token estimate of KL(policy || other) from tokens of the policy; d = logprobs - other.

    k3 = exp(-d) - 1 + d (never negative), k1 = d.
    """
    d = logprobs - other
    return torch.exp((-d).clamp(-CLAMP, CLAMP)) - 1 + d if k3 else d


def clipped(x: ObjectiveInput, training: Any) -> ObjectiveOutput:
    """The clipped surrogate of TraceRL (arXiv 2509.06949). Minimise

        -sum w min(rho A, clip(rho, 1-eps, 1+eps_high) A) + beta sum w KL

    rho = exp(clamp(logp - logp_old, -10, 10)). With `importance_cap` c each token is weighted by min(pi_old / pi_engine, c): the
    rollouts were drawn by the engine, whose numbers differ from the trainer's by rounding, or by an approximate cache.
    """
    log_ratio = (x.logprobs - x.old_logprobs).clamp(-CLAMP, CLAMP)
    ratio = log_ratio.exp()
    eps_high = training.eps if training.eps_high is None else training.eps_high
    bounded = ratio.clamp(1 - training.eps, 1 + eps_high)
    surrogate = torch.minimum(ratio * x.advantages, bounded * x.advantages)
    if training.importance_cap is not None:
        surrogate = surrogate * (x.old_logprobs - x.engine_logprobs).clamp(-CLAMP, CLAMP).exp().clamp(max=training.importance_cap)
    kl = kl_estimate(x.logprobs, x.kl_logprobs, training.use_kl_estimator_k3)
    policy_loss = -(x.weights * surrogate).sum()
    loss = policy_loss + training.beta * (x.kl_weights * kl).sum() if training.beta else policy_loss
    with torch.no_grad():
        is_clipped = (ratio * x.advantages > bounded * x.advantages).float()
        return ObjectiveOutput(
            loss,
            Measures(
                {"kl": kl.sum(), "clip_fraction": is_clipped.sum(), "ratio": ratio.sum()},
                {"ratio_max": ratio.max(), "ratio_min": ratio.min()},
            ),
        )


def likelihood(x: ObjectiveInput, training: Any) -> ObjectiveOutput:
    """Supervised finetuning: minimise -sum w logp."""
    nll = -x.logprobs
    return ObjectiveOutput((x.weights * nll).sum(), Measures({"nll": nll.detach().sum()}))


def token_weights(
    p: Predictions, loss_weighting: str, longest_response: int, max_response_length: int, attention: str = "block"
) -> np.ndarray:
    """Weight of every prediction of one optimizer step (all ranks, all micro-batches), float64 [M].

    N pairs (response, k) that have a trained token (the reference's rows), n the tokens of one, R responses that have one, tau the
    tokens of one slice, L `longest_response`:

        reference   1 / (L N), full attention: 1 / (n N)
        step        1 / (|tau| R)        response   1 / (tokens of the response * R)
        token       1 / M                constant   1 / (R * max_response_length)
    """
    if not len(p):
        return np.zeros(0)
    num_responses = len(np.unique(p.response))

    def size_of_group(key: np.ndarray) -> np.ndarray:
        _, group, counts = np.unique(key, return_inverse=True, return_counts=True)
        return counts[group]

    if loss_weighting == "reference":
        row_length = size_of_group(pairs(p)) if attention == "full" else longest_response
        weight = np.ones(len(p)) / (row_length * num_pairs(p))
    elif loss_weighting == "step":
        weight = 1 / (size_of_group(p.slice) * num_responses)
    elif loss_weighting == "response":
        weight = 1 / (size_of_group(p.response) * num_responses)
    elif loss_weighting == "token":
        weight = np.full(len(p), 1 / len(p))
    elif loss_weighting == "constant":
        weight = np.full(len(p), 1 / (num_responses * max_response_length))
    else:
        raise AssertionError(f"the schema let loss_weighting {loss_weighting!r} through")
    return weight * p.weight


def kl_weights(p: Predictions, weights: np.ndarray, loss_weighting: str, attention: str = "block") -> np.ndarray:
    """Weight of every prediction's KL, float64 [M], beside the `weights` of its loss: the same, but 1 / N with `reference` and full
    attention, where the KL of a row is summed and not divided."""
    if loss_weighting == "reference" and attention == "full" and len(p):
        return p.weight / num_pairs(p)
    return weights


def pairs(p: Predictions) -> np.ndarray:
    """int [M]: which pair (response, k) each prediction is of."""
    return p.response * (p.rank.max(initial=0) + 1) + p.rank


def num_pairs(p: Predictions) -> int:
    """Pairs (response, k) that have a prediction."""
    return len(np.unique(pairs(p)))

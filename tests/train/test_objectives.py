"""The clipped surrogate and the KL estimates by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from train.objectives import ObjectiveInput, clipped, kl_estimate, likelihood
from train.optim import schedule_factor


def training(**changes):
    return SimpleNamespace(
        **{"eps": 0.2, "eps_high": None, "beta": 0.0, "use_kl_estimator_k3": True, "importance_cap": None, **changes}
    )


def make(log_ratios, advantages, weights=None, engine_gap=0.0):
    old = torch.full((len(log_ratios),), -1.0)
    new = (old + torch.tensor(log_ratios)).requires_grad_()
    w = torch.ones(len(log_ratios)) if weights is None else torch.tensor(weights)
    return ObjectiveInput(new, old, old, old - engine_gap, torch.tensor(advantages), w, w)


def test_ratios_are_clipped_only_where_that_lowers_the_surrogate():
    x = make([math.log(1.5), math.log(1.5), math.log(0.5), math.log(0.5)], [1.0, -1.0, 1.0, -1.0])
    out = clipped(x, training())
    # min(1.5, 1.2), min(-1.5, -1.2), min(0.5, 0.8), min(-0.5, -0.8)
    assert out.loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8))
    assert out.measures.sums["clip_fraction"] == 2
    assert out.measures.extremes["ratio_max"].item() == pytest.approx(1.5)
    assert out.measures.extremes["ratio_min"].item() == pytest.approx(0.5)
    out.loss.backward()
    assert x.logprobs.grad.tolist() == pytest.approx([0.0, 1.5, -0.5, 0.0])


def test_the_upper_clip_may_differ():
    out = clipped(make([math.log(1.5)], [1.0]), training(eps_high=0.3))
    assert out.loss.item() == pytest.approx(-1.3)


def test_kl_estimates():
    d = math.log(2.0)
    assert kl_estimate(torch.tensor(d), torch.tensor(0.0), k3=True).item() == pytest.approx(0.5 - 1 + d)
    assert kl_estimate(torch.tensor(d), torch.tensor(0.0), k3=False).item() == pytest.approx(d)
    loss = clipped(make([d], [0.0], weights=[0.5]), training(beta=0.1)).loss
    assert loss.item() == pytest.approx(0.1 * 0.5 * (d - 0.5))


def test_truncated_importance_weights():
    # The engine thought the token half as likely as the trainer does: weight 2, cut to 1.5.
    out = clipped(make([0.0], [1.0], engine_gap=math.log(2.0)), training(importance_cap=1.5))
    assert out.loss.item() == pytest.approx(-1.5)


def test_likelihood_is_the_weighted_negative_log_likelihood():
    assert likelihood(make([0.0, 0.5], [0.0, 0.0], weights=[1.0, 2.0]), training()).loss.item() == pytest.approx(1 + 2 * 0.5)


def test_schedules():
    assert [schedule_factor("linear", p, 0.1) for p in (0, 0.5, 1)] == pytest.approx([1, 0.55, 0.1])
    assert [schedule_factor("cosine", p, 0.0) for p in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert schedule_factor("constant", 0.7) == 1

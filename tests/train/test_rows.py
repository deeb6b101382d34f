"""`training.max_rows_per_response`: over all draws, loss and gradient are on average those of all rows, exactly."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

import train.rl
from common.records import ScoredRollout
from tests.train.steps import (
    error,
    kept_gradients,
    requests_of_every_remainder,
    rl_config,
    sample,
    scored,
    tiny_model,
)
from train.documents import draw_rows, number, rows_of_any, split_rows
from train.policy import policy_trainer
from train.rl import PolicyUpdate, trace_generator

WEIGHTINGS = ("reference", "step", "response", "token", "constant")
MAX_ROWS = 2


def few_rollouts(family: str) -> list[ScoredRollout]:
    """Two responses with three rows and one with two, of several tokens each."""
    requests = requests_of_every_remainder(4, seed=2)
    rollouts = scored(sample(tiny_model(7, family), requests, block_size=4, max_tokens=8, stop_ids=()))[:3]
    for rollout, num_rows in zip(rollouts, (3, 3, 2), strict=True):
        rollout.step_map = (1 + np.arange(len(rollout.step_map)) % num_rows).tolist()
    return rollouts


def update_of(accelerator: Any, family: str, *overrides: str) -> PolicyUpdate:
    settings = ["rollout.max_token=8", "training.beta=0.1", "training.kl_to=reference", *overrides]
    config = rl_config(*settings, family=family)
    model = tiny_model(7, family)
    trainer = policy_trainer(model, config, accelerator, 1.0)
    return PolicyUpdate(trainer, config, model.fill_id, reference=tiny_model(8, family))


class Chosen:
    """In the place of a generator: takes the rows that it was told."""

    def __init__(self, rows: tuple[int, ...]) -> None:
        self.rows = rows

    def choice(self, ranks: np.ndarray, size: int, replace: bool) -> np.ndarray:
        assert size == len(self.rows) and not replace
        return ranks[list(self.rows)]


@pytest.mark.parametrize(
    "family, weighting", [("llada", "reference"), ("dream", "response"), ("sdar", "reference"), ("sdar", "token")]
)
def test_loss_and_gradient_are_on_average_those_of_all_rows(accelerator, monkeypatch, family, weighting):
    rollouts = few_rollouts(family)

    def run(max_rows: int | None, draw: tuple = ()) -> tuple[float, dict[str, torch.Tensor]]:
        update = update_of(
            accelerator, family, f"training.loss_weighting={weighting}", f"training.max_rows_per_response={max_rows or 'null'}"
        )
        chosen = {r.task_id: Chosen(rows) for r, rows in zip(rollouts, draw)}
        monkeypatch.setattr(train.rl, "trace_generator", lambda seed, step, rollout, *which: chosen.get(rollout.task_id))
        with kept_gradients() as steps:
            metrics = update(rollouts, step=1)
        return metrics["train/loss"], steps[0]

    loss, gradients = run(None)
    draws = list(itertools.product(itertools.combinations(range(3), MAX_ROWS), repeat=2))  # the third response has two rows
    drawn = [run(MAX_ROWS, draw) for draw in draws]
    assert len({round(d[0], 6) for d in drawn}) == len(draws) == 9, "the draws differ"
    assert np.mean([d[0] for d in drawn]) == pytest.approx(loss, abs=1e-6)
    means = {name: sum(d[1][name] for d in drawn) / len(drawn) for name in gradients}
    assert error(means, gradients) < 2e-6
    assert error(drawn[0][1], gradients) > 1e-2


@pytest.mark.parametrize("family", ["llada", "sdar"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_are_on_average_those_of_all_rows(accelerator, family, weighting):
    """Of every weighting and in every one of several updates: the mean over all draws of what each token weighs, KL and loss."""
    update = update_of(accelerator, family, f"training.loss_weighting={weighting}")
    documents = update.documents(few_rollouts(family), 1)
    predictions = number(documents)
    for part in split_rows(documents, 2, np.random.default_rng(3)):
        for of_all in update.weights(part, predictions, longest=8):
            draws = list(itertools.product(*(range(d.num_rows) for d in part)))
            mean = np.zeros(len(predictions))
            for draw in draws:
                chosen = {d.response: Chosen((row,)) for d, row in zip(part, draw, strict=True)}
                drawn, factors = draw_rows(part, 1, lambda document: chosen[document.response])  # noqa: B023
                for document, factor in zip(drawn, factors, strict=True):
                    assert document.num_rows == 1
                    mean[document.numbers] += of_all[document.numbers] * factor / len(draws)
            assert mean == pytest.approx(of_all, rel=1e-9)


def test_draws_are_even_and_the_same_again(accelerator):
    rollouts = few_rollouts("llada")
    update = update_of(accelerator, "llada")
    documents = update.documents(rollouts, 1)
    number(documents)

    def ranks(step: int, *which: int) -> list[tuple[int, ...]]:
        drawn, _ = draw_rows(documents, MAX_ROWS, lambda d: trace_generator(5, step, rollouts[d.response], *which))
        return [tuple(np.unique(d.trace.rank).tolist()) for d in drawn]

    assert ranks(1, 1) == ranks(1, 1)
    assert len({tuple(ranks(step, 1)) for step in range(1, 20)}) > 3 and len({tuple(ranks(1, n)) for n in range(1, 20)}) > 3
    first = [ranks(step, 1)[0] for step in range(1, 601)]
    counts = [first.count(pair) for pair in itertools.combinations(range(3), MAX_ROWS)]
    assert sum(counts) == 600 and min(counts) > 150, "each pair of rows is as likely"


def test_only_what_is_drawn_is_computed(accelerator):
    """Several epochs of several updates: the forward for old log-probs is over the rows that some of them draws."""
    overrides = ["training.num_updates_per_step=null", "training.num_train_epochs=2", "training.batch_size_lm=2"]
    update = update_of(accelerator, "llada", "training.max_rows_per_response=1", *overrides)
    rollouts = few_rollouts("llada")
    documents = update.documents(rollouts, 1)
    number(documents)
    seen = []
    original = update.trainer.outputs
    update.trainer.outputs = lambda documents, *args: seen.append(documents) or original(documents, *args)
    metrics = update(rollouts, step=1)
    assert metrics["train/num_updates"] == 4, "three rows are trained in an epoch, two in an update"
    assert len(seen) == 2, "the old policy's and the frozen one's"
    for own in seen:
        assert sum(d.num_rows for d in own) <= 8 == sum(d.num_rows for d in documents)
        assert all(np.isin(d.numbers, documents[d.response].numbers).all() for d in own)


def test_rows_of_any_part():
    from tests.train.test_packing import random_documents

    documents, _ = random_documents(4, count=5, seed=9)
    number(documents)
    parts = split_rows(documents, 3, np.random.default_rng(0))
    together = rows_of_any(documents, parts)
    assert [d.numbers.tolist() for d in together] == [d.numbers.tolist() for d in documents]
    first = rows_of_any(documents, parts[:1])
    assert sorted(n for d in first for n in d.numbers.tolist()) == sorted(n for d in parts[0] for n in d.numbers.tolist())

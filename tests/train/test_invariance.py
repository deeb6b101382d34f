"""One optimizer step is the same step however it is cut up: micro-batches, packs, order, recomputation, chunks of the head."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import train.loop
from common.records import ScoredRollout
from models.lora import prepare_for_training
from tests.train.steps import (
    FULL_ATTENTION,
    error,
    kept_gradients,
    requests_of_every_remainder,
    rl_config,
    sample,
    scored,
    tiny_model,
    weights,
)
from train.loop import StepResult, merge_results
from train.packing import assign
from train.policy import policy_trainer
from train.rl import PolicyUpdate
from train.shared_value import SharedValueUpdate

TOLERANCE = 1e-6  # of the tensor's largest entry, float32
WHOLE = 100_000
MAX_TOKENS = {"sdar": 14, **dict.fromkeys(FULL_ATTENTION, 12)}


@pytest.fixture(scope="module")
def rollouts() -> list[ScoredRollout]:
    requests = requests_of_every_remainder(4, seed=8, num_samples=4)
    settings = dict(block_size=4, max_tokens=14, strategy="low_confidence_dynamic", threshold=0.4)
    return scored(sample(tiny_model(7), requests, **settings))


def run_update(
    accelerator: Any, rollouts: list[ScoredRollout], *overrides: str, budget: int = WHOLE, family: str = "sdar"
) -> dict[str, Any]:
    """One RL update from the same weights."""
    settings = [f"rollout.max_token={MAX_TOKENS[family]}", "training.beta=0.1", f"training.max_tokens_per_microbatch={budget}"]
    config = rl_config(*settings, *overrides, family=family)
    model = tiny_model(7, family)
    prepare_for_training(model, config.training.lora, "base", config.training.seed)
    trainer = policy_trainer(model, config, accelerator, 1.0)
    value = SharedValueUpdate(trainer, config) if config.model.value_shared else None
    update = PolicyUpdate(trainer, config, model.fill_id, value=value)
    with kept_gradients() as steps:
        metrics = update(rollouts, step=1)
    (gradients,) = steps
    num_packs = len(update.trainer.micro_batches(update.documents(rollouts, 1)))
    return {"metrics": metrics, "gradients": gradients, "weights": weights(model), "num_packs": num_packs}


def check_same(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    loss = ours["metrics"]["train/loss"], theirs["metrics"]["train/loss"]
    found = [abs(loss[0] - loss[1]) / max(1.0, abs(loss[1]))]
    found += [error(ours[kind], theirs[kind]) for kind in ("gradients", "weights")]
    print(f"{ours['num_packs']} micro-batches: loss {found[0]:.1e}, gradient {found[1]:.1e}, weights {found[2]:.1e}")
    assert max(found) < tolerance, found
    assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-5, abs=2e-6)


@pytest.fixture(scope="module")
def whole(accelerator, rollouts) -> dict[str, Any]:
    """All in one micro-batch, nothing recomputed."""
    result = run_update(accelerator, rollouts)
    assert result["num_packs"] == 1
    start = weights(tiny_model(7))
    assert all(not torch.equal(start[name], value) for name, value in result["weights"].items()), "a weight did not move"
    return result


METHODS = {
    "random_masking": ["training.method=random_masking", "training.mask_times_per_sample=3"],
    "coupled": ["training.method=coupled", "training.mask_times_per_sample=2"],
    "DiPO": ["training.method=DiPO", "training.eps_high=0.28"],
    "a larger block": ["training.block_size=8", "training.loss_weighting=reference"],
    "value_shared": ["model.value_shared=true"],
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method(accelerator, rollouts, method):
    """In one micro-batch, in packs of whole documents, and with documents split by slices."""
    rollouts = [replace(r, reward=r.advantage) for r in rollouts]  # what a value model sees
    whole = run_update(accelerator, rollouts, *METHODS[method])
    assert whole["num_packs"] == 1
    packs = run_update(accelerator, rollouts[::-1], *METHODS[method], budget=200)
    assert 1 < packs["num_packs"] < len(rollouts)
    check_same(packs, whole)
    parts = run_update(accelerator, rollouts, *METHODS[method], budget=24)
    assert parts["num_packs"] > len(rollouts)
    for one in (parts, whole):
        one["metrics"].pop("train/num_tokens")  # prefixes are repeated, and counted
    check_same(parts, whole, tolerance=3e-6)  # a sum of up to 77 gradients in float32


OF_A_CANVAS = {
    "TraceRL": ["training.loss_weighting=reference"],
    "random_masking": ["training.method=random_masking", "training.mask_times_per_sample=3", "training.loss_weighting=reference"],
    "coupled": ["training.method=coupled", "training.mask_times_per_sample=2"],
    "DiPO, drawn rows": ["training.method=DiPO", "training.max_rows_per_response=3"],
    "value_shared": ["model.value_shared=true", "training.max_rows_per_response=4"],
    "LoRA": ["training.lora.rank=2", "training.lora.target_modules=[all-linear]", "training.shrink=2"],
}


@pytest.fixture(scope="module")
def canvases() -> dict[str, list[ScoredRollout]]:
    settings = dict(block_size=4, max_tokens=12, strategy="low_confidence_dynamic", threshold=0.4, stop_early=True)
    requests = requests_of_every_remainder(4, seed=8, num_samples=2)
    rollouts = {family: scored(sample(tiny_model(7, family), requests, **settings)) for family in FULL_ATTENTION}
    return {family: [replace(r, reward=r.advantage) for r in own] for family, own in rollouts.items()}


@pytest.mark.parametrize("family, method", [(f, m) for f in FULL_ATTENTION for m in OF_A_CANVAS])
def test_every_method_on_canvases(accelerator, canvases, family, method):
    """In one micro-batch, in a few with documents split over them, in another order, and every slice in one of its own."""
    rollouts, overrides = canvases[family], OF_A_CANVAS[method]
    whole = run_update(accelerator, rollouts, *overrides, family=family)
    assert whole["num_packs"] == 1
    start = weights(tiny_model(7, family))
    still = {name for name, value in whole["weights"].items() if name in start and torch.equal(start[name], value)}
    assert bool(still) == (method == "LoRA"), f"{still} did not move"
    packs = run_update(accelerator, rollouts[::-1], *overrides, budget=200, family=family)
    assert 1 < packs["num_packs"] < 20
    check_same(packs, whole)
    slices = run_update(accelerator, rollouts, *overrides, budget=8, family=family)
    assert slices["num_packs"] > 20 and slices["metrics"]["train/num_tokens"] == whole["metrics"]["train/num_tokens"]
    check_same(slices, whole, tolerance=3e-6)  # a sum of up to 90 gradients in float32


@pytest.fixture(scope="module")
def budget_of_eight(accelerator, rollouts) -> int:
    config = rl_config("rollout.max_token=14")
    model = tiny_model(7)
    documents = PolicyUpdate(policy_trainer(model, config, accelerator, 1.0), config, model.fill_id).documents(rollouts, 1)
    return next(budget for budget in range(1000, 40, -1) if len(assign(documents, budget, 1)[0]) == 8)


def test_eight_micro_batches(accelerator, rollouts, whole, budget_of_eight):
    result = run_update(accelerator, rollouts, budget=budget_of_eight)
    assert result["num_packs"] == 8
    check_same(result, whole)


@pytest.mark.parametrize("budget", [8, 24])
def test_micro_batches_smaller_than_a_document(accelerator, rollouts, whole, budget):
    """Documents are split by slices; at 8 tokens every slice stands alone with its prefix (a sum of 145 gradients in float32)."""
    result = run_update(accelerator, rollouts, budget=budget)
    assert result["num_packs"] > len(rollouts)
    assert result["metrics"].pop("train/num_tokens") > whole["metrics"]["train/num_tokens"], "prefixes are repeated, and counted"
    theirs = {**whole, "metrics": {k: v for k, v in whole["metrics"].items() if k != "train/num_tokens"}}
    check_same(result, theirs, tolerance=3e-6 if budget == 8 else TOLERANCE)


def test_other_packs(accelerator, rollouts, whole):
    check_same(run_update(accelerator, rollouts[::-1], budget=300), whole)


@pytest.mark.parametrize("budget", [WHOLE, 300, 60])
def test_shared_prompts(accelerator, rollouts, whole, budget):
    """The four responses of a task share its prompt's whole blocks: in one micro-batch, in packs, and cut by slices.

    Other packs leave the sums within a document as they are, to the last bit; here these are taken in another order too, so every
    log-prob is rounded anew. In float64 nothing of the difference is left (tests/train/test_packing.py).
    """
    result = run_update(accelerator, rollouts, "training.shared_prompts=always", budget=budget)
    saved = result["metrics"].pop("train/num_shared_tokens")
    theirs = {**whole, "metrics": {**whole["metrics"]}}
    assert saved > 0 and theirs["metrics"].pop("train/num_shared_tokens") == 0
    tokens, without = (one["metrics"].pop("train/num_tokens") for one in (result, theirs))
    if budget != 60:
        assert tokens + saved == without
    check_same(result, theirs, tolerance=3e-6)


def test_packs_with_filler(accelerator, rollouts, whole, monkeypatch):
    monkeypatch.setattr(train.loop, "build_pack", lambda d, mask, round_to, *rest: train.packing.build_pack(d, mask, 128, *rest))
    check_same(run_update(accelerator, rollouts, budget=300), whole)


def test_recomputed_activations_and_small_chunks(accelerator, rollouts, whole):
    overrides = ["training.gradient_checkpointing_enable=true", "training.head_chunk=3"]
    check_same(run_update(accelerator, rollouts, *overrides, budget=400), whole)


def test_old_log_probs_by_a_forward_of_their_own(accelerator, rollouts, whole):
    """With one update they are those of the update itself."""
    check_same(run_update(accelerator, rollouts, "training.old_logprobs=trainer", budget=200), whole)


@pytest.mark.parametrize("budget", [WHOLE, 200])
def test_adamw_moves_the_weights_once_per_step(accelerator, rollouts, budget):
    """Three RL steps by torch's formula written out, with clipping, decay of matrices alone, and warm-up."""
    rate, beta1, beta2, eps, decay, max_norm = 3e-3, 0.8, 0.95, 1e-4, 0.1, 0.02
    config = rl_config(
        "optimizer.name=adamw",
        f"optimizer.params.learning_rate={rate}",
        f"optimizer.params.beta1={beta1}",
        f"optimizer.params.beta2={beta2}",
        f"optimizer.params.epsilon={eps}",
        f"optimizer.params.weight_decay={decay}",
        f"training.max_grad_norm={max_norm}",
        f"training.max_tokens_per_microbatch={budget}",
        "lr_scheduler.scheduler=linear",
        "lr_scheduler.params.warmup_steps=2",
        "lr_scheduler.params.min_lr_scale=0",
        "experiment.total_step=4",
        "rollout.max_token=14",
    )
    model = tiny_model(7)
    update = PolicyUpdate(policy_trainer(model, config, accelerator, 1.0), config, model.fill_id)
    calls = count_calls(update.trainer.optimizer, "step")
    by_hand = {name: w.double() for name, w in weights(model).items()}
    mean, square = ({name: torch.zeros_like(w) for name, w in by_hand.items()} for _ in range(2))
    rates = [rate * 0.5 * 1.0, rate * 1.0 * 0.75, rate * 1.0 * 0.5]  # warm-up, then what is left of the run
    with kept_gradients() as gradients:
        for t, expected_rate in enumerate(rates, start=1):
            metrics = update(rollouts, step=t)
            assert len(calls) == len(gradients) == update.trainer.num_steps == t
            assert metrics["train/learning_rate"] == pytest.approx(expected_rate)
            norm = sum(float(g.double().square().sum()) for g in gradients[-1].values()) ** 0.5
            assert metrics["train/gradient_norm"] == pytest.approx(norm, rel=1e-5) and norm > max_norm
            for name, w in by_hand.items():
                g = gradients[-1][name].double() * max_norm / (norm + 1e-6)
                mean[name] = beta1 * mean[name] + (1 - beta1) * g
                square[name] = beta2 * square[name] + (1 - beta2) * g.square()
                direction = mean[name] / (1 - beta1**t) / ((square[name] / (1 - beta2**t)).sqrt() + eps)
                w -= expected_rate * (direction + (decay if w.ndim == 2 else 0.0) * w)
            moved = weights(model)
            assert max(float((moved[name] - w).abs().max() / w.abs().max()) for name, w in by_hand.items()) < TOLERANCE


def count_calls(target: Any, name: str) -> list[None]:
    calls, original = [], getattr(target, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return original(*args, **kwargs)

    setattr(target, name, counted)
    return calls


def test_merged_metrics_are_means_extremes_and_sums():
    """A third update was not taken: its tokens alone count."""
    nan = math.nan
    first = StepResult(1.0, 2.0, 0.1, {"entropy": 1.0, "gap/logprob_mean": 0.25}, {"ratio_max": 1.5, "ratio_min": 0.5}, 10, 100)
    second = StepResult(3.0, 4.0, 0.3, {"entropy": 2.0, "gap/logprob_mean": 0.75}, {"ratio_max": 1.2, "ratio_min": 0.1}, 30, 50)
    third = StepResult(nan, nan, 0.5, {"entropy": nan}, {"ratio_max": nan}, 10, 50)
    assert merge_results([first, third, second]) == pytest.approx(
        {
            "train/loss": 2.0,
            "train/gradient_norm": 3.0,
            "train/learning_rate": 0.2,
            "train/entropy": 1.5,
            "gap/logprob_mean": 0.5,
            "train/ratio_max": 1.5,
            "train/ratio_min": 0.1,
            "train/num_updates": 3.0,
            "train/num_skipped_updates": 1.0,
            "train/num_tokens": 200.0,
            "train/num_shared_tokens": 0.0,
            "train/num_predictions": 50.0,
        }
    )
    assert merge_results([third], "value") == {
        "value/num_updates": 1,
        "value/num_skipped_updates": 1,
        "value/num_tokens": 50,
        "value/num_shared_tokens": 0,
        "value/num_predictions": 10,
    }

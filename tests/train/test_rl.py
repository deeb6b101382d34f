"""The whole update of an RL step against a plain loop over (response, block, step): one forward each, formulas written out."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.records import ScoredRollout
from models.attention import masked_attention
from models.checkpoint import Pretrained, load_pretrained, save_pretrained
from models.lora import lora_layers, prepare_for_training
from tests.train.steps import (
    FULL_ATTENTION,
    error,
    forget_accelerator,
    kept_gradients,
    requests_of_every_remainder,
    rl_config,
    sample,
    scored,
    tiny_model,
)
from train.policy import policy_trainer
from train.rl import PolicyUpdate, gather_tokens
from train.run import Run

TOLERANCE = 1e-5
BLOCK_SIZE, TEMPERATURE, EPS, EPS_HIGH, BETA, IMPORTANCE_CAP, MAX_TRAINED = 4, 0.8, 0.2, 0.3, 0.05, 1.1, 9
MAX_TOKENS = {"sdar": 11, **dict.fromkeys(FULL_ATTENTION, 12)}
WEIGHTINGS = ("reference", "step", "response", "token", "constant")


class UpdateWithGivenOld(PolicyUpdate):
    """Its old log-probs are given, per response token, so that ratios are not 1."""

    given: list[list[float]]

    def before_update(self, documents: Any, predictions: Any, *args: Any, **kwargs: Any):
        tables = super().before_update(documents, predictions, *args, **kwargs)
        tables.old_logprobs = gather_tokens(self.given, predictions)
        return tables


@pytest.fixture(scope="module")
def rollouts_of():
    return functools.cache(make_rollouts)


@pytest.fixture(scope="module")
def rollouts(rollouts_of) -> list[ScoredRollout]:
    return rollouts_of("sdar")


def make_rollouts(family: str) -> list[ScoredRollout]:
    """Nine responses, several tokens at a step, stops inside blocks; engine log-probs that differ a little from the trainer's."""
    settings = dict(block_size=BLOCK_SIZE, max_tokens=MAX_TOKENS[family], temperature=TEMPERATURE)
    requests = requests_of_every_remainder(BLOCK_SIZE, seed=5, num_samples=2)
    out = scored(sample(tiny_model(3, family), requests, strategy="low_confidence_dynamic", threshold=0.3, **settings))[:9]
    assert any(r.num_response > MAX_TRAINED for r in out) and any(r.finish == "stop" for r in out)
    for seed, rollout in enumerate(out):
        rollout.logprobs = noisy(rollout, seed + 1000, 0.2)
    return out


def noisy(rollout: ScoredRollout, seed: int, scale: float) -> list[float]:
    return (np.array(rollout.logprobs) + np.random.default_rng(seed).normal(0, scale, len(rollout.logprobs))).tolist()


# -- by hand


def num_trained(rollout: ScoredRollout) -> int:
    return min(rollout.num_response, MAX_TRAINED)


def cut(rollout: ScoredRollout) -> ScoredRollout:
    """A canvas as far as it is trained."""
    lists = {name: getattr(rollout, name)[:MAX_TRAINED] for name in ("response_ids", "step_map", "logprobs", "entropy")}
    return replace(rollout, **lists, num_response=num_trained(rollout))


def slices(rollout: ScoredRollout, shrink: int, size: int) -> list[tuple[int, int, list[int], list[int]]]:
    """(block start, k, masked positions, trained positions tau) for every block and every `shrink` of its distinct steps."""
    prompt, out = len(rollout.prompt_ids), []
    total = prompt + len(rollout.response_ids)
    for start in range(prompt // size * size, total, size):
        step = {p: rollout.step_map[p - prompt] for p in range(max(start, prompt), start + size)}
        distinct = sorted(set(step.values()))
        for k, first in enumerate(range(0, len(distinct), shrink)):
            joined = distinct[first : first + shrink]
            masked = [p for p in step if step[p] >= joined[0]]
            tau = [p for p in step if step[p] in joined and p - prompt < num_trained(rollout)]
            if tau:
                out.append((start, k, masked, tau))
    return out


def forward(
    model: Pretrained, rollout: ScoredRollout, start: int, masked: list[int], tau: list[int], block_size: int = BLOCK_SIZE
) -> Tensor:
    """Log-probs of the tokens at `tau` from one forward over all that stands up to the end of the block."""
    ids = torch.tensor(rollout.prompt_ids + rollout.response_ids)[: start + block_size]
    seen = ids.clone()
    seen[masked] = model.mask_id
    block = torch.arange(len(ids)) // block_size
    hidden = model.decoder(seen, torch.arange(len(ids)), masked_attention(block[:, None] >= block[None, :]))
    logits = model.decoder.lm_head(hidden[[p - model.family.logit_shift for p in tau]]).double() / TEMPERATURE
    logits[:, model.forbidden_ids] = -math.inf
    return logits.log_softmax(-1).gather(1, ids[tau, None])[:, 0]


def loss_by_hand(
    model: Pretrained, reference: Pretrained | None, rollouts: list[ScoredRollout], old: list[list[float]], training: Any
) -> tuple[Tensor, dict[str, float]]:
    """(loss, what the log should say)."""
    is_canvas = model.family.attention == "full"
    rollouts = [cut(r) if is_canvas else r for r in rollouts]
    sizes = [len(r.prompt_ids + r.response_ids) if is_canvas else BLOCK_SIZE for r in rollouts]
    per_response = [slices(r, training.shrink, size) for r, size in zip(rollouts, sizes, strict=True)]
    num_responses = len(rollouts)
    num_tokens = sum(num_trained(r) for r in rollouts)
    num_pairs = sum(len({k for _, k, _, _ in own}) for own in per_response)
    longest = max(num_trained(r) for r in rollouts)
    loss, kls, clipped, ratios = torch.zeros((), dtype=torch.float64), [], [], []
    for n, (rollout, own) in enumerate(zip(rollouts, per_response, strict=True)):
        for start, _, masked, tau in own:
            weight = {
                "reference": 1 / ((len(tau) if is_canvas else longest) * num_pairs),
                "step": 1 / (len(tau) * num_responses),
                "response": 1 / (num_trained(rollout) * num_responses),
                "token": 1 / num_tokens,
                "constant": 1 / (num_responses * MAX_TRAINED),
            }[training.loss_weighting]
            kl_weight = 1 / num_pairs if is_canvas and training.loss_weighting == "reference" else weight
            logprobs = forward(model, rollout, start, masked, tau, sizes[n])
            with torch.no_grad():
                frozen = None if reference is None else forward(reference, rollout, start, masked, tau, sizes[n])
            for j, position in enumerate(tau):
                offset, advantage, new = position - len(rollout.prompt_ids), rollout.advantage, logprobs[j]
                ratio = (new - old[n][offset]).exp()
                inside = ratio.clamp(1 - EPS, 1 + EPS_HIGH)
                surrogate = torch.minimum(ratio * advantage, inside * advantage)
                if training.importance_cap is not None:
                    surrogate = surrogate * min(math.exp(old[n][offset] - rollout.logprobs[offset]), training.importance_cap)
                d = new - (old[n][offset] if frozen is None else frozen[j])
                kl = (-d).exp() - 1 + d if training.use_kl_estimator_k3 else d
                loss = loss - weight * surrogate + BETA * kl_weight * kl
                kls.append(kl.item())
                clipped.append(bool(ratio * advantage > inside * advantage))
                ratios.append(ratio.item())
    assert len(ratios) == num_tokens
    log = {"train/kl": np.mean(kls), "train/clip_fraction": np.mean(clipped), "train/ratio": np.mean(ratios)}
    return loss, {**log, "train/ratio_max": max(ratios), "train/ratio_min": min(ratios)}


CASES = [("sdar", w, shrink, n % 2 == 0, n % 3 == 0) for n, (shrink, w) in enumerate(itertools.product((1, 3), WEIGHTINGS))]
CASES += [(f, w, 1 + 2 * (n % 2), n % 3 == 0, n % 4 == 0) for n, (f, w) in enumerate(itertools.product(FULL_ATTENTION, WEIGHTINGS))]


@pytest.mark.parametrize("family, weighting, shrink, k3, to_reference", CASES)
def test_loss_and_gradient_equal_one_forward_per_step(accelerator, rollouts_of, family, weighting, shrink, k3, to_reference):
    rollouts = rollouts_of(family)
    has_cap = k3 and shrink == 1 and family == "sdar"  # a canvas that is cut has no log-probs of sampling
    config = rl_config(
        f"training.loss_weighting={weighting}",
        f"training.shrink={shrink}",
        f"training.use_kl_estimator_k3={str(k3).lower()}",
        f"training.beta={BETA}",
        f"training.eps={EPS}",
        f"training.eps_high={EPS_HIGH}",
        f"training.importance_cap={IMPORTANCE_CAP if has_cap else 'null'}",
        f"rollout.temperature={TEMPERATURE}",
        f"rollout.max_token={MAX_TOKENS[family]}",
        f"training.max_gen_length={MAX_TRAINED}",
        "training.max_tokens_per_microbatch=150",
        "training.head_chunk=5",
        family=family,
    )
    model, reference = tiny_model(3, family), tiny_model(4, family) if to_reference else None
    old = [noisy(r, seed, 0.3) for seed, r in enumerate(rollouts)]
    loss, log = loss_by_hand(model, reference, rollouts, old, config.training)
    names, parameters = zip(*model.decoder.named_parameters(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))

    update = UpdateWithGivenOld(policy_trainer(model, config, accelerator, TEMPERATURE), config, model.fill_id, reference)
    update.given = old
    assert len(update.trainer.micro_batches(update.documents(rollouts, 1))) > 1
    with kept_gradients() as steps:
        metrics = update(rollouts, step=1)
    assert abs(metrics["train/loss"] - loss.item()) < TOLERANCE * max(1.0, abs(loss.item()))
    assert error(steps[0], gradients) < TOLERANCE
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    assert metrics["train/gradient_norm"] == pytest.approx(norm, rel=1e-5)
    assert 0.1 < log["train/clip_fraction"] < 0.9
    assert {key: metrics[key] for key in log} == pytest.approx(log, abs=1e-5)
    print(f"loss {abs(metrics['train/loss'] - loss.item()):.1e}, gradient {error(steps[0], gradients):.1e} of the largest entry")


def test_several_updates_hold_to_the_log_probs_before_the_first(accelerator):
    """Old log-probs and the engine gap are of the weights that sampled, though each update moves them."""
    model = tiny_model(3)
    rollouts = scored(sample(model, requests_of_every_remainder(BLOCK_SIZE, seed=6), block_size=BLOCK_SIZE, max_tokens=8))
    config = rl_config("training.num_updates_per_step=3", "rollout.max_token=8")
    update = PolicyUpdate(policy_trainer(model, config, accelerator, 1.0), config, model.fill_id)
    with kept_gradients() as steps:
        metrics = update(rollouts, step=1)
    assert len(steps) == update.trainer.num_steps == metrics["train/num_updates"] == 3
    assert metrics["gap/logprob_max"] < 1e-4, "the gap must not see the updates in between"
    assert metrics["train/ratio_max"] > 1.001, "and the ratio must"
    assert metrics["train/num_predictions"] == sum(r.num_response for r in rollouts)
    # Now the weights are others than those that sampled.
    assert update(rollouts, step=2)["gap/logprob_max"] > 1e-3


def test_a_budget_far_below_a_document_is_warned_of_once(accelerator, capsys):
    """A prompt and a response of two blocks each, a step per token: 8 slices of 4 tokens behind 12 clean ones are 44 tokens. Alone,
    each slice of the third block stands behind 8 of them and each of the fourth behind 12: 4 * 12 + 4 * 16 = 112."""
    model, steps = tiny_model(3), [1, 2, 3, 4] * 2
    rollout = ScoredRollout(
        task_id="a",
        sample=0,
        prompt_ids=[5] * 8,
        response_ids=[6] * 8,
        step_map=steps,
        logprobs=[-1.0] * 8,
        entropy=[1.0] * 8,
        num_response=8,
        finish="length",
        num_forwards=8,
        weights_version=0,
        block_size=BLOCK_SIZE,
        advantage=1.0,
    )
    said = "warning: training.max_tokens_per_microbatch={}: the longest document has 44 tokens and is cut into 8 parts that repeat"
    for budget, warned in [(4, 1), (40, 0)]:
        config = rl_config(f"training.max_tokens_per_microbatch={budget}", "rollout.max_token=8")
        update = PolicyUpdate(policy_trainer(model, config, accelerator, 1.0), config, model.fill_id)
        capsys.readouterr()
        for step in (1, 2):
            update([rollout], step=step)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == warned
        assert all(line.startswith(f"{said.format(budget)} its text, 2.5 times its cost") for line in lines)


@pytest.mark.parametrize("rank", [2, None])
def test_the_reference_is_what_the_policy_starts_from(tmp_path, rank):
    """The start is an adapter: it stands beside the weights in both, or is merged into them in both."""
    forget_accelerator()
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_pretrained(tiny_model(3), dict(tiny_model(3).decoder.named_parameters()), base)
    model = load_pretrained(str(base), "sdar", torch.float32)
    prepare_for_training(model, rl_config("training.lora.rank=2").training.lora, str(base), seed=0)
    with torch.no_grad():
        for layer in lora_layers(model.decoder).values():
            for pair in layer.adapters.values():
                pair.B.normal_()
    save_pretrained(model, dict(model.decoder.named_parameters()), adapter)
    config = rl_config(f"model.pretrained_model={adapter}", f"experiment.project={tmp_path / 'run'}", "training.lora.rank=2")
    config.training.lora.rank = rank
    job = Run(config, 4, 1.0)
    job.close()
    reference = job.load_reference()
    forget_accelerator()
    assert (reference.adapter is None) == (rank is None)
    policy, frozen = job.model.decoder.state_dict(), reference.decoder.state_dict()
    assert policy.keys() == frozen.keys() and all(torch.equal(policy[name], frozen[name]) for name in policy)

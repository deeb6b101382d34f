"""With the weights unchanged the trainer's log-prob of every revealed token is the engine's, whatever was sampled and how."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from common import dist
from common.records import Rollout
from models.checkpoint import Pretrained
from sample.registry import TARGETS, UNMASKING
from tests.train.steps import (
    FULL_ATTENTION,
    STOP_IDS,
    forget_accelerator,
    requests_of_every_remainder,
    rl_config,
    sample,
    scored,
    tiny_model,
)
from tests.train.test_rl import TEMPERATURE, forward
from train import gap
from train.documents import number
from train.layout import Layout
from train.packing import build_pack
from train.policy import Policy, policy_trainer
from train.rl import PolicyUpdate, gather_tokens

TOLERANCE = 1e-4  # what is promised, nats; what float32 gives is about 1e-6
ALL = 1000  # longer than any response here
BLOCK_SIZES = (1, 2, 4, 8, 16)

MODELS: list[dict[str, Any]] = [
    {},
    {"attention_bias": True, "num_key_value_heads": 4},
    {"tie_word_embeddings": True, "num_hidden_layers": 3},
    {"num_key_value_heads": 1, "hidden_size": 48, "head_dim": 8, "vocab_size": 28},
]
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 0.0},
    {"temperature": 1.3, "top_p": 0.8, "confidence": "filtered"},
    {"temperature": 0.7, "greedy": True},
    {"temperature": 0.5, "top_k": 12, "top_p": 0.9},
    {"temperature": 2.0, "steps_per_block": 1},
]


def trained(model: Pretrained, rollouts: list[Rollout], temperature: float, max_response: int = ALL):
    """(predictions, log-probs, entropies) of the trainer, by the way that an update goes."""
    size = rollouts[0].block_size
    training = SimpleNamespace(method="TraceRL", block_size=size, max_gen_length=max_response, shrink=1, post_num=None)
    layout = Layout(model.family.attention, training)
    documents = [layout.document(index, layout.sampled(r, model.fill_id), None) for index, r in enumerate(rollouts)]
    predictions = number(documents)
    pack = build_pack(documents, model.mask_id, logit_shift=model.family.logit_shift)
    assert torch.equal(pack.prediction, torch.arange(len(predictions)))
    with torch.no_grad():
        logprobs, entropy = Policy(model.decoder, model.forbidden_ids, temperature)(pack)
    return predictions, logprobs.numpy(), entropy.numpy()


def gaps(model: Pretrained, rollouts: list[Rollout], temperature: float, max_response: int = ALL) -> tuple[float, float]:
    """Largest differences of log-prob and of entropy; every token up to the stop must have been compared, once."""
    predictions, logprobs, entropy = trained(model, rollouts, temperature, max_response)
    compared = sorted(zip(predictions.response.tolist(), predictions.offset.tolist(), strict=True))
    lengths = [min(r.num_response, max_response) for r in rollouts]
    assert compared == [(i, offset) for i, length in enumerate(lengths) for offset in range(length)]
    logprob_gap = np.abs(logprobs - gather_tokens([r.logprobs for r in rollouts], predictions)).max()
    entropy_gap = np.abs(entropy - gather_tokens([r.entropy for r in rollouts], predictions)).max()
    return float(logprob_gap), float(entropy_gap)


@pytest.fixture(scope="module")
def models():
    """By block size and kind."""
    built = {}

    def get(block_size: int, kind: int) -> Pretrained:
        if (block_size, kind) not in built:
            built[block_size, kind] = tiny_model(10 * block_size + kind, block_size=block_size, **MODELS[kind])
        return built[block_size, kind]

    return get


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_strategy_and_target(block_size, models, record_property):
    """Prompts of every remainder; model, temperature, filters, length and schedule change from one combination to the next."""
    largest, finishes, stops_inside, prompt_inside = (0.0, 0.0), set(), 0, 0
    steps_seen = set()
    for case, (strategy, target) in enumerate(itertools.product(UNMASKING, TARGETS)):
        settings = {
            "strategy": strategy,
            "target": target,
            "block_size": block_size,
            "max_tokens": 2 * block_size + 1 + case % 5,  # a multiple of the block now and then
            "threshold": 0.3,
            "entropy_bound": 2.5,
            "steps_per_block": None if case % 3 else max(1, block_size // 3),
            "seed": case,
            **SAMPLING[case % len(SAMPLING)],
        }
        model = models(block_size, case % len(MODELS))
        # Fewer slots than sequences: some are admitted while others are under way.
        rollouts = sample(model, requests_of_every_remainder(block_size, seed=case), max_active=block_size, **settings)
        found = gaps(model, rollouts, settings["temperature"])
        assert max(found) < TOLERANCE, f"{settings}: log-prob {found[0]:.1e}, entropy {found[1]:.1e}"
        largest = tuple(map(max, largest, found))
        finishes |= {r.finish for r in rollouts}
        stops_inside += sum(r.finish == "stop" and r.num_response < len(r.response_ids) for r in rollouts)
        prompt_inside += sum(len(r.prompt_ids) % block_size > 0 for r in rollouts)
        steps_seen |= {n for r in rollouts for n in np.unique(r.step_map, return_counts=True)[1].tolist()}
    print(f"block size {block_size}: largest difference of log-probs {largest[0]:.1e}, of entropies {largest[1]:.1e}")
    record_property("largest_gap", largest)
    # The cases were there: both ends, tokens behind a stop, prompts that end inside a block, several tokens at a step.
    assert finishes == {"stop", "length"}
    assert block_size == 1 or stops_inside and prompt_inside and len(steps_seen) > 1


CANVASES: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5, "steps": 5},
    {"temperature": 0.0, "stop_early": True},
    {"temperature": 1.3, "top_p": 0.8, "confidence": "filtered", "alg_temp": 0.3},
    {"temperature": 0.5, "top_k": 12, "top_p": 0.9, "stop_early": True, "steps": 3},
]


@pytest.mark.parametrize("family", FULL_ATTENTION)
def test_every_strategy_and_target_on_a_canvas(family, record_property):
    """As above, where nothing is cached: blocks as long as the canvas and shorter, the last one not whole, masks that stay."""
    model, largest, finishes, behind, several = tiny_model(5, family), (0.0, 0.0), set(), 0, 0
    for case, (strategy, target) in enumerate(itertools.product(UNMASKING, TARGETS)):
        settings = {
            "strategy": strategy,
            "target": target,
            "block_size": (4, 5, 16)[case % 3],
            "max_tokens": 12 + case % 2,
            "threshold": 0.3,
            "entropy_bound": 2.5,
            "seed": case,
            "stop_ids": (1, 3, 5, 9, 17, 20),
            "pad_id": model.fill_id,
            **CANVASES[case % len(CANVASES)],
        }
        rollouts = sample(model, requests_of_every_remainder(3, seed=case), max_active=3, **settings)
        found = gaps(model, rollouts, settings["temperature"])
        assert max(found) < TOLERANCE, f"{settings}: log-prob {found[0]:.1e}, entropy {found[1]:.1e}"
        largest = tuple(map(max, largest, found))
        finishes |= {r.finish for r in rollouts}
        behind += sum(0 in r.step_map for r in rollouts)
        several += sum(len(set(r.step_map)) < len(r.step_map) for r in rollouts)
    print(f"{family}: largest difference of log-probs {largest[0]:.1e}, of entropies {largest[1]:.1e}")
    record_property("largest_gap", largest)
    assert finishes == {"stop", "length"} and behind and several


@pytest.mark.parametrize("family", FULL_ATTENTION)
def test_the_gap_of_each_cache_is_measured(family, record_property):
    """Stored keys are older than the tokens around them: `gap/*` of the update say by how much log-probs differ for it."""
    model, settings = tiny_model(5, family), dict(block_size=4, max_tokens=12, temperature=TEMPERATURE)
    caches = {"none": {}, "prefix": {}, "horizon": {"cache": "prefix", "further_horizon": 4}, "dual": {}}
    found = {}
    for name, cache in caches.items():
        rollouts = scored(sample(model, requests_of_every_remainder(3, seed=1), **{"cache": name, **settings, **cache}))
        config = rl_config("rollout.max_token=12", f"rollout.temperature={TEMPERATURE}", family=family)
        forget_accelerator()
        update = PolicyUpdate(policy_trainer(model, config, dist.make_accelerator(config), TEMPERATURE), config, model.fill_id)
        predictions, logprobs, _ = trained(model, rollouts, TEMPERATURE)
        expected = np.abs(logprobs - gather_tokens([r.logprobs for r in rollouts], predictions))
        config.optimizer.params.policy_learning_rate = update.trainer.peak_rate = 0.0
        metrics = update(rollouts, step=1)
        forget_accelerator()
        found[name] = metrics["gap/logprob_mean"]
        assert found[name] == pytest.approx(expected.mean(), abs=1e-5)
        assert metrics["gap/logprob_max"] == pytest.approx(expected.max(), abs=1e-5)
    print(f"{family}: mean difference of log-probs, nats: {', '.join(f'{name} {value:.1e}' for name, value in found.items())}")
    record_property("gaps", found)
    assert found["none"] < TOLERANCE and min(found[name] for name in ("prefix", "horizon", "dual")) > 10 * TOLERANCE


@pytest.mark.parametrize("family, cache", [("sdar", "none"), *itertools.product(FULL_ATTENTION, ("none", "dual"))])
def test_the_gap_is_measured_whatever_is_trained(models, family, cache, monkeypatch):
    """Joined steps, random masks, other blocks, a cut canvas: not the slices of sampling, and yet `gap/*` is of these."""
    model = models(4, 0) if family == "sdar" else tiny_model(5, family)
    own = {} if family == "sdar" else {"cache": cache}
    rollouts = scored(
        sample(model, requests_of_every_remainder(4, seed=3), block_size=4, max_tokens=12, temperature=TEMPERATURE, **own)
    )
    predictions, logprobs, _ = trained(model, rollouts, TEMPERATURE)
    expected = np.abs(logprobs - gather_tokens([r.logprobs for r in rollouts], predictions))

    def measured(*overrides: str) -> dict[str, float]:
        config = rl_config("rollout.max_token=12", f"rollout.temperature={TEMPERATURE}", *overrides, family=family)
        forget_accelerator()
        update = PolicyUpdate(policy_trainer(model, config, dist.make_accelerator(config), TEMPERATURE), config, model.fill_id)
        config.optimizer.params.policy_learning_rate = update.trainer.peak_rate = 0.0
        return {name: value for name, value in update(rollouts, step=1).items() if name.startswith("gap/")}

    several = {**(SLICES if family == "sdar" else CANVAS_SLICES), "TraceRL, joined": ["training.shrink=3"]}
    several.pop("DiPO", None)  # which trains what was sampled
    for name, overrides in several.items():
        some = measured(*overrides)
        assert 0 < some["gap/logprob_max"] <= expected.max() + 1e-5, name
        with monkeypatch.context() as patch:
            patch.setattr(gap, "ROWS", 1000)
            found = measured(*overrides, "logging.gap_responses=100")
        assert found["gap/logprob_mean"] == pytest.approx(expected.mean(), abs=1e-5), name
        assert found["gap/logprob_max"] == pytest.approx(expected.max(), abs=1e-5), name
        assert (found["gap/logprob_max"] < TOLERANCE) == (cache == "none"), name
        assert not measured(*overrides, "logging.gap_responses=0")
    forget_accelerator()


@pytest.mark.parametrize("max_response", [1, 5, 9])
def test_a_response_that_is_cut_for_training(models, max_response):
    """`training.max_gen_length` below what was sampled: the first tokens are trained, the slices show what the engine saw."""
    model = models(4, 1)
    rollouts = sample(model, requests_of_every_remainder(4, seed=1), block_size=4, max_tokens=12, temperature=0.7)
    assert max(gaps(model, rollouts, 0.7, max_response)) < TOLERANCE


def test_tokens_behind_the_stop_are_seen_and_not_trained(models):
    """Log-probs of tokens before a stop depend on the tokens behind it in their block: leaving those out would be noticed."""
    model = models(8, 0)
    rollouts = sample(model, requests_of_every_remainder(8, seed=2), block_size=8, max_tokens=24, strategy="low_confidence_static")
    cut = [r for r in rollouts if r.finish == "stop" and r.num_response % 8 != 0 and len(r.response_ids) - r.num_response >= 2]
    assert cut and all(r.response_ids[r.num_response - 1] in STOP_IDS for r in cut)
    assert max(gaps(model, cut, 1.0)) < TOLERANCE
    never = [r.step_map[: r.num_response] + [0] * (len(r.step_map) - r.num_response) for r in cut]
    blind = [Rollout(**{**vars(r), "step_map": step_map}) for r, step_map in zip(cut, never, strict=True)]
    assert gaps(model, blind, 1.0)[0] > 100 * TOLERANCE


CANVAS_SLICES = {
    "random_masking": ["training.method=random_masking", "training.mask_times_per_sample=2"],
    "coupled": ["training.method=coupled", "training.mask_ratio=per_token"],
    "TraceRL, cut": ["training.max_gen_length=7", "training.shrink=2"],
}
SLICES = {
    "random_masking": ["training.method=random_masking", "training.mask_times_per_sample=2"],
    "coupled": ["training.method=coupled", "training.mask_ratio=per_token"],
    "DiPO": ["training.method=DiPO"],
    "blocks of 8 from rollouts at 4": ["training.block_size=8"],
    "random masks in blocks of 8": ["training.method=random_masking", "training.block_size=8"],
}


@pytest.mark.parametrize("family, method", [("sdar", m) for m in SLICES] + [(f, m) for f in FULL_ATTENTION for m in CANVAS_SLICES])
def test_the_slices_of_every_method(models, family, method):
    """Also where sampling never saw them: the trainer's log-probs are those of a forward over clean text and the masked block."""
    overrides = SLICES[method] if family == "sdar" else CANVAS_SLICES[method]
    config = rl_config("rollout.max_token=12", f"rollout.temperature={TEMPERATURE}", *overrides, family=family)
    model = models(4, 0) if family == "sdar" else tiny_model(5, family)
    settings = dict(block_size=4, max_tokens=12, temperature=TEMPERATURE, strategy="low_confidence_dynamic", threshold=0.3)
    rollouts = scored(sample(model, requests_of_every_remainder(4, seed=6), **settings))
    forget_accelerator()
    update = PolicyUpdate(policy_trainer(model, config, dist.make_accelerator(config), TEMPERATURE), config, model.fill_id)
    documents = update.documents(rollouts, step=1)
    logprobs = update.trainer.outputs(documents, len(number(documents)))
    forget_accelerator()
    largest = 0.0
    for document in documents:
        trace, rollout = document.trace, rollouts[document.response]
        ids = document.ids.tolist()  # with what fills the last block
        no_matter = [0] * (len(ids) - document.prompt_length)
        response_ids = ids[document.prompt_length :]
        lists = dict(step_map=no_matter, logprobs=no_matter, entropy=no_matter)
        whole = replace(rollout, response_ids=response_ids, num_response=0, **lists)
        expected = []
        size = document.block_size
        for block, hidden, predicted in zip(trace.block * size, trace.hidden, trace.predicted, strict=True):
            masked, tau = (block + np.flatnonzero(which) for which in (hidden, predicted))
            with torch.no_grad():
                expected += forward(model, whole, int(block), masked.tolist(), tau.tolist(), size).tolist()
        largest = max(largest, np.abs(logprobs[document.numbers] - expected).max())
    print(f"{method}: largest difference {largest:.1e}")
    assert largest < TOLERANCE

"""Settings of full attention: what cannot be meant, what is said to be unused, and the shipped files."""

from __future__ import annotations

import math

import pytest
import torch

from common.errors import UserError
from configs.load import load_config
from models.registry import FAMILIES
from sample.registry import SCORE_RANGES, TARGETS
from sample.sampling import Distribution, entropy_of
from tests.configs.test_load import MINIMAL, SHIPPED, job_of

CANVAS = """
experiment: {project: runs/x}
model: {pretrained_model: somewhere, model_base: llada}
dataset: {train_dataset: a, eval_dataset: b, optimization_data: c}
rollout: {max_gen_length: 128, block_size: 32}
"""

CANVAS_MISTAKES = [
    ("rl", ["rollout.max_gen_length=100"], "got 100, must be a multiple of rollout.block_size, which is 32"),
    ("rl", ["evaluation.block_size=[32,48]"], "evaluation.max_gen_length: got 128, must be a multiple of evaluation.block_size"),
    ("eval", ["rollout.block_size=48"], "evaluation.max_gen_length: got 128, must be a multiple of evaluation.block_size"),
    ("sft", ["evaluation.block_size=48"], "evaluation.max_gen_length: got 128, must be a multiple of evaluation.block_size"),
    ("rl", ["rollout.steps=129"], "rollout.steps: got 129, must be at most rollout.max_gen_length, which is 128"),
    ("rl", ["rollout.steps=3"], "rollout.steps: got 3, must be at least 4: rollout.max_gen_length=128 is as many blocks of 32"),
    ("rl", ["rollout.pad_target_penalty=0"], "rollout.pad_target_penalty: got 0.0, must be above 0"),
    ("rl", ["rollout.cache=both"], "rollout.cache: got 'both' on the command line, expected one of none, prefix, dual, or null"),
    ("rl", ["rollout.use_cache=false", "rollout.cache=dual"], "rollout.use_cache: got false, but rollout.cache says dual"),
    ("rl", ["rollout.cache=dual", "evaluation.use_cache=false"], "evaluation.use_cache: got false, but evaluation.cache says dual"),
    ("rl", ["model.block_size=8"], "model.block_size: got 8, but llada is no block model: leave it out"),
    ("rl", ["training.old_logprobs=engine"], "got 'engine' with a prefix cache, but caches of full-attention"),
    ("rl", ["training.old_logprobs=engine", "rollout.cache=dual"], "got 'engine' with a dual cache"),
    (
        "rl",
        ["training.old_logprobs=engine", "rollout.use_cache=false", "training.shrink=2"],
        "training.old_logprobs: got 'engine', which needs the log-probs of sampling",
    ),
    (
        "rl",
        ["training.importance_cap=2", "training.num_updates_per_step=2", "training.max_gen_length=64"],
        "which needs the log-probs of sampling, but training.method=TraceRL, shrink=1, max_gen_length=64 trains other slices",
    ),
    ("sft", ["training.method=ar"], "got 'ar', which trains a token at the position before it, but llada"),
    ("sft", ["training.method=DiPO"], "which is a method of rl, must be one of random_masking, semi-ar, trace"),
    ("sft", ["training.method=DiPO", "model.model_base=dream"], "must be one of ar, random_masking, semi-ar, trace"),
    (
        "sft",
        ["training.method=ar", "model.model_base=dream", "training.complementary_mask=true"],
        "training.complementary_mask: got true, but method ar draws no masks",
    ),
    ("sft", ["training.loss_weight_by_ratio=true"], "training.loss_weight_by_ratio: got true with loss_weighting=reference"),
    (
        "rl",
        ["training.method=random_masking", "training.loss_weight_by_ratio=true"],
        "training.loss_weight_by_ratio: got true with loss_weighting=reference",
    ),
    ("rl", ["training.method=ar", "model.model_base=dream"], "training.method: got 'ar', which is a method of sft"),
    ("rl", ["training.max_rows_per_response=0"], "training.max_rows_per_response: got 0, must be above 0"),
]


@pytest.mark.parametrize("job, overrides, message", CANVAS_MISTAKES, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_mistakes_with_full_attention(load, job, overrides, message):
    with pytest.raises(UserError) as error:
        load(job, CANVAS, *overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_full_attention_may_be_told(load, capsys):
    """Engine log-probs where nothing is cached, whatever the training block; SFT whose blocks do not fill its canvas."""
    exact = ["training.old_logprobs=engine", "rollout.use_cache=false", "training.block_size=8", "training.importance_cap=null"]
    assert load("rl", CANVAS, *exact).training.old_logprobs == "engine"
    assert load("rl", CANVAS, "rollout.cache=none", "training.old_logprobs=engine").rollout.use_cache
    assert load("rl", CANVAS, "rollout.cache=dual", "rollout.further_horizon=0", "rollout.stop_early=true").rollout.cache == "dual"
    assert load("rl", CANVAS, "rollout.temperature=0", "rollout.target=random").rollout.target == "random"
    small = CANVAS.replace("rollout: {max_gen_length: 128, block_size: 32}", "training: {max_gen_length: 100, block_size: 48}")
    assert load("sft", small, "dataset.eval_dataset=null").training.block_size == 48, "nothing is sampled"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("greedy", ["rollout.temperature=0", "rollout.top_k=1"])
def test_greedy_tokens_are_refused_where_positions_are_not_drawn_either(load, greedy):
    said = "rollout.temperature: got 0.0" if "temperature" in greedy else "rollout.top_k: got 1"
    draws = {"alg_temp=0.5", "target=random"}
    for strategy in [STATIC, DYNAMIC, "sequential", "entropy_bounded"]:
        for setting in ["alg_temp=0", *sorted(draws)]:
            for text in (CANVAS, MINIMAL):
                has_effect = strategy in (STATIC, DYNAMIC) and setting in (draws if text is CANVAS else {"target=random"})
                given = [greedy, f"rollout.{setting}", f"rollout.remasking_strategy={strategy}"]
                if has_effect:
                    load("rl", text, *given)
                    continue
                with pytest.raises(UserError) as error:
                    load("rl", text, *given)
                assert str(error.value).startswith(f"{said}: all responses of a task would be the same")
    drawn = [greedy, "rollout.target=random"]
    for text, steps, choices in [(MINIMAL, "denoising_steps_per_block", 4), (CANVAS, "steps", 5)]:
        load("rl", text, *drawn, f"rollout.{steps}={choices}")
    for text, nothing_to_choose in [
        (MINIMAL, "rollout.block_size=1"),
        (MINIMAL, "rollout.denoising_steps_per_block=1"),
        (CANVAS, "rollout.block_size=1"),
        (CANVAS, "rollout.steps=4"),
    ]:
        with pytest.raises(UserError, match=f"^{said}: all responses of a task would be the same"):
            load("rl", text, *drawn, nothing_to_choose)


def test_positions_are_not_drawn_by_the_forward_that_opens_a_block(load):
    """Dream's reveals the block's first position: a forward behind it has to leave some for another."""
    drawn = ["model.model_base=dream", "rollout.temperature=0", "rollout.target=random"]
    small = [*drawn, "rollout.max_gen_length=8", "rollout.block_size=4", "evaluation.block_size=4"]
    for given in [
        [*drawn, "rollout.block_size=2", "evaluation.block_size=2"],
        [*drawn, "rollout.block_size=2", "evaluation.block_size=2", f"rollout.remasking_strategy={DYNAMIC}"],
        [*small, "rollout.steps=4", f"rollout.remasking_strategy={STATIC}"],  # of each block one token, then three
        [*small, "rollout.steps=2", f"rollout.remasking_strategy={STATIC}"],
    ]:
        with pytest.raises(UserError, match="^rollout.temperature: got 0.0: all responses of a task would be the same"):
            load("rl", CANVAS, *given)
    load("rl", CANVAS, *small, "rollout.steps=8", f"rollout.remasking_strategy={STATIC}")
    load("rl", CANVAS, *small, "rollout.steps=4", f"rollout.remasking_strategy={DYNAMIC}")


DYNAMIC, STATIC = "low_confidence_dynamic", "low_confidence_static"
SHIPPED_TARGETS = {"confidence", "margin_confidence", "neg_entropy", "random"}
"""Other tests register more."""


@pytest.mark.parametrize("text", [CANVAS, MINIMAL], ids=["full", "block"])
@pytest.mark.parametrize("job, section", [("rl", "rollout"), ("rl", "evaluation"), ("eval", "rollout"), ("sft", "evaluation")])
def test_thresholds_lie_where_the_scores_do(load, job, section, text):
    def given(target: str, strategy: str, threshold: float) -> str:
        """The mistake, or nothing."""
        settings = {"target": target, "remasking_strategy": strategy, "dynamic_threshold": threshold}
        try:
            load(job, text, *(f"{section}.{name}={value}" for name, value in settings.items()))
        except UserError as error:
            return str(error)
        return ""

    own = "rollout" if (job, section) == ("rl", "rollout") else "evaluation"
    for target in sorted(SHIPPED_TARGETS - {"neg_entropy"}):
        assert not given(target, DYNAMIC, 0) and not given(target, DYNAMIC, 1)
        for value in (-0.5, 1.5):
            refused = f"{own}.dynamic_threshold: got {value}, must be from 0 to 1 with {own}.target={target}, where its scores lie"
            assert given(target, DYNAMIC, value) == refused
            assert not given(target, STATIC, value), "which reads no threshold: files of the reference say one all the same"
    assert not given("neg_entropy", DYNAMIC, -2.2) and not given("neg_entropy", DYNAMIC, 0)
    assert not given("neg_entropy", STATIC, 0.9)
    for value, said in [(0.9, "0.9, the default,"), (0.8, "0.8,")]:
        refused = f"{own}.dynamic_threshold: got {said} must be 0 or less with {own}.target=neg_entropy, where its scores lie"
        assert given("neg_entropy", DYNAMIC, value) == refused


def test_a_threshold_that_evaluation_has_from_rollout(load):
    """Not spoken of where evaluation reads none, and not as something that was given where it does."""
    rollout = ["rollout.target=neg_entropy", "rollout.dynamic_threshold=-0.5", f"rollout.remasking_strategy={DYNAMIC}"]
    evaluation = ["evaluation.target=confidence", f"evaluation.remasking_strategy={STATIC}"]
    assert load("rl", MINIMAL, *rollout, *evaluation).evaluation.dynamic_threshold == -0.5
    with pytest.raises(UserError, match=r"^evaluation.dynamic_threshold: got -0.5, as in rollout, must be from 0 to 1 with eval"):
        load("rl", MINIMAL, *rollout, "evaluation.target=confidence")


def test_a_target_of_ones_own_says_where_its_scores_lie(load, monkeypatch):
    monkeypatch.setattr(TARGETS, "_entries", {**TARGETS._entries, "log_confidence": len, "surprise": len, "any": len})
    for name, bounds, inside, outside, meant in [
        ("log_confidence", (-math.inf, 0.0), -0.1, 0.5, "0 or less"),
        ("surprise", (0.0, math.inf), 7.0, -0.1, "0 or more"),
        ("any", (-math.inf, math.inf), -7.0, None, ""),
    ]:
        monkeypatch.setitem(SCORE_RANGES, name, bounds)
        given = [f"rollout.target={name}", f"rollout.remasking_strategy={DYNAMIC}", "rollout.dynamic_threshold="]
        assert load("rl", MINIMAL, *given[:2], f"{given[2]}{inside}").rollout.dynamic_threshold == inside
        if outside is not None:
            with pytest.raises(UserError, match=f"got {outside}, must be {meant} with rollout.target={name}"):
                load("rl", MINIMAL, *given[:2], f"{given[2]}{outside}")


def test_scores_lie_where_thresholds_may():
    generator = torch.Generator().manual_seed(0)
    logprobs = (5 * torch.randn(50, 30, generator=generator)).log_softmax(-1)
    tokens, keys = torch.randint(30, (50,), generator=generator), torch.randint(2**31 - 1, (50, 2), generator=generator)
    scored = Distribution(logprobs, tokens, entropy_of(logprobs), keys.to(torch.int32))
    for name in SHIPPED_TARGETS:
        score = TARGETS.get(name)(scored)
        low, high = SCORE_RANGES.get(name, (0.0, 1.0))
        assert ((score >= low) & (score <= high)).all(), name


def test_settings_of_the_other_attention_kind_are_said(load, capsys):
    load("rl", MINIMAL, "rollout.stop_early=true", "rollout.cache=dual", "evaluation.if_eval=false")
    assert "settings that have no use, as sdar has block attention: rollout.cache, rollout.stop_early" in capsys.readouterr().err
    load("rl", CANVAS, "rollout.denoising_steps_per_block=2")
    unused = "rollout.denoising_steps_per_block, evaluation.denoising_steps_per_block"  # which follows it
    assert f"as llada has full attention: {unused}\n" in capsys.readouterr().err
    for strategy in ["sequential", "entropy_bounded", STATIC, DYNAMIC]:
        is_told = strategy in ("sequential", "entropy_bounded")
        given = ["rollout.alg_temp=0.5", "rollout.pad_target_penalty=2", f"rollout.remasking_strategy={strategy}"]
        load("rl", CANVAS, *given, "evaluation.alg_temp=0", "evaluation.pad_target_penalty=1")
        said = f"as remasking_strategy {strategy} ranks by no score: rollout.alg_temp=0.5, rollout.pad_target_penalty=2.0"
        assert capsys.readouterr().err == is_told * f"warning: settings that have no use, {said}\n"
        load("eval", CANVAS, "rollout.alg_temp=0.25", f"rollout.remasking_strategy=[{STATIC},{strategy}]")
        said = f"as remasking_strategy {strategy} ranks by no score: evaluation.alg_temp=0.25"
        assert capsys.readouterr().err == is_told * f"warning: settings that have no use, {said}\n"
    load("rl", CANVAS, "rollout.use_cache=false", "rollout.further_horizon=32", "evaluation.further_horizon=null")
    assert "rollout.further_horizon=32 has no use: without a cache" in capsys.readouterr().err


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_of_full_attention_sample_whole_blocks_within_their_canvas(path):
    config, job = load_config(job_of(path), [f"config={path}"]), job_of(path)
    if FAMILIES.get(config.model.model_base).attention != "full":
        assert config.training.max_rows_per_response is None, "one pack holds all rows of a block model's response"
        return
    decodings = [config.rollout] if job == "rl" else []
    decodings += config.evaluation.variants() if job != "sft" or config.dataset.eval_dataset else []
    for d in decodings:
        assert d.max_token % d.block_size == 0 and d.steps == d.max_token, "static decoding: a token per forward"
    if job == "sft":
        assert config.training.max_gen_length <= 1024, "every document is as long as the canvas"
    elif job == "rl":
        assert config.training.max_gen_length == config.rollout.max_token, "the canvas is trained whole"

"""Prompts and settings of the rollout stage."""

from __future__ import annotations

import pytest

from common.errors import UserError
from common.records import Task
from configs.load import load_config
from models.registry import FAMILIES
from models.tiny import build_tiny
from sample.rollout import PromptBuilder, sampling_settings, stop_ids

TASKS = [Task("a", "s10=", "01"), Task("b", "s5293847561=", "1234556789")]


@pytest.fixture
def model():
    return build_tiny(FAMILIES.get("sdar"))


def builder(model, *overrides):
    config = load_config("rl", ["config=configs/rl_tiny.yaml", *overrides])
    return PromptBuilder(config, config.rollout, model)


def test_long_prompts_are_set_aside(model):
    requests, too_long = builder(model, "training.max_prompt_len=8")(TASKS, 3)
    assert [(r.task_id, r.num_samples, len(r.prompt_ids)) for r in requests] == [("a", 3, 4)]
    assert too_long == [TASKS[1]]


def test_the_tokenizer_s_template_or_the_fixed_form(model):
    model.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}="
    text = {}
    for use in ("true", "false"):
        [request, *_], _ = builder(model, "dataset.data_type=math", f"dataset.use_chat_template={use}")(TASKS[:1], 1)
        text[use] = request.prompt_ids
    # The template adds one character; ChatML's words are not in the tiny vocabulary, but take many ids.
    assert len(text["false"]) > len(text["true"]) + 10


def test_stop_tokens(model):
    eos = model.tokenizer.eos_token_id
    assert stop_ids(model, []) == [eos]
    assert stop_ids(model, ["="]) == sorted([eos, model.tokenizer.convert_tokens_to_ids("=")])
    with pytest.raises(UserError, match="stop_token_list: '<|im_end|>' is no single token"):
        stop_ids(model, ["<|im_end|>"])


def test_every_rl_step_has_noise_of_its_own(model):
    decoding = load_config("rl", ["config=configs/rl_tiny.yaml"]).rollout
    seeds = {sampling_settings(decoding, model, 7, step).seed for step in range(100)}
    assert len(seeds) == 100
    assert sampling_settings(decoding, model, 7, 3) == sampling_settings(decoding, model, 7, 3)

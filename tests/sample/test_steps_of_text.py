"""Step maps of given text, against the engine and against one dense forward per block and step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.errors import UserError
from models.attention import masked_attention
from sample.engine import SamplingSettings
from sample.steps_of_text import Text, steps_of_texts
from tests.train.steps import requests_of_every_remainder, sample, tiny_model


def settings(model, **changes) -> SamplingSettings:
    return SamplingSettings(**{"max_tokens": 12, "mask_id": model.mask_id, "forbidden_ids": tuple(model.forbidden_ids), **changes})


def random_texts(block_size: int, seed: int) -> list[Text]:
    generator = np.random.default_rng([seed, block_size])
    texts = []
    # Without a prompt the first block is masks alone: they all look alike, and equal tokens tie.
    for prompt in range(1, block_size + 2):
        length = -prompt % block_size + block_size * int(generator.integers(1, 4))
        ids = generator.integers(0, 25, prompt + length).tolist()
        texts.append(Text(f"text {prompt}", ids[:prompt], ids[prompt:]))
    return texts


@torch.no_grad()
def brute_force(model, text: Text, block_size: int, num_steps: int, threshold: float | None) -> list[int]:
    """Block by block and forward by forward, with the block-causal mask over the text so far."""
    ids = torch.tensor([*text.prompt_ids, *text.response_ids])
    prompt, steps, forward = len(text.prompt_ids), [0] * len(ids), 0
    share, rest = divmod(block_size, num_steps)
    for start in range(prompt // block_size * block_size, len(ids), block_size):
        hidden = [p for p in range(start, start + block_size) if p >= prompt]
        step = 0
        while hidden:
            forward += 1
            end = start + block_size
            seen = ids[:end].clone()
            seen[hidden] = model.mask_id
            block = torch.arange(end) // block_size
            states = model.decoder(seen, torch.arange(end), masked_attention(block[:, None] >= block))
            logits = states @ model.decoder.lm_head.weight.T
            logits[:, model.forbidden_ids] = -torch.inf
            p = {at: float(logits[at].softmax(-1)[ids[at]]) for at in hidden}
            number = share + (min(step, num_steps - 1) < rest)
            chosen = sorted(hidden, key=lambda at: (-p[at], at))[:number]
            if threshold is not None and sum(q > threshold for q in p.values()) > number:
                chosen = [at for at in hidden if p[at] > threshold]
            for at in chosen:
                steps[at] = forward
            hidden = [at for at in hidden if at not in chosen]
            step += 1
    return steps[prompt:]


@pytest.mark.parametrize("block_size, num_steps", [(1, 1), (2, 2), (4, 4), (4, 3), (8, 8), (8, 2)])
@pytest.mark.parametrize("threshold", [None, 0.05])
def test_equals_one_forward_per_block_and_step(block_size, num_steps, threshold):
    model, texts = tiny_model(3), random_texts(block_size, 1)
    strategy = "low_confidence_static" if threshold is None else "low_confidence_dynamic"
    s = settings(model, block_size=block_size, steps_per_block=num_steps, strategy=strategy, threshold=threshold or 0.9)
    found = steps_of_texts(model.decoder, texts, s, max_tokens=200)
    assert found == [brute_force(model, text, block_size, num_steps, threshold) for text in texts]
    if block_size == 4 and num_steps == 4 and threshold is not None:
        assert len({max(steps) for steps in found}) > 2, "the threshold should join some steps and not others"


ORDERS = [
    ("sequential", {}),
    ("low_confidence_static", {"steps_per_block": 1}),
    ("low_confidence_static", {"target": "neg_entropy"}),
    ("entropy_bounded", {"entropy_bound": 2.0}),
]


@pytest.mark.parametrize("strategy, changes", ORDERS)
def test_the_engines_own_order_is_found_again(strategy, changes):
    """Where the order does not depend on the drawn tokens, the map of a rollout's text is the rollout's."""
    model, requests = tiny_model(5), requests_of_every_remainder(4, seed=2, num_samples=2)
    rollouts = sample(model, requests, block_size=4, max_tokens=14, strategy=strategy, **changes)
    texts = [Text(r.task_id, r.prompt_ids, r.response_ids) for r in rollouts]
    assert steps_of_texts(model.decoder, texts, settings(model, strategy=strategy, **changes)) == [r.step_map for r in rollouts]


def test_packing_changes_nothing():
    model, texts = tiny_model(3), random_texts(4, 2)
    done: list[int] = []
    s = settings(model, strategy="low_confidence_dynamic", threshold=0.05, target="random")
    alone = steps_of_texts(model.decoder, texts, s, max_tokens=1, progress=done.append)
    assert alone == steps_of_texts(model.decoder, texts, s) and done == list(range(1, len(texts) + 1))


def test_a_text_that_ends_inside_a_block():
    model = tiny_model(3)
    with pytest.raises(UserError, match="text x ends inside a block"):
        steps_of_texts(model.decoder, [Text("x", [1, 2], [3])], settings(model))

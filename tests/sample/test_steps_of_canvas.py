"""Step maps of given canvases, against the engine and against one dense forward per step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.errors import UserError
from models.attention import masked_attention
from sample.canvas_schedule import SCHEDULES
from sample.engine import SamplingSettings
from sample.steps_of_canvas import steps_of_canvases
from sample.steps_of_text import Text
from tests.train.steps import FULL_ATTENTION, requests_of_every_remainder, sample, tiny_model

STATIC, DYNAMIC = "low_confidence_static", "low_confidence_dynamic"


def settings(model, **changes) -> SamplingSettings:
    return SamplingSettings(**{"max_tokens": 12, "mask_id": model.mask_id, "forbidden_ids": tuple(model.forbidden_ids), **changes})


def random_texts(canvas: int, seed: int) -> list[Text]:
    generator = np.random.default_rng([seed, canvas])
    ids = [generator.integers(0, 25, prompt + canvas).tolist() for prompt in (1, 3, 4, 6)]
    return [Text(f"text {len(one) - canvas}", one[:-canvas], one[-canvas:]) for one in ids]


@torch.no_grad()
def brute_force(model, text: Text, block_size: int, steps: int, threshold: float | None) -> list[int]:
    """Step by step, one forward over the whole canvas each; the family's facts written out."""
    ids, shift = torch.tensor([*text.prompt_ids, *text.response_ids]), model.family.logit_shift
    prompt, found, forward = len(text.prompt_ids), [0] * len(ids), 0
    starts = range(prompt, len(ids), block_size)
    share, rest = divmod(steps, len(starts))
    for number, start in enumerate(starts):
        counts = SCHEDULES[model.family.canvas_schedule](block_size, share + (number < rest))
        hidden, step = list(range(start, start + block_size)), 0
        while hidden:
            forward += 1
            seen = ids.clone()
            seen[[p for p in range(prompt, len(ids)) if not found[p]]] = model.mask_id
            states = model.decoder(seen, torch.arange(len(ids)), masked_attention(torch.ones(len(ids), len(ids), dtype=torch.bool)))
            logits = states @ model.decoder.lm_head.weight.T
            logits[:, model.forbidden_ids] = -torch.inf
            may = hidden[:1] if model.family.first_token_from_refresh and step == 0 else hidden
            p = {at: float(logits[at - shift].softmax(-1)[ids[at]]) for at in may}
            ranked = sorted(may, key=lambda at: (-p[at], at))
            chosen = ranked[: counts[step]] if threshold is None else [at for at in may if p[at] > threshold] or ranked[:1]
            for at in chosen:
                found[at] = forward
            hidden = [at for at in hidden if not found[at]]
            step += 1
    return found[prompt:]


@pytest.mark.parametrize("family", FULL_ATTENTION)
@pytest.mark.parametrize("block_size, steps", [(4, 12), (4, 6), (6, 7), (12, 12), (12, 5), (2, 12)])
@pytest.mark.parametrize("threshold", [None, 0.05])
def test_equals_one_forward_per_step(family, block_size, steps, threshold):
    model, texts = tiny_model(3, family), random_texts(12, 1)
    strategy = STATIC if threshold is None else DYNAMIC
    s = settings(model, block_size=block_size, steps=steps, strategy=strategy, threshold=threshold or 0.9)
    found = steps_of_canvases(model.decoder, model.family, texts, s, max_tokens=40)
    assert found == [brute_force(model, text, block_size, steps, threshold) for text in texts]


ORDERS = [
    ("sequential", {}),
    (STATIC, {"target": "neg_entropy", "steps": 7}),
    (STATIC, {"target": "random"}),
    (DYNAMIC, {"temperature": 0.0, "threshold": 0.3}),
    (STATIC, {"target": "neg_entropy", "temperature": 0.3, "steps": 7}),
    ("entropy_bounded", {"entropy_bound": 2.0, "temperature": 0.3}),
    (DYNAMIC, {"target": "margin_confidence", "temperature": 0.0, "threshold": 0.2}),
    ("entropy_bounded", {"entropy_bound": 2.0}),
]


@pytest.mark.parametrize("family", FULL_ATTENTION)
@pytest.mark.parametrize("strategy, changes", ORDERS)
def test_the_engines_own_order_is_found_again(family, strategy, changes):
    """Where the order does not depend on the drawn tokens, or the most probable were drawn, the map of a canvas is its rollout's;
    blocks of 5 leave a shorter one at the end."""
    model, requests = tiny_model(5, family), requests_of_every_remainder(4, seed=2)
    s = dict(block_size=5, max_tokens=12, strategy=strategy, **changes)
    rollouts = sample(model, requests, **s)
    texts = [Text(r.task_id, r.prompt_ids, r.response_ids) for r in rollouts]
    assert steps_of_canvases(model.decoder, model.family, texts, settings(model, **s)) == [r.step_map for r in rollouts]


@pytest.mark.parametrize("family", FULL_ATTENTION)
def test_packing_changes_nothing(family):
    model, texts = tiny_model(3, family), random_texts(12, 2)
    done: list[int] = []
    s = settings(model, strategy=DYNAMIC, threshold=0.05)
    alone = steps_of_canvases(model.decoder, model.family, texts, s, max_tokens=1, progress=done.append)
    assert alone == steps_of_canvases(model.decoder, model.family, texts, s) and done == [1, 2, 3, 4]


def test_a_text_without_a_prompt():
    model = tiny_model(3, "dream")
    with pytest.raises(UserError, match="text x has an empty prompt"):
        steps_of_canvases(model.decoder, model.family, [Text("x", [], [1, 2, 3, 4])], settings(model))
    model, text = tiny_model(3, "llada"), Text("x", [], [1, 2, 3, 4])
    found = steps_of_canvases(model.decoder, model.family, [text], settings(model, block_size=4))
    assert found == [brute_force(model, text, 4, 4, None)]

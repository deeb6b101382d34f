"""Finetuning of full-attention families: canvases, their masks and their loss, next-token training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from common import dist
from common.errors import UserError
from data.sft import SFTRecord
from models.attention import masked_attention
from tests.train.steps import FULL_ATTENTION, error, forget_accelerator, kept_gradients, tiny_model
from tests.train.test_sft import layout_of, long_responses, sft_config
from train.documents import number
from train.loop import Tables
from train.objectives import likelihood, token_weights
from train.policy import policy_trainer
from train.sft_data import as_response, as_training
from train.validation import Validation, build_documents


@pytest.fixture(scope="module")
def accelerator():
    forget_accelerator()
    yield dist.make_accelerator(sft_config())
    forget_accelerator()


def test_a_canvas_is_filled_up_to_the_longest_response():
    layout = layout_of("training.max_gen_length=6", attention="full")
    r = as_response([1, 2, 3], [4, 5, 6], [2, 1, 3], 9, layout)
    assert r.response_ids.tolist() == [4, 5, 6, 9, 9, 9] and r.step_map.tolist() == [2, 1, 3, 4, 4, 4] and r.num_trained == 6
    assert layout.prepared(r).num_trained == 6 and layout.block_size(r) == 9
    layout.training.post_num = 1
    assert layout.prepared(r).num_trained == 4
    cut = as_response([1], [4, 5, 6, 7, 8, 4, 4], None, 9, layout)
    assert cut.response_ids.tolist() == [4, 5, 6, 7, 8, 4] and cut.num_trained == 6
    with pytest.raises(UserError, match="7 entries.* 6 with the fill of its canvas: .* or training.max_gen_length"):
        as_training(SFTRecord("x", "p", "r", step_map=[1] * 7), [1, 2, 3], [4, 5, 6], 9, layout)


def test_a_sampled_canvas_is_kept_as_far_as_it_is_trained():
    record = SFTRecord("x", "", "", [1, 2, 2, 0, 3], None, False, [1, 2, 3], [4, 5, 6, 7, 8], 2)
    whole = as_training(record, record.prompt_ids, record.response_ids, 9, layout_of("training.max_gen_length=5", attention="full"))
    assert whole.response_ids.tolist() == [4, 5, 6, 7, 8] and whole.num_trained == 2 and whole.step_map.tolist() == [1, 2, 2, 0, 3]
    cut = as_training(record, record.prompt_ids, record.response_ids, 9, layout_of("training.max_gen_length=4", attention="full"))
    assert cut.response_ids.tolist() == [4, 5, 6, 7] and cut.step_map.tolist() == [1, 2, 2, 0]


@pytest.mark.parametrize("method", ["random_masking", "semi-ar", "trace"])
def test_ids_are_filled_up_to_the_canvas_with_masks(method):
    """On a canvas that ends with the given ids the model would see where its answer has to end. The fill is not trained."""
    layout = layout_of("training.max_gen_length=9", "training.block_size=4", f"training.method={method}", attention="full")
    record = SFTRecord("x", "", "", [1, 3, 2], None, False, [1, 2], [4, 5, 6], 3)
    r = as_training(record, record.prompt_ids, record.response_ids, 9, layout)
    assert r.response_ids.tolist() == [4, 5, 6] + [9] * 6 and r.step_map.tolist() == [1, 3, 2] + [0] * 6 and r.num_trained == 3
    documents = [layout.document(0, r, np.random.default_rng(seed)) for seed in range(20)]
    traces = [document.trace for document in documents if document is not None]
    assert traces and all(t.hidden[:, 5:].all() and t.hidden.shape[1] == 11 for t in traces)
    assert all(not t.predicted[:, 5:].any() for t in traces)
    without = as_training(replace(record, step_map=None), record.prompt_ids, record.response_ids, 9, layout)
    assert without.step_map is None and len(without.response_ids) == 9


def test_next_token_needs_no_fill():
    layout = layout_of("model.model_base=dream", "training.method=ar", attention="full")
    r = as_response([1, 2, 3], [4, 5, 6], None, 9, layout)
    assert r.response_ids.tolist() == [4, 5, 6] and layout.block_size(r) == 1
    for family in ("llada", "sdar"):
        with pytest.raises(UserError, match="training.method: got 'ar'.*predicts it at its own"):
            sft_config(f"model.model_base={family}", "training.method=ar")


METHODS_OF_A_CANVAS = {
    "semi-ar": ["training.block_size=4", "training.post_num=2"],
    "random_masking": ["training.loss_weight_by_ratio=true", "training.loss_weighting=token", "training.complementary_mask=true"],
    "trace": ["training.shrink=2"],
    "ar": [],
}


CASES = [(f, m) for f in FULL_ATTENTION for m in METHODS_OF_A_CANVAS if (f, m) != ("llada", "ar")]


@pytest.mark.parametrize("family, method", CASES)
def test_the_loss_of_canvases_is_that_of_one_forward_per_slice(accelerator, family, method):
    """And its gradient, in micro-batches: every slice alone, under no mask at all (next-token: the causal one)."""
    family_and_method = [f"model.model_base={family}", f"training.method={method}", "training.max_tokens_per_microbatch=60"]
    config = sft_config(*family_and_method, "training.max_gen_length=12", *METHODS_OF_A_CANVAS[method])
    model, rng = tiny_model(7, family), np.random.default_rng(4)
    trainer = policy_trainer(model, config, accelerator)
    responses = []
    for prompt, length in [(3, 5), (6, 12), (2, 14)]:
        ids, steps = (rng.integers(low, 25, n).tolist() for low, n in ((0, prompt + length), (1, length)))
        responses.append(as_response(ids[:prompt], ids[prompt:], steps, model.fill_id, trainer.layout))
    documents = build_documents(responses, trainer.layout, [1])
    table = token_weights(number(documents), config.training.loss_weighting, 12, 12, "full")
    with kept_gradients() as steps:
        result = trainer.step(documents, Tables(np.zeros(len(table)), table, np.zeros(len(table))), likelihood, 0.0)

    by_hand, total, index = tiny_model(7, family), torch.zeros(()), 0
    for document in documents:
        for block, hidden, predicted in zip(document.trace.block, document.trace.hidden, document.trace.predicted, strict=True):
            ids = torch.tensor(document.ids)
            n, tokens = len(ids), torch.tensor(np.flatnonzero(predicted) + block * document.block_size)
            seen, mask = ids.clone(), torch.ones(n, n, dtype=torch.bool)
            if method == "ar":
                mask = mask.tril()
            else:
                seen[torch.tensor(hidden)] = model.mask_id
            states = by_hand.decoder(seen, torch.arange(n), masked_attention(mask))
            logits = by_hand.decoder.lm_head(states[tokens - model.family.logit_shift])
            logits[:, model.forbidden_ids] = -torch.inf
            logp = logits.log_softmax(-1).gather(1, ids[tokens, None])[:, 0]
            total = total - (torch.tensor(table[index : index + len(tokens)], dtype=torch.float32) * logp).sum()
            index += len(tokens)
    assert index == len(table) and result.loss == pytest.approx(total.item(), rel=1e-5)
    names, parameters = zip(*by_hand.decoder.named_parameters(), strict=True)
    assert error(steps[0], dict(zip(names, torch.autograd.grad(total, parameters), strict=True))) < 1e-5


def test_drawn_rows_weigh_what_all_rows_weigh(accelerator):
    """Under `step` every row weighs the same in sum, so a draw weighs exactly what they all weigh."""
    settings = ["model.model_base=llada", "training.block_size=4", "training.max_gen_length=16", "training.loss_weighting=step"]
    settings += ["training.upper_p=1.0", "training.lower_p=1.0"]
    layouts = (layout_of(*settings, f"training.max_rows_per_response={n}", attention="full") for n in ("null", 2))
    of_all, drawn = (Validation(long_responses(layout), layout) for layout in layouts)
    assert {d.num_rows for d in of_all.documents} == {4} and {d.num_rows for d in drawn.documents} == {2}
    assert drawn.weights.sum() == pytest.approx(of_all.weights.sum()) == pytest.approx(4.0)
    trainer = policy_trainer(tiny_model(7, "llada"), sft_config(*settings), accelerator)
    logprobs = trainer.outputs(of_all.documents, of_all.num_predictions)[drawn.own]
    found = drawn(trainer)
    assert found["eval/validation_nll"] == pytest.approx(-logprobs.mean(), rel=1e-6)
    assert found["eval/validation_loss"] == pytest.approx(-(drawn.weights * logprobs).sum(), rel=1e-6)

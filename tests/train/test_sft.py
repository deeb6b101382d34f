"""Finetuning: records as training sees them, masks and their weights, long documents in parts, the validation loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common import dist
from common.errors import UserError
from data.sft import SFTRecord
from models.attention import masked_attention
from tests.train.steps import error, forget_accelerator, kept_gradients, tiny_model, weights
from train.documents import number
from train.layout import Layout
from train.loop import Tables
from train.methods.semi_ar import semi_ar_slices
from train.objectives import likelihood, token_weights
from train.policy import policy_trainer
from train.sft_data import as_response, as_training, build_responses, fingerprint, warn_of_cuts, warn_of_end
from train.traces import Response
from train.validation import Validation, build_documents


def sft_config(*overrides: str) -> Any:
    from configs.load import load_config

    sgd = ["optimizer.name=sgd", "optimizer.params.learning_rate=0.5", "lr_scheduler.scheduler=constant"]
    base = ["config=configs/sft_tiny.yaml", "experiment.project=runs/unused", "training.max_grad_norm=null"]
    return load_config("sft", [*base, *sgd, *overrides])


def layout_of(*overrides: str, attention: str = "block") -> Layout:
    return Layout(attention, sft_config(*overrides).training)


# ---- records -> responses


def test_a_response_is_filled_up_to_the_end_of_its_block():
    r = as_response([1, 2, 3], [4, 5, 6], [2, 1, 3], 9, layout_of())
    assert r.response_ids.tolist() == [4, 5, 6, 9, 9] and r.step_map.tolist() == [2, 1, 3, 4, 4]
    assert r.is_pad.tolist() == [False] * 3 + [True] * 2 and r.num_trained == 5


def test_a_step_map_may_go_on_over_end_and_fill():
    layout = layout_of()
    record = SFTRecord("x", "p", "r", step_map=[2, 1])
    end = as_training(record, [1, 2, 3], [4, 5, 6], 9, layout)
    assert end.step_map.tolist() == [2, 1, 3, 4, 4], "the end behind what was recorded, the fill behind the end"
    whole = as_training(replace(record, step_map=[3, 2, 1, 1, 2]), [1, 2, 3], [4, 5, 6], 9, layout)
    assert whole.step_map.tolist() == [3, 2, 1, 1, 2]
    for steps in ([1], [1] * 6):
        with pytest.raises(UserError, match="record x: step_map has .* made with another tokenizer or training.block_size"):
            as_training(replace(record, step_map=steps), [1, 2, 3], [4, 5, 6], 9, layout)


def test_a_long_response_is_cut():
    layout = layout_of("training.max_gen_length=2")
    cut = as_training(SFTRecord("x", "p", "r", step_map=[3, 2, 1]), [1, 2, 3], [4, 5, 6], 9, layout)
    assert cut.response_ids.tolist() == [4, 5, 9, 9, 9] and cut.step_map.tolist() == [3, 2, 4, 4, 4]
    assert cut.num_trained == 2, "no stop token stands before the fill: it is not what follows"
    whole = as_training(SFTRecord("x", "p", "r"), [1, 2, 3], [4, 5], 9, layout)
    assert whole.response_ids.tolist() == [4, 5, 9, 9, 9] and whole.num_trained == 5


def test_a_rollout_keeps_what_stands_behind_its_stop():
    record = SFTRecord("x", "", "", [1, 2, 2, 1, 3], None, False, [1, 2, 3], [4, 5, 6, 7, 8], 2)
    r = as_training(record, record.prompt_ids, record.response_ids, 9, layout_of("training.block_size=16"))
    assert r.response_ids.tolist() == [4, 5, 6, 7, 8] + [9] * 8 and r.num_trained == 2 and r.is_pad is None
    assert r.step_map.tolist() == [1, 2, 2, 1, 3] + [0] * 8


def test_ids_beyond_the_vocabulary_are_refused():
    model = tiny_model(0)
    record = SFTRecord("x", "", "", None, None, False, [1], [2, 99], 2)
    with pytest.raises(UserError, match="record x: token id 99 is beyond the model's 32"):
        build_responses(sft_config(), model, [record], "data", tell=False)


def test_targets_that_are_never_sampled_are_refused():
    model = tiny_model(0)
    mask, last = model.mask_id, model.decoder.config.vocab_size - 1
    assert last in model.forbidden_ids and last != mask
    rollout = SFTRecord("x", "", "", [1, 1, 0, 1], None, False, [1, 2, 3, 4], [2, 3, mask, 4], 4)
    for record, what in [
        (rollout, f"token id {mask}, the mask token"),
        (replace(rollout, response_ids=[2, 3, last, 4]), f"token id {last}, beyond the tokenizer"),
    ]:
        with pytest.raises(UserError, match=f"record x: its response holds {what}"):
            build_responses(sft_config(), model, [record], "data", tell=False)
    # Where it is not trained it may stand: behind the stop, or, along the steps, where nothing was ever revealed.
    build_responses(sft_config(), model, [replace(rollout, num_response=2)], "data", tell=False)
    build_responses(sft_config("training.method=trace"), model, [rollout], "data", tell=False)
    text = SFTRecord("y", "s52=", "2" + model.tokenizer.convert_ids_to_tokens(mask))
    with pytest.raises(UserError, match="record y: its response holds .*, the mask token"):
        build_responses(sft_config(), model, [text], "data", tell=False)


def test_an_end_that_does_not_end_sampling_is_warned_of(capsys):
    model = tiny_model(0)
    warn_of_end(sft_config(), model)
    assert not capsys.readouterr().err
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    warn_of_end(sft_config("dataset.data_type=math"), model)
    assert "responses are ended with '<|im_end|>', which does not end an answer" in capsys.readouterr().err
    warn_of_end(sft_config("dataset.data_type=math", "rollout.stop_token_list=['<|im_end|>']"), model)
    assert not capsys.readouterr().err


# ---- masks


def masks(prompt: int = 6, length: int = 10, times: int = 400, seed: int = 1, **changes: Any) -> Any:
    overrides = [f"training.{name}={value}" for name, value in {"mask_times_per_sample": times, **changes}.items()]
    response = Response(np.arange(prompt), np.arange(length), length)
    return semi_ar_slices(response, 4, sft_config(*overrides).training, np.random.default_rng(seed))


def test_the_ratio_is_of_a_block_a_token_or_the_response():
    """With ratios of almost 0 or almost 1 alone, what shares a ratio is masked together."""
    shares = {}
    for kind in ("per_block", "per_token", "per_response"):
        trace = masks(prompt=4, length=8, mask_ratio=kind, lower_p=0.0, upper_p=1.0)
        hidden = np.zeros((400, 2, 4), bool)
        hidden[trace.rank, trace.block - 1] = trace.hidden
        counts = hidden.sum(axis=2)  # [T, W]
        shares[kind] = (np.bincount(counts.ravel(), minlength=5) / counts.size, np.corrcoef(counts.T)[0, 1])
    # A ratio that is uniform in [0, 1] makes every number of masked tokens equally likely; without a shared one it is binomial.
    assert shares["per_block"][0] == pytest.approx([0.2] * 5, abs=0.05) and abs(shares["per_block"][1]) < 0.15
    assert shares["per_response"][0] == pytest.approx([0.2] * 5, abs=0.07) and shares["per_response"][1] > 0.5
    assert shares["per_token"][0] == pytest.approx([1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16], abs=0.05)
    assert abs(shares["per_token"][1]) < 0.15


def test_ratios_stay_between_their_bounds():
    trace = masks(prompt=4, length=8, lower_p=0.75, upper_p=0.75)
    assert trace.hidden.sum() / (400 * 8) == pytest.approx(0.75, abs=0.03)


def test_complementary_masks_train_every_token_once_per_pair():
    trace = masks(times=5, complementary_mask=True)
    for pair in range(5):
        own = trace.select(trace.rank // 2 == pair)
        positions = (own.block[:, None] * 4 + np.arange(4))[own.predicted]
        assert sorted(positions) == list(range(6, 16))


def test_weights_are_one_over_the_masked_share_of_the_response_tokens_of_the_block():
    trace = masks(prompt=6, length=10, loss_weight_by_ratio=True)
    in_block = np.where(trace.block == 1, 2, 4)  # two prompt tokens stand in the first block
    assert (trace.weight * trace.hidden.sum(axis=1) == in_block).all() and len(np.unique(trace.weight)) == 4
    assert (masks(prompt=6, length=10).weight == 1).all()


def test_the_weighted_loss_is_the_likelihood_bound():
    """For any loss of a token in a mask: mean over masks of the weighted sum = n/(n+1) of the bound, the integral over t of
    1/t times the expected loss, by summing over all 2^n masks."""
    n, rng = 4, np.random.default_rng(0)
    every = (np.arange(2**n)[:, None] >> np.arange(n)) & 1 == 1  # [2^n, n]
    loss = np.where(every, rng.random((2**n, n)), 0).sum(axis=1)  # of the masked tokens
    m = every.sum(axis=1)
    t = (np.arange(200_000) + 0.5) / 200_000
    bound = sum(loss[i] * np.mean(t ** (m[i] - 1.0) * (1 - t) ** (n - m[i])) for i in range(1, 2**n))
    trace = masks(prompt=4, length=n, times=20_000, lower_p=0.0, upper_p=1.0, loss_weight_by_ratio=True)
    drawn = (trace.weight * loss[(trace.hidden * 2 ** np.arange(n)).sum(axis=1)]).sum() / 20_000
    assert drawn == pytest.approx(bound * n / (n + 1), rel=0.02)


RATIO = ["training.lower_p=0", "training.upper_p=1", "training.loss_weight_by_ratio=true"]
WEIGHTS_OF_THE_BOUND = [
    ("llada", "random_masking", "constant", False),
    ("llada", "random_masking", "response", True),
    ("llada", "semi-ar", "constant", False),
    ("sdar", "semi-ar", "reference", False),
    ("sdar", "semi-ar", "constant", True),
    ("sdar", "semi-ar", "response", True),
]


@pytest.mark.parametrize("family, method, loss_weighting, is_complementary", WEIGHTS_OF_THE_BOUND)
def test_the_weights_of_an_update_are_those_of_the_likelihood_bound(family, method, loss_weighting, is_complementary):
    """Every number of masked tokens of a block, 1 to n, gets the same share of the update's weight, 1/n: all are equally likely,
    and a block weighs n whatever is masked. Updates of one response with one mask, where any division by m shows."""
    n, num_updates = 8, 6000
    changes = [f"training.method={method}", f"training.loss_weighting={loss_weighting}", "training.max_gen_length=8"]
    changes += [f"model.model_base={family}", "training.block_size=8", f"training.complementary_mask={is_complementary}"]
    layout = layout_of(*changes, *RATIO, attention="full" if family == "llada" else "block")
    response, generator = Response(np.arange(n), np.arange(n), n), np.random.default_rng(3)
    shares = np.zeros(n + 1)
    for _ in range(num_updates):
        document = layout.document(0, response, generator)
        if document is None:
            continue
        predictions = number([document])
        weights_of = token_weights(predictions, loss_weighting, n, n, layout.attention)
        num_masked = document.trace.hidden.sum(axis=1)[predictions.slice]
        shares += np.bincount(num_masked, weights_of, minlength=n + 1)
    assert shares[1:] / shares.sum() == pytest.approx([1 / n] * n, rel=0.15)


# ---- updates


@pytest.fixture(scope="module")
def accelerator():
    forget_accelerator()
    yield dist.make_accelerator(sft_config())
    forget_accelerator()


PAIRS = ["training.mask_times_per_sample=2", "training.complementary_mask=true"]
LONG = ["training.max_gen_length=1000", "training.loss_weight_by_ratio=true", *PAIRS]


def long_responses(layout: Layout) -> list[Response]:
    """One that is far longer than the small budgets below, and two short ones."""
    rng = np.random.default_rng(4)
    texts = [(7, 150), (3, 5), (10, 9)]
    return [as_response(rng.integers(0, 25, p).tolist(), rng.integers(0, 25, n).tolist(), None, 25, layout) for p, n in texts]


def one_step(accelerator: Any, budget: int, *overrides: str) -> dict[str, Any]:
    config = sft_config(f"training.max_tokens_per_microbatch={budget}", *overrides)
    model = tiny_model(7)
    trainer = policy_trainer(model, config, accelerator)
    documents = build_documents(long_responses(trainer.layout), trainer.layout, [1])
    predictions = number(documents)
    table = token_weights(predictions, "reference", 150, 1000)
    with kept_gradients() as steps:
        result = trainer.step(documents, Tables(np.zeros(len(table)), table, np.zeros(len(table))), likelihood, 0.0)
    sizes = [len(pack.input_ids) for pack in trainer.micro_batches(documents)]
    kept = {"loss": result.loss, "gradients": steps[0], "weights": weights(model)}
    return {**kept, "sizes": sizes, "documents": documents, "table": table}


@pytest.fixture(scope="module")
def whole(accelerator) -> dict[str, Any]:
    result = one_step(accelerator, 100_000, *LONG)
    assert len(result["sizes"]) == 1
    return result


@pytest.mark.parametrize("budget", [600, 250, 180])
def test_a_long_document_in_parts_is_the_same_update(accelerator, whole, budget):
    """Its gradient is summed over the parts; 180 leaves the last parts room for five slices beside the text before them."""
    result = one_step(accelerator, budget, *LONG, "training.gradient_checkpointing_enable=true", "training.head_chunk=7")
    assert len(result["sizes"]) > 1 and max(result["sizes"]) <= budget
    assert result["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert error(result["gradients"], whole["gradients"]) < 2e-6
    assert error(result["weights"], whole["weights"]) < 1e-6


def test_the_loss_is_that_of_one_forward_per_slice(whole):
    """Each slice alone behind its clean text, with the block-causal mask."""
    model, total, index = tiny_model(7), 0.0, 0
    with torch.no_grad():
        for document in whole["documents"]:
            trace = document.trace
            for block, hidden, predicted in zip(trace.block, trace.hidden, trace.predicted, strict=True):
                end = (block + 1) * 4
                ids = torch.tensor(document.ids[:end])
                seen = ids.clone()
                seen[end - 4 :][torch.tensor(hidden)] = model.mask_id
                block_of = torch.arange(end) // 4
                states = model.decoder(seen, torch.arange(end), masked_attention(block_of[:, None] >= block_of))
                logits = states[end - 4 :] @ model.decoder.lm_head.weight.T
                logits[:, model.forbidden_ids] = -torch.inf
                logp = logits.log_softmax(-1).gather(1, ids[end - 4 :, None])[:, 0].numpy()[predicted]
                total -= float((whole["table"][index : index + len(logp)] * logp).sum())
                index += len(logp)
    assert index == len(whole["table"]) and whole["loss"] == pytest.approx(total, rel=1e-5)


def test_the_budget_that_cuts_too_much_is_warned_of(capsys):
    layout = layout_of("training.max_tokens_per_microbatch=150", "training.max_gen_length=1000")
    warn_of_cuts(long_responses(layout), layout)
    said = capsys.readouterr().err
    assert "training.max_tokens_per_microbatch=150: the longest document has" in said and len(said.splitlines()) == 1
    layout.training.max_tokens_per_microbatch = 400
    warn_of_cuts(long_responses(layout), layout)
    assert not capsys.readouterr().err


# ---- validation


def test_the_validation_loss_is_the_loss_of_an_update_on_it(accelerator):
    config = sft_config("training.max_tokens_per_microbatch=300", *LONG)
    model = tiny_model(7)
    trainer = policy_trainer(model, config, accelerator)
    responses = long_responses(trainer.layout)
    validation = Validation(responses, trainer.layout)
    before = weights(model)
    first = validation(trainer)
    assert first == validation(trainer), "the masks are the same every time"
    assert all(torch.equal(before[name], w) for name, w in weights(model).items())
    documents = build_documents(responses, trainer.layout, [0, 1])
    longest = max(len(r.response_ids) for r in responses)
    table = token_weights(number(documents), "reference", longest, config.training.max_gen_length)
    result = trainer.step(documents, Tables(np.zeros(len(table)), table, np.zeros(len(table))), likelihood, 0.0)
    assert first["eval/validation_loss"] == pytest.approx(result.loss, rel=1e-5)
    assert first["eval/validation_nll"] == pytest.approx(result.means["nll"], rel=1e-5)
    assert first["eval/validation_perplexity"] == pytest.approx(np.exp(result.means["nll"]), rel=1e-5)
    assert validation(trainer)["eval/validation_loss"] < first["eval/validation_loss"], "a step on it lowers it"


def test_other_seeds_have_other_masks():
    first, second = (layout_of(f"training.seed={seed}", "training.max_gen_length=1000") for seed in (1, 2))
    hidden = [
        np.concatenate([d.trace.hidden.ravel() for d in Validation(long_responses(layout), layout).documents])
        for layout in (first, first, second)
    ]
    assert np.array_equal(hidden[0], hidden[1]) and not np.array_equal(hidden[0], hidden[2])


def test_a_fingerprint_is_of_tokens_and_steps():
    layout = layout_of()
    one, other = ([as_response([1, 2, 3], [4, n], [1, 2], 9, layout)] for n in (5, 6))
    steps = [as_response([1, 2, 3], [4, 5], [2, 1], 9, layout)]
    assert len({fingerprint(one), fingerprint(other), fingerprint(steps), fingerprint(one + other)}) == 4
    assert fingerprint(one) == fingerprint([as_response([1, 2, 3], [4, 5], [1, 2], 9, layout)])


def test_a_fingerprint_is_of_what_is_trained():
    record = SFTRecord("x", "", "", [1, 2, 2, 1, 3], None, False, [1, 2, 3], [4, 5, 6, 7, 8], 2)
    rollouts = [as_training(replace(record, num_response=n), [1, 2, 3], [4, 5, 6, 7, 8], 9, layout_of()) for n in (2, 4)]
    text = as_response([1, 2, 3], [4, 5, 6, 7, 8], [1, 2, 2, 1, 3], 9, layout_of())
    other = replace(text, is_pad=np.arange(5) > 3)
    assert len({fingerprint([response]) for response in (*rollouts, text, other)}) == 4


def test_a_ratio_that_counts_twice_is_refused():
    for family, weighting in [("llada", "reference"), *((f, w) for f in ("llada", "sdar") for w in ("step", "response"))]:
        with pytest.raises(UserError, match=f"loss_weight_by_ratio: got true with loss_weighting={weighting}, .* constant"):
            sft_config(f"model.model_base={family}", f"training.loss_weighting={weighting}", *RATIO)
    for weighting in ("step", "reference"):  # the complement is a row of its own
        with pytest.raises(UserError, match="weighs by 1/ratio already"):
            sft_config("model.model_base=llada", f"training.loss_weighting={weighting}", "training.complementary_mask=true", *RATIO)


def test_both_kinds_of_validation_data_contradict_each_other(tmp_path: Path):
    with pytest.raises(UserError, match="training.validation_share: got 0.1, but dataset.validation_data"):
        sft_config("training.validation_share=0.1", "dataset.validation_data=tiny_sort_test")
    with pytest.raises(UserError, match="training.complementary_mask: got true, but method trace draws no masks"):
        sft_config("training.method=trace", "training.complementary_mask=true")

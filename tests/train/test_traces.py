"""Slices by hand: what each slice hides and predicts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from common.errors import UserError
from train.layout import Layout
from train.methods.coupled import coupled_mask_slices
from train.methods.random_masking import random_mask_slices
from train.methods.semi_ar import semi_ar_slices
from train.methods.tracerl import trace_slices
from train.returns import NOT_TRAINED, response_times
from train.traces import Response, dense_rank, limit_pads


def training(**changes):
    masks = {"lower_p": 0.1, "upper_p": 0.9, "mask_times_per_sample": 1, "mask_ratio": "per_block"}
    pairs = {"complementary_mask": False, "loss_weight_by_ratio": False}
    return SimpleNamespace(**{"shrink": 1, "post_num": None, **masks, **pairs, **changes})


def response(prompt_length, step_map, num_trained=None, is_pad=None):
    n = len(step_map)
    return Response(
        np.arange(100, 100 + prompt_length),
        np.arange(n),
        n if num_trained is None else num_trained,
        np.array(step_map),
        None if is_pad is None else np.array(is_pad),
    )


def show(trace):
    """Rows as text: # predicted, ? hidden only, . visible."""
    return [
        (int(b), int(k), "".join("#" if p else "?" if h else "." for h, p in zip(hidden, predicted, strict=True)))
        for b, k, hidden, predicted in zip(trace.block, trace.rank, trace.hidden, trace.predicted, strict=True)
    ]


def test_dense_rank():
    assert dense_rank(np.array([[7, 3, 3, 9], [5, 5, 5, 5]])).tolist() == [[1, 0, 0, 2], [0, 0, 0, 0]]


def test_every_step_of_every_block_is_a_slice():
    trace = trace_slices(response(4, [2, 1, 1, 3, 4, 4, 4, 4]), 4, training(), None)
    assert show(trace) == [(1, 0, "?##?"), (1, 1, "#..?"), (1, 2, "...#"), (2, 0, "####")]


def test_prompt_tokens_in_the_first_block_are_visible_and_take_no_rank():
    trace = trace_slices(response(6, [2, 1, 3, 3, 4, 5]), 4, training(), None)
    assert show(trace) == [(1, 0, "..?#"), (1, 1, "..#."), (2, 0, "##??"), (2, 1, "..#?"), (2, 2, "...#")]


def test_shrink_joins_distinct_steps():
    trace = trace_slices(response(0, [4, 1, 3, 2, 5, 5, 6, 7]), 4, training(shrink=2), None)
    assert show(trace) == [(0, 0, "?#?#"), (0, 1, "#.#."), (1, 0, "###?"), (1, 1, "...#")]


def test_tokens_behind_the_stop_are_context():
    # Position 1 is the stop: 2 and 3 are shown and hidden as they were, never predicted.
    trace = trace_slices(response(0, [1, 3, 2, 3], num_trained=2), 4, training(), None)
    assert show(trace) == [(0, 0, "#???"), (0, 2, ".#.?")]


def test_a_token_that_was_never_revealed_is_a_mask_in_every_slice():
    trace = trace_slices(response(0, [1, 0, 2, 0]), 4, training(), None)
    assert show(trace) == [(0, 0, "#???"), (0, 1, ".?#?")]


def test_post_num_counts_pads_of_one_row_over_all_blocks():
    pads = [False, False, True, True, True, True, True, True]
    trace = trace_slices(response(0, [1, 1, 2, 2, 3, 3, 3, 3], is_pad=pads), 4, training(post_num=1), None)
    # Row 0 trains two real tokens and then one pad, the first of block 1; row 1 one pad of block 0.
    assert show(trace) == [(0, 0, "##??"), (0, 1, "..#?"), (1, 0, "#???")]


def test_limit_pads_none_keeps_all():
    predicted = np.ones((2, 2), bool)
    assert limit_pads(predicted, np.array([0, 0]), np.ones((2, 2), bool), None).all()


def test_every_response_token_is_predicted_once():
    rng = np.random.default_rng(0)
    for block_size in (1, 2, 4, 8):
        for prompt in range(block_size + 1):
            length = -prompt % block_size + 3 * block_size
            r = response(prompt, rng.integers(1, 9, length))
            trace = trace_slices(r, block_size, training(shrink=int(rng.integers(1, 4))), None)
            positions = (trace.block[:, None] * block_size + np.arange(block_size))[trace.predicted]
            assert sorted(positions - prompt) == list(range(length))


def test_random_masks_predict_what_they_hide_and_never_the_prompt():
    r = response(6, [1] * 10)
    trace = random_mask_slices(r, 4, training(mask_times_per_sample=50), np.random.default_rng(1))
    assert (trace.hidden == trace.predicted).all()
    first = trace.block == 1
    assert not trace.hidden[first][:, :2].any()
    share = trace.hidden[trace.block > 1].mean()
    assert 0.4 < share < 0.75  # slices without a mask are left out
    assert trace.rank.max() == 49


def test_a_response_that_ends_inside_a_block_is_refused():
    with pytest.raises(UserError, match="inside a block"):
        trace_slices(response(3, [1, 2]), 4, training(), None)


def test_a_missing_step_map_is_refused():
    with pytest.raises(UserError, match="step map"):
        trace_slices(Response(np.arange(4), np.arange(4), 4), 4, training(), None)


def test_a_coupled_pair_predicts_every_token_once():
    r = response(6, [1] * 10, num_trained=9)
    trace = coupled_mask_slices(r, 4, training(mask_times_per_sample=3), np.random.default_rng(1))
    for pair in range(3):
        own = trace.select(trace.rank // 2 == pair)
        positions = (own.block[:, None] * 4 + np.arange(4))[own.predicted]
        assert sorted(positions - 6) == list(range(9))


# -- full attention: prompt and response are one block


def canvas(r, method="TraceRL", seed=0, **changes):
    layout = Layout("full", training(method=method, **changes))
    return layout.document(0, r, np.random.default_rng(seed)).trace


def test_steps_of_a_canvas_are_those_of_the_response():
    trace = canvas(response(2, [2, 1, 1, 4, 9, 0], num_trained=4))
    # Behind the stop (position 3) tokens were sampled too: they have ranks, and are seen from their step on. The last never was.
    assert show(trace) == [(0, 0, "..?##???"), (0, 1, "..#..???"), (0, 2, ".....#??")]
    trace = canvas(response(2, [2, 1, 1, 4, 9, 0], num_trained=4), shrink=2)
    assert show(trace) == [(0, 0, "..###???"), (0, 1, ".....#??")]


def test_times_of_returns_are_the_slices():
    """Steps are joined alike; a token that was never revealed comes last, and names no step."""
    layout = Layout("full", training(method="TraceRL", shrink=2))
    r = response(2, [2, 1, 5, 4, 9, 0])
    times = response_times(layout.grid(r), r.step_map, np.ones(6, bool), 2)
    assert times.tolist() == [2, 2, 5, 5, 9, NOT_TRAINED]


def test_of_the_pads_of_a_canvas_the_first_are_trained_wherever_they_are_revealed():
    pads = [False, False, True, True, True]
    r = response(1, [1, 2, 3, 1, 2], is_pad=pads)
    assert show(canvas(r, post_num=1)) == [(0, 0, ".#????"), (0, 1, "..#?.?"), (0, 2, "...#..")]
    assert canvas(r, post_num=None).predicted.sum() == 5 and canvas(r, post_num=0).predicted.sum() == 2


@pytest.mark.parametrize("method", ["random_masking", "coupled"])
def test_random_masks_of_a_canvas_hide_all_that_is_not_trained_behind_the_response(method):
    r = response(3, [1] * 8, num_trained=5)
    trace = canvas(r, method, mask_times_per_sample=40)
    assert not trace.hidden[:, :3].any() and trace.hidden[:, 8:].all() and not trace.predicted[:, 8:].any()
    assert (trace.hidden[:, :8] == trace.predicted[:, :8]).all()
    assert 0 < trace.predicted[:, 3:8].mean() < 1 and len(np.unique(trace.rank)) == len(trace.rank)
    if method == "coupled":
        pairs = [trace.predicted[trace.rank // 2 == pair].sum(axis=0)[3:8].tolist() for pair in range(40)]
        assert pairs == [[1] * 5] * 40


def test_semi_autoregressive_canvases():
    """Blocks of two from the start of the response: clean before, masked behind as far as the canvas goes, the last one shorter."""
    r = response(3, [1] * 7, num_trained=6)
    trace = canvas(r, "semi-ar", block_size=2, lower_p=1.0, upper_p=1.0)
    assert show(trace) == [(0, 0, "...##?????"), (0, 1, ".....##???"), (0, 2, ".......##?")]
    trace = canvas(r, "semi-ar", block_size=2, mask_times_per_sample=30, complementary_mask=True, loss_weight_by_ratio=True)
    for hidden, predicted, rank, weight in zip(trace.hidden, trace.predicted, trace.rank, trace.weight, strict=True):
        start = 3 + 2 * (rank % 4)
        assert not hidden[:start].any() and hidden[start + 2 :].all() and hidden[9]
        assert not predicted[:start].any() and not predicted[start + 2 :].any()
        assert (hidden[start : start + 2] == predicted[start : start + 2]).all() and weight == 2 / predicted.sum()
    for pair in range(30):  # of a mask and its complement, over all blocks
        assert trace.predicted[trace.rank // 8 == pair].sum(axis=0).tolist() == [0] * 3 + [1] * 6 + [0]
    assert {int(p.sum()) for p in trace.predicted} == {1, 2}
    # A block as wide as the canvas: a row per mask, of the whole response, as under random_masking.
    wide = canvas(r, "semi-ar", block_size=50, mask_times_per_sample=5, seed=3)
    assert 1 < len(wide.rank) == len(np.unique(wide.rank)) <= 5
    assert (wide.hidden[:, :9] == wide.predicted[:, :9]).all() and wide.hidden[:, 9].all()


def test_semi_autoregressive_blocks_of_a_block_model_are_its_slices():
    r, masks = response(6, [1] * 10), training(mask_times_per_sample=5, block_size=4)
    ours, theirs = (method(r, 4, masks, np.random.default_rng(2)) for method in (semi_ar_slices, random_mask_slices))
    assert show(ours) == show(theirs)


def test_next_token_trains_the_response_in_one_row():
    trace = canvas(response(3, [1] * 4, num_trained=3), "ar")
    assert trace.block.tolist() == [3, 4, 5] and trace.reads_clean and (trace.rank == 0).all()
    assert canvas(response(0, [1] * 4), "ar").block.tolist() == [1, 2, 3], "nothing stands before position 0"

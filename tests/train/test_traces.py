"""Slices by hand: what each slice hides and predicts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from common.errors import UserError
from train.methods.coupled import coupled_mask_slices
from train.methods.random_masking import random_mask_slices
from train.methods.tracerl import trace_slices
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

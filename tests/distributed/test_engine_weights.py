"""Weights on their way to the paged engine, two ranks: in place, a layer at a time, at ZeRO-2 not at all; a tied head too."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.harness import run_on_ranks
from tests.train.steps import error

ZERO = {stage: [f"experiment.deepspeed_file=1_node_2_gpus_deepspeed_zero{stage}"] for stage in (2, 3)}
MODES = {"zero2": (ZERO[2], False), "zero3": (ZERO[3], False), "zero3 tied": (ZERO[3], True)}


@pytest.fixture(scope="module")
def of_two_ranks():
    return run_on_ranks("tests.distributed.engine_jobs:steps", 2, {"modes": MODES})


@pytest.mark.parametrize("mode", MODES)
def test_the_paged_engine_samples_with_the_newest_weights(of_two_ranks, mode):
    """Equal to the eager engine over the same weights, and to the trainer's log-probs; ranks sample different requests."""
    assert len(of_two_ranks[0][mode][0]["paged"]) != len(of_two_ranks[1][mode][0]["paged"]) > 0
    for result in of_two_ranks:
        for record in result[mode]:
            for ours, right in zip(record["paged"], record["eager"], strict=True):
                assert ours | {"logprobs": 0} == right | {"logprobs": 0}
                assert ours["logprobs"] == pytest.approx(right["logprobs"], abs=1e-5)
            assert record["gap"] < 1e-4, "the engine sampled with other weights than the trainer's"


@pytest.mark.parametrize("mode", MODES)
def test_what_graphs_hold_the_addresses_of_stays_where_it_is(of_two_ranks, mode):
    for result in of_two_ranks:
        first, *later = result[mode]
        assert first["held"] == first["addresses"]
        for record in later:
            assert record["addresses"] == first["addresses"] == record["held"], "graphs would have been captured anew"
            assert error(record["weights"], first["weights"]) > 1e-3, "the weights have not moved"
    for step in range(3):
        one, other = (result[mode][step]["weights"] for result in of_two_ranks)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_up_to_zero2_nothing_is_copied(of_two_ranks):
    for record in (record for result in of_two_ranks for record in result["zero2"]):
        assert record["is_the_trainers"] and record["gathered"] == []


@pytest.mark.parametrize("mode", ["zero3", "zero3 tied"])
def test_under_zero3_a_layer_at_a_time_is_whole(of_two_ranks, mode):
    """Once per version: embedding, two layers, norm, head."""
    for record in (record for result in of_two_ranks for record in result[mode]):
        assert not record["is_the_trainers"] and len(record["gathered"]) == 5
        assert max(record["gathered"]) <= record["largest_part"] < sum(record["gathered"]) / 2

"""Who samples what: every sample once, on whichever rank is free, with the results of one rank."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from typing import Any

import numpy as np
import pytest

from models.registry import FAMILIES
from sample.engine import Request, SamplingSettings, build_engine
from sample.queue import ListQueue, SharedQueue, Unit, cut_into_units
from tests.distributed.harness import run_on_ranks
from tests.sample.reference import MASK, STOPS, random_decoder, random_requests

MAX_ACTIVE = 3
SETTINGS = SamplingSettings(max_tokens=10, mask_id=MASK, stop_ids=STOPS, forbidden_ids=(MASK,), seed=3)


def model() -> tuple[Any, Any]:
    return random_decoder(), FAMILIES.get("sdar")


def all_of(queue: Any, most: int) -> list[tuple[int, int]]:
    taken = []
    while (unit := queue.take(most)) is not None:
        assert 1 <= len(unit.samples) <= most
        taken += [(unit.request, sample) for sample in unit.samples]
    assert queue.take(most) is None
    return taken


# ---- the lists


@pytest.mark.parametrize("most", [1, 3, 100])
def test_a_list_is_handed_out_in_its_order(most: int):
    requests = [Request("a", [1], 4), Request("b", [2], 1), Request("c", [3], 2)]
    expected = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (2, 1)]
    queue = ListQueue(requests)
    assert queue.share == 7 and all_of(queue, most) == expected
    assert all_of(SharedQueue(requests, 1, itertools.count().__next__), most) == expected
    assert ListQueue([]).share == 0 and ListQueue([]).take(1) is None


def test_a_request_of_no_samples_is_left_out():
    requests = [Request(name, [1], n) for name, n in [("a", 0), ("b", 2), ("c", 0), ("d", 0), ("e", 1), ("f", 0)]]
    for queue in [ListQueue(requests), SharedQueue(requests, 1, itertools.count().__next__)]:
        assert queue.share == 3 and all_of(queue, 100) == [(1, 0), (1, 1), (4, 0)]
    none = ListQueue(requests[2:4])
    assert none.share == 0 and none.take(1) is None


def test_units_by_hand():
    """Two requests of 16 for two ranks: half of what is left for one of them, up to the end of the request."""
    sizes = [8, 6, 2] + [4, 3, 3, 2, 1, 1, 1, 1]
    units = cut_into_units([16, 16], 2)
    assert [len(unit.samples) for unit in units] == sizes
    assert units[2] == Unit(0, range(14, 16)) and units[3] == Unit(1, range(4))
    whole = cut_into_units([4] * 10, 2)[:6]
    assert whole == [Unit(n, range(4)) for n in range(6)], "of the first ones nobody prefills a prompt twice"


def test_the_share_bounds_what_a_rank_takes_at_its_start():
    requests = [Request(f"task {n}", [1], 5) for n in range(3)]
    counter = itertools.count()
    first, second = (SharedQueue(requests, 2, counter.__next__) for _ in range(2))
    assert first.share == second.share == 8
    room, taken = first.share, []
    while room and (unit := first.take(room)):
        taken += unit.samples
        room -= len(unit.samples)
    assert len(taken) == 8 and len(all_of(second, 8)) >= 15 - 8 - 1


# ---- balance, by a simulated clock


def makespan(queues: list[Any], lengths: np.ndarray, slots: int, speeds: list[float]) -> float:
    """When the last of the ranks is done: each works on `slots` sequences at a time, of the given lengths [requests, samples]."""
    now = [(0.0, rank, slot) for rank in range(len(queues)) for slot in range(slots)]  # when a slot of a rank is free
    heapq.heapify(now)
    seen, end = set(), 0.0
    while now:
        time, rank, slot = heapq.heappop(now)
        unit = queues[rank].take(1)
        if unit is None:
            end = max(end, time)
            continue
        [sample] = unit.samples
        assert (unit.request, sample) not in seen
        seen.add((unit.request, sample))
        heapq.heappush(now, (time + lengths[unit.request, sample] / speeds[rank], rank, slot))
    assert len(seen) == lengths.size
    return end


@pytest.mark.parametrize("speeds", [[1, 1, 1, 1], [1, 1, 1, 0.5]])
def test_no_rank_idles_behind_a_long_tail(speeds: list[float]):
    """Nobody is done later than when the work is shared equally and one longest answer comes behind it (Graham's bound of list
    scheduling, 1966); dealt out by index, the work ends later in most draws, and in all of them together."""
    slots, slowest, late = 8, min(speeds), []
    requests = [Request(f"task {n}", [1], 16) for n in range(48)]
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scale = rng.lognormal(5, 1, (48, 1))  # some tasks need long answers
        lengths = np.minimum(scale * rng.lognormal(0, 0.5, (48, 16)), 2000)
        counter = itertools.count()
        shared = makespan([SharedQueue(requests, 4, counter.__next__) for _ in range(4)], lengths, slots, speeds)
        dealt = makespan([_ByIndex(requests, rank, 4) for rank in range(4)], lengths, slots, speeds)
        equal = lengths.sum() / (slots * sum(speeds))
        assert equal <= shared <= equal + lengths.max() / slowest
        late.append((shared / equal - 1, dealt / equal - 1))
    shared, dealt = np.mean(late, 0)
    print(f"later than equal sharing on average: {shared:.1%}, dealt out by index {dealt:.1%}")
    assert shared < dealt / 1.3
    assert sum(a < b for a, b in late) >= 14


class _ByIndex:
    def __init__(self, requests: list[Request], rank: int, num_ranks: int) -> None:
        self.queue, self.rank, self.num_ranks = ListQueue(requests[rank::num_ranks]), rank, num_ranks

    def take(self, most: int) -> Unit | None:
        unit = self.queue.take(most)
        return unit and Unit(self.rank + self.num_ranks * unit.request, unit.samples)


# ---- the engine, and two ranks


def test_the_engine_samples_what_its_queue_hands_out():
    engine = build_engine(*model(), MAX_ACTIVE)
    requests = random_requests([5, 9, 2, 7], num_samples=6)
    alone = {(r.task_id, r.sample): r for r in engine.generate(requests, SETTINGS)}
    assert len(alone) == 24
    counter = itertools.count()
    shares = [engine.generate(requests, SETTINGS, queue=SharedQueue(requests, 2, counter.__next__)) for _ in range(2)]
    assert len(shares[0]) == 24 and shares[1] == []  # the first took it all, three at a time: nobody else came
    assert [(r.task_id, r.sample) for r in shares[0]] == list(alone)
    assert all(alone[r.task_id, r.sample].response_ids == r.response_ids for r in shares[0])
    queue = ListQueue(requests)
    queue.share = 2
    assert len(engine.generate(requests, SETTINGS, queue=queue)) == 24
    assert engine.statistics.mean_active <= 2


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_every_engine_leaves_out_requests_of_no_samples(family: str, kernels: str):
    engine = build_engine(random_decoder(), FAMILIES.get(family), MAX_ACTIVE, kernels)
    requests = random_requests([5, 9, 2, 7], num_samples=2)
    empty = [dataclasses.replace(request, task_id=f"empty {n}", num_samples=0) for n, request in enumerate(requests)]
    mixed = [empty[0], *requests[:2], empty[1], empty[2], *requests[2:], empty[3]]
    assert engine.generate(mixed, SETTINGS) == engine.generate(requests, SETTINGS)
    assert engine.generate(empty, SETTINGS) == []


def test_a_limit_of_each_sample():
    engine = build_engine(*model(), MAX_ACTIVE)
    [prompt] = random_requests([6])
    free = SamplingSettings(max_tokens=12, mask_id=MASK, forbidden_ids=(MASK,), seed=3)
    whole = engine.generate([Request("task 0", prompt.prompt_ids, 3)], free)
    short = engine.generate([Request("task 0", prompt.prompt_ids, 3, max_tokens=(1, 7, 12))], free)
    assert [len(r.response_ids) for r in short] == [2, 10, 14]  # up to the ends of blocks, at positions 8, 16 and 20
    for ours, theirs, limit in zip(short, whole, (1, 7, 12)):
        assert (ours.num_response, ours.finish) == (limit, "length")
        assert ours.response_ids == theirs.response_ids[: len(ours.response_ids)]
    with pytest.raises(AssertionError, match="at least 1"):
        Request("task", [1], max_tokens=0)


SECONDS = [0.01, 0.05]


@pytest.fixture(scope="module")
def two_ranks() -> tuple[list[Request], list[Any], list[list[dict[str, Any]]]]:
    requests = random_requests([5, 9, 2, 7, 6], num_samples=8)
    alone = build_engine(*model(), MAX_ACTIVE).generate(requests, SETTINGS)
    calls = [dict(seconds=SECONDS, deterministic=False)] * 2 + [dict(seconds=SECONDS, deterministic=True)]
    arguments = {"requests": requests, "calls": calls}
    return requests, alone, run_on_ranks("tests.sample.queue_jobs:sample_everything", 2, arguments)


def test_two_ranks_find_what_one_finds(two_ranks: Any):
    _, alone, ranks = two_ranks
    for calls in ranks:
        for call, result in enumerate(calls):
            for ours, theirs in zip(result["rollouts"], alone, strict=True):
                assert (ours.task_id, ours.sample, ours.weights_version) == (theirs.task_id, theirs.sample, call)
                assert (ours.response_ids, ours.step_map, ours.finish) == (theirs.response_ids, theirs.step_map, theirs.finish)
                assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def test_every_sample_is_taken_once_and_the_slow_rank_takes_less(two_ranks: Any):
    requests, _, ranks = two_ranks
    everything = [(n, sample) for n in range(len(requests)) for sample in range(8)]
    for call in range(2):
        fast, slow = (calls[call]["taken"] for calls in ranks)
        print(len(fast), len(slow), ranks[0][call]["busy"])
        assert sorted(fast + slow) == everything
        assert 0 < len(slow) < len(everything) / 2 - 2
    by_index = [[(n, s) for n in range(len(requests[rank::2])) for s in range(8)] for rank in range(2)]
    assert [calls[2]["taken"] for calls in ranks] == by_index


def test_a_dead_rank_does_not_hold_up_the_queue():
    requests = random_requests([5, 9, 2], num_samples=8)
    [left, none] = run_on_ranks("tests.sample.queue_jobs:one_rank_dies", 2, {"requests": requests}, timeout_seconds=60)
    largest = max(len(unit.samples) for unit in cut_into_units([8] * 3, 2))
    assert none == 0 and 24 - largest <= left <= 24

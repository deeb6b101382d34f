"""The paged engine, on its kernels' torch references, against the eager one; its graphs and kernels: test_paged_block_gpu.py."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import random
from types import SimpleNamespace
from typing import Callable

import numpy as np
import pytest
import torch

from common.errors import UserError
from models.decoder import Decoder
from models.registry import FAMILIES
from sample import cuda_graphs, paged_block, paged_state
from sample.block import BlockEngine
from sample.capacity import Capacity, Demand, Waits, commit_capacity, item_bucket, whole_rows
from sample.engine import Request, SamplingSettings, build_engine
from sample.kernels import plan
from sample.paged_block import PagedBlockEngine
from sample.paged_cache import PagedCache
from sample.paged_state import DeviceState, StateSizes
from sample.pages import PAGE, pages_of
from sample.queue import ListQueue, Unit
from sample.slots import Plan, Slots
from tests.sample.reference import random_decoder, random_requests
from tests.sample.test_block import DECODINGS, THRESHOLD, assert_same, settings

SDAR = FAMILIES.get("sdar")


def eager(decoder: Decoder, requests: list[Request], s: SamplingSettings) -> list:
    return BlockEngine(decoder, SDAR, max_active=len(requests)).generate(requests, s)


def assert_equal_to_eager(engine: PagedBlockEngine, requests: list[Request], s: SamplingSettings) -> None:
    for ours, theirs in zip(engine.generate(requests, s), eager(engine.decoder, requests, s), strict=True):
        assert_same(ours, theirs)


def least_pages(requests: list[Request], s: SamplingSettings) -> int:
    longest = max(len(r.prompt_ids) + r.limit(n, s) for r in requests for n in range(r.num_samples))
    return 1 + pages_of(-(-longest // s.block_size) * s.block_size)


def mixed_requests(count: int, seed: int, longest_prompt: int = 150, longest_response: int = 90, samples: int = 4) -> list[Request]:
    """Prompts that span pages, with several samples each and lengths of their own."""
    rng = random.Random(seed)
    requests = random_requests([rng.randrange(1, longest_prompt) for _ in range(count)])
    limits = lambda: tuple(rng.randrange(1, longest_response) for _ in range(rng.randrange(1, samples + 1)))  # noqa: E731
    return [dataclasses.replace(r, num_samples=len(n), max_tokens=n) for r, n in ((r, limits()) for r in requests)]


def smallest_capacity(self: Demand, num_active: int) -> Capacity:
    return Capacity(item_bucket(num_active), 1, self.block_size)


@pytest.mark.parametrize("strategy", ["low_confidence_static", "low_confidence_dynamic", "sequential", "entropy_bounded"])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_equals_the_eager_engine(size: int, strategy: str) -> None:
    """Prompts of every length up to 20, the empty one where scores do not tie; every target, several decodings; slots reused."""
    decoder = random_decoder()
    engine = PagedBlockEngine(decoder, SDAR, max_active=7)
    for n, target in enumerate(THRESHOLD):
        s = settings(
            block_size=size,
            strategy=strategy,
            target=target,
            threshold=THRESHOLD[target],
            entropy_bound=1.5,
            steps_per_block=[size, max(1, size // 2), min(3, size)][n % 3],
            **DECODINGS[(n + size) % len(DECODINGS)],
        )
        first = 0 if strategy == "sequential" or target == "random" and strategy != "entropy_bounded" else 1
        assert_equal_to_eager(engine, random_requests(list(range(first + n % 2, 21, 2))), s)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("strategy", ["low_confidence_static", "low_confidence_dynamic"])
def test_results_do_not_depend_on_capacities(size: int, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one commit and one block's masked rows, most sequences wait most of the time."""
    decoder = random_decoder(1)
    requests = random_requests([5, 12, 3, 9, 66, 20], num_samples=2)
    s = settings(block_size=size, strategy=strategy, threshold=0.3)
    monkeypatch.setattr(Demand, "capacity", smallest_capacity)
    engine = PagedBlockEngine(decoder, SDAR, max_active=8)
    assert_equal_to_eager(engine, requests, s)
    assert engine.statistics.stalled > engine.statistics.sequence_forwards


def test_the_smallest_cache_serves_many_requests() -> None:
    """Every page comes back (`finish` asserts it); one page less is refused with the numbers."""
    decoder = random_decoder(2)
    requests = mixed_requests(6, seed=3, longest_response=60)
    s = settings(strategy="low_confidence_dynamic", threshold=0.3, stop_ids=())
    least = least_pages(requests, s)
    engine = PagedBlockEngine(decoder, SDAR, max_active=8, cache_pages=least)
    assert_equal_to_eager(engine, requests, s)
    assert engine.cache.num_pages == least
    assert 1 < engine.statistics.mean_active < 7
    with pytest.raises(UserError, match=rf"got {least - 1}.*needs {least} pages"):
        PagedBlockEngine(decoder, SDAR, max_active=8, cache_pages=least - 1).generate(requests, s)
    roomy = PagedBlockEngine(decoder, SDAR, max_active=8)
    for ours, theirs in zip(roomy.generate(requests, s), engine.generate(requests, s), strict=True):
        assert_same(ours, theirs)
    assert roomy.cache.num_pages <= 1 + 8 * (least - 1)


@pytest.mark.slow
def test_a_thousand_requests_in_a_third_of_their_cache() -> None:
    requests = mixed_requests(1024, seed=5, samples=2)
    s = settings(strategy="low_confidence_dynamic", threshold=0.3)
    decoder = random_decoder(2)
    least = least_pages(requests, s)
    expected = eager(decoder, requests, s)
    for cache_pages in [32 * least // 3, least]:
        engine = PagedBlockEngine(decoder, SDAR, max_active=32, cache_pages=cache_pages)
        for ours, theirs in zip(engine.generate(requests, s), expected, strict=True):
            assert_same(ours, theirs)
    engine = PagedBlockEngine(decoder, SDAR)
    alone = [rollout for request in requests[::8] for rollout in engine.generate([request], s)]
    together = {(r.task_id, r.sample): r for r in expected}
    for ours in alone:
        assert_same(ours, together[ours.task_id, ours.sample])


def test_prompts_are_computed_once_and_shared() -> None:
    decoder = random_decoder()
    engine = PagedBlockEngine(decoder, SDAR, max_active=3)
    requests = random_requests([2 * PAGE, PAGE + 9, 130], num_samples=5)
    assert_equal_to_eager(engine, requests, settings())
    assert engine.statistics.prefill_tokens == 2 * PAGE + PAGE + 8 + 128
    assert engine.statistics.sequences == 15


def test_prefills_are_packed_up_to_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    prefill = paged_block.prefill_attention
    monkeypatch.setattr(paged_block, "prefill_attention", lambda *args: calls.append(args[4].tolist()) or prefill(*args))
    monkeypatch.setattr(paged_block, "PREFILL_TOKENS", 40)
    engine = PagedBlockEngine(random_decoder(), SDAR)
    assert_equal_to_eager(engine, random_requests([13, 21, 8, 3, 61, 5]), settings())
    assert calls[::2] == [[12, 20, 8], [60], [4]]  # once per layer


def test_memory_is_kept_free_for_the_largest_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of PREFILL_TOKENS, or of one longer prompt, which is computed in one forward."""
    kept = []
    take = PagedCache.take
    monkeypatch.setattr(PagedCache, "take", lambda self, *args: kept.append(args[2]) or take(self, *args))
    monkeypatch.setattr(paged_block, "PREFILL_TOKENS", 40)
    engine = PagedBlockEngine(random_decoder(), SDAR)
    for lengths in ([13, 38], [7, 61]):  # of the longest, 36 and 60 tokens are whole blocks
        engine.generate(random_requests(lengths), settings(max_tokens=4))
    row = 4 * (6 * 48 + 4 * 4 * 8 + 8 * 32)
    logits = 2 * (2 * 4 * 24 * 4)  # two sequences, blocks of 4, 24 ids, float32
    assert kept == [40 * row + logits, 60 * row + logits]


def test_memory_is_kept_free_for_large_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 sequences of blocks of 64, four steps a block: 40 x 64 rows, of which 2,048 need none. Each has its 3 pages' part."""
    kept = []
    take = PagedCache.take
    monkeypatch.setattr(PagedCache, "take", lambda self, *args: kept.append(args[3]) or take(self, *args))
    s = settings(block_size=64, steps_per_block=4, max_tokens=64)
    requests = random_requests([65], num_samples=32)
    row = 4 * (6 * 48 + 4 * 4 * 8 + 8 * 32)
    for cache_pages in (None, 10):  # that there are fewer pages, each for as many rows, changes nothing
        PagedBlockEngine(random_decoder(), SDAR, cache_pages=cache_pages).generate(requests, s)
        assert kept.pop() == (40 * 64 - 2048) * row // (1 + 32 * 3)
    PagedBlockEngine(random_decoder(), SDAR).generate(requests, dataclasses.replace(s, block_size=4, steps_per_block=1))
    assert kept == [0]


def test_results_are_fetched_when_their_rows_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_state, "RESULT_POSITIONS", 1)
    engine = PagedBlockEngine(random_decoder(), SDAR, max_active=2)
    assert_equal_to_eager(engine, mixed_requests(9, seed=1), settings())
    assert len(engine.device_state.results.tokens) == 4 < engine.statistics.sequences


def test_state_and_cache_grow_from_call_to_call() -> None:
    engine = PagedBlockEngine(random_decoder(), SDAR, max_active=6)
    for lengths, max_tokens, size in [([5, 9], 6, 4), ([5, 100, 7, 3, 8], 80, 4), ([5, 9], 6, 4), ([3], 11, 2), ([3], 11, 4)]:
        s = settings(max_tokens=max_tokens, block_size=size)
        assert_equal_to_eager(engine, random_requests(lengths, num_samples=2), s)


def test_new_weights_are_seen_and_the_cache_is_released() -> None:
    decoder = random_decoder()
    engine = PagedBlockEngine(decoder, SDAR)
    requests, s = random_requests([6, 9, 70]), settings(temperature=0.0)
    assert {r.weights_version for r in engine.generate(requests, s, weights_version=3)} == {3}
    for parameter in decoder.parameters():
        parameter.copy_(parameter.roll(1, 0))
    engine.release()
    assert engine.cache.num_pages == 0
    assert_equal_to_eager(engine, requests, s)


def test_an_interrupted_call_leaves_a_working_engine() -> None:
    engine = PagedBlockEngine(random_decoder(), SDAR, max_active=4)
    requests, s = random_requests([6, 9, 70, 3, 12], num_samples=2), settings()

    def interrupt(finished: int, tokens: int, forwards: int) -> None:
        if finished:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(requests, s, progress=interrupt)
    assert_equal_to_eager(engine, requests, s)


def test_progress_and_statistics() -> None:
    calls = []
    engine = PagedBlockEngine(random_decoder(), SDAR, max_active=3)
    rollouts = engine.generate(random_requests([6, 7, 8, 9]), settings(), progress=lambda *args: calls.append(args))
    tokens, forwards = sum(len(r.response_ids) for r in rollouts), sum(r.num_forwards for r in rollouts)
    assert calls[-1] == (4, tokens, forwards)
    statistics = engine.statistics
    # What is known is a step late: nothing after the first step, and a last step that has nothing to do.
    assert calls[0] == (0, 0, 0) and len(calls) == statistics.engine_forwards + 1
    assert statistics.tokens_per_forward == tokens / forwards and statistics.stalled == 0
    blocks = sum((len(r.prompt_ids) + len(r.response_ids)) // 4 - len(r.prompt_ids) // 4 for r in rollouts)
    assert statistics.commit_items == blocks - 4  # a sequence's last block is never committed


class SomeOfTheList(ListQueue):
    """What another rank has left of a list."""

    def __init__(self, requests: list[Request], units: list[Unit]) -> None:
        super().__init__(requests)
        self._left.clear()
        self._left.extend(units)


def test_a_queue_says_what_is_sampled() -> None:
    decoder = random_decoder()
    requests, s = random_requests([6, 70, 8, 9], num_samples=5), settings()
    units = [Unit(0, range(2, 5)), Unit(1, range(1, 2)), Unit(1, range(3, 5)), Unit(3, range(0, 5))]
    engine = PagedBlockEngine(decoder, SDAR, max_active=4)
    expected = {(r.task_id, r.sample): r for r in eager(decoder, requests, s)}
    rollouts = engine.generate(requests, s, queue=SomeOfTheList(requests, units))
    assert [(r.task_id, r.sample) for r in rollouts] == [(f"task {unit.request}", n) for unit in units for n in unit.samples]
    for ours in rollouts:
        assert_same(ours, expected[ours.task_id, ours.sample])
    assert engine.generate(requests, s, queue=SomeOfTheList(requests, [])) == []


@pytest.mark.parametrize("size, most", [(1, 1984), (4, 1984), (64, 1984), (128, 1984), (160, 1600), (256, 960)])
def test_no_more_are_in_flight_than_a_plan_has_numbers_for(size: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert paged_block.most_in_flight(size) == most == item_bucket(most)
    launched = []

    def launch(grid: tuple[int], options: dict) -> None:
        launched.append(grid)
        assert options["ITEMS"] * options["STEP"] <= plan.AT_A_TIME  # or compiling it takes minutes

    kernel = type("Kernel", (), {"__getitem__": lambda self, grid: lambda *args, **options: launch(grid, options)})()
    monkeypatch.setattr(plan, "plan_kernel", kernel)
    monkeypatch.setattr(plan, "triton", SimpleNamespace(next_power_of_2=lambda n: 1 << (n - 1).bit_length()))

    def make(n: int) -> None:
        slots, table = Slots.empty(n, size, "cpu"), torch.zeros(n, 1, dtype=torch.int32)
        plan.make_plan_kernel(slots, table, Plan.empty(n, n, n * size, size, "cpu"))

    make(most)
    with pytest.raises(AssertionError):
        make(item_bucket(most + 1))
    assert launched == [(most,)]


def test_any_max_active_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where more could be in flight than a plan takes, the rest waits; results are the same."""
    sizes = []
    launch = paged_block.Generation.launch
    monkeypatch.setattr(
        paged_block.Generation, "launch", lambda self: sizes.append(len(self.occupant) - len(self.free_slots)) or launch(self)
    )
    decoder, s = random_decoder(), settings(block_size=1, max_tokens=1)
    requests = random_requests([2 + n % 5 for n in range(2100)])
    assert_equal_to_eager(PagedBlockEngine(decoder, SDAR, max_active=2**20), requests, s)
    assert sizes[0] == max(sizes) == 1984 and sum(sizes) >= 2100


def test_which_engine_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = random_decoder()
    assert type(build_engine(decoder, SDAR)) is BlockEngine
    assert type(build_engine(decoder, SDAR, 4, "torch")) is BlockEngine
    assert type(build_engine(decoder, SDAR, 4, "triton")) is PagedBlockEngine
    with pytest.raises(UserError, match="rollout.engine=triton: .*choices: block"):
        build_engine(decoder, dataclasses.replace(SDAR, attention="another"), 4, "triton")

    class OnGpu(type(decoder)):
        device = torch.device("cuda")

    decoder.__class__ = OnGpu
    assert type(build_engine(decoder, SDAR)) is PagedBlockEngine
    assert type(build_engine(decoder, SDAR, 4, "torch")) is BlockEngine
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert type(build_engine(decoder, SDAR)) is BlockEngine
    with pytest.raises(UserError, match="rollout.engine: triton is not installed"):
        build_engine(decoder, SDAR, 4, "triton")


def test_bad_input() -> None:
    engine = PagedBlockEngine(random_decoder(), SDAR)
    assert engine.generate([], settings()) == []
    with pytest.raises(UserError, match="task 9.*below the vocabulary's 24"):
        engine.generate([Request("9", [24])], settings())
    with pytest.raises(UserError, match="shifts its logits"):
        PagedBlockEngine(random_decoder(), dataclasses.replace(SDAR, logit_shift=1))
    diverged = random_decoder()
    diverged.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="diverged"):
        PagedBlockEngine(diverged, SDAR).generate(random_requests([4]), settings())


# ------------------------------------------------------------------------------------------------------------- capacities


def test_buckets_hold_what_they_are_for() -> None:
    assert [item_bucket(n) for n in [1, 2, 3, 5, 17, 32, 33, 64, 65, 100, 128, 129, 200, 256]] == [
        1, 2, 4, 8, 32, 32, 64, 64, 96, 128, 128, 192, 256, 256
    ]  # fmt: skip
    assert [whole_rows(n) for n in [1, 33, 160, 255, 257, 321, 385, 640, 641]] == [32, 64, 160, 256, 320, 384, 512, 640, 768]
    for size in [1, 2, 4, 8, 16, 32]:
        demand = Demand(size, size)
        for active in range(1, 300):
            capacity = demand.capacity(active)
            assert active <= capacity.items and 1 <= capacity.commits <= capacity.items
            assert size <= capacity.head_rows <= capacity.items * size


def test_commit_places_are_few_where_more_would_pad() -> None:
    """128 items at block size 4, in brackets the rows: those of 32 more cost 128 rows, worth it from about a tenth on."""
    assert [commit_capacity(128, 4, needed) for needed in (1, 32, 33, 64, 67.5, 72, 77, 128, 200)] == [
        32, 32, 32, 64, 64, 96, 96, 128, 128
    ]  # (640) (640) (640) (768) (768) (896) (896) (1024) (1024)  # fmt: skip
    # Blocks of 32 and of 64: 8 and 4 commits a step need no more than 32 rows x 136 and 64 x 132.
    assert commit_capacity(128, 32, 8.0) == 8 and commit_capacity(128, 64, 4.0) == 4
    assert commit_capacity(32, 4, 8.4) == 16  # the weights take as long as these rows


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("together", [True, False])
def test_capacities_settle_on_what_is_needed(steps: int, together: bool) -> None:
    """128 sequences of a fixed number of steps per block, begun together or not: soon all run in every step, at the least rows."""
    size, active = 4, 128
    ran, rows = simulated(size, active, lambda n, left: -(-size // steps), [0 if together else n % steps for n in range(active)])
    assert sum(ran[200:]) == 200 * active
    assert set(rows[200:]) == {(active + active // steps) * size}


@pytest.mark.parametrize("size, active, reveal", [(16, 256, 2), (32, 256, 2), (64, 128, 2), (64, 256, 4)])
def test_large_blocks_leave_nobody_waiting(size: int, active: int, reveal: int) -> None:
    """There are head rows for all that is masked, however much that is."""
    begun = [n % (size // reveal) for n in range(active)]
    ran, rows = simulated(size, active, lambda n, left: reveal, begun)
    assert sum(ran[200:]) > 0.99 * 200 * active
    assert max(rows[200:]) <= whole_rows((active + active * reveal / size) * size)


@pytest.mark.parametrize("chance", [0.2, 0.4, 0.65, 0.8])
def test_random_reveals_are_served_as_by_the_best_number_of_places(chance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every masked token is revealed with some chance, one of a block in any case: as fast, by the rule's own measure of time, as
    with the number of commit places that is best for this chance; and nobody waits for good."""
    size, active = 4, 128

    def rate(ran_of: np.ndarray | None = None) -> float:
        rng = np.random.default_rng(0)
        ran, rows = simulated(size, active, lambda n, left: max(1, rng.binomial(left, chance)), [0] * active, ran_of)
        return sum(ran[200:]) / sum(n_rows + 2 * active for n_rows in rows[200:])

    ran_of = np.zeros(active, dtype=int)
    ours = rate(ran_of)
    assert ran_of.min() > 0.75 * ran_of.max()
    fixed = []
    for places in (32, 64, 96, 128):
        monkeypatch.setattr("sample.capacity.commit_capacity", lambda *_, places=places: places)
        fixed.append(rate())
    assert ours > 0.99 * max(fixed) and max(fixed) > 1.09 * sorted(fixed)[1]


def test_no_sequence_waits_much_more_often_than_others() -> None:
    """On the engine, where every fifth sequence waits: the share of steps in which each, of a length of its own, takes part."""
    size, active, chance = 4, 64, 0.8

    class Enough(Exception):
        pass

    engine, steps = PagedBlockEngine(random_decoder(), SDAR, max_active=active), []

    def stop(*counts: int) -> None:
        steps.append(counts)
        if len(steps) > 200:
            raise Enough

    s = settings(
        **dict(block_size=size, strategy="low_confidence_dynamic", target="random", threshold=1 - chance),
        **dict(max_tokens=200 * size, stop_ids=()),
    )
    with pytest.raises(Enough):
        engine.generate(random_requests([size * n for n in range(1, active + 1)]), s, progress=stop)
    shares = engine.device_state.slots.forwards[:active] / 200
    assert engine.statistics.stalled > 0.1 * 200 * active
    assert shares.min() > 0.9 * shares.mean() and shares.min() > 0.7 * shares.max()


@pytest.mark.parametrize("size, active", [(4, 128), (4, 256), (32, 256), (64, 128), (64, 256)])
def test_graphs_are_few(size: int, active: int) -> None:
    """Of 12 blocks each, random reveals, until the last is done, in two calls: the second finds nearly all of its graphs."""
    sizes: list[set[tuple[int, int, int]]] = []
    for seed in range(2):
        rng, demand, sizes = np.random.default_rng(seed), Demand(size, size), [*sizes, set()]
        left = np.full(active, 12 * size)
        while (in_flight := left[left > 0]).size:
            capacity = demand.capacity(len(in_flight))
            sizes[-1].add(dataclasses.astuple(capacity))
            masked = (in_flight - 1) % size + 1
            revealed = np.maximum(1, rng.binomial(masked, 0.1))
            left[left > 0] -= revealed
            demand.observe(len(in_flight), int((revealed == masked).sum()), int(masked.sum()))
    assert len(sizes[0] | sizes[1]) < 0.7 * cuda_graphs.LIMIT and len(sizes[1] - sizes[0]) < 10


def test_plans_go_with_their_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    graph = SimpleNamespace(capture_begin=lambda **options: None, capture_end=lambda: None)
    fakes = dict(graph_pool_handle=lambda: 0, Stream=lambda device: stream, current_stream=lambda device: stream)
    for name, fake in (fakes | dict(stream=lambda s: contextlib.nullcontext(), CUDAGraph=lambda: graph)).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    graphs = cuda_graphs.CudaGraphs(torch.device("cuda"), limit=3)
    state = DeviceState(StateSizes(8, 4, 1, 8), random_decoder().config, torch.float32, torch.device("cpu"))
    for commits in range(1, 9):
        for settings_of in ("one call", "another") if commits == 8 else ("one call",):
            plan = state.plan(Capacity(8, commits, 32))
            graphs.capture((settings_of, commits), lambda: None, keeps=plan)
            assert state.plan(Capacity(8, commits, 32)) is plan  # as long as a graph holds its addresses
    del plan
    assert sorted(commits for _, commits, _ in state.plans) == [7, 8]

    engine = PagedBlockEngine(random_decoder(), SDAR, max_active=6)
    engine.generate(random_requests([5, 9, 3, 8, 12, 7]), settings())
    assert not engine.device_state.plans


def simulated(
    size: int, active: int, reveal: Callable[[int, int], int], begun: list[int], ran_of: np.ndarray | None = None
) -> tuple[list[int], list[int]]:
    """400 steps of the capacities, under the rule of `make_plan` and the engine's order: how many ran in each, and its rows. As in
    the engine, what a step did is known when the next one has been launched; the earlier sequences are the longer ones.

    reveal: (sequence, masked tokens of its block) -> how many of them a forward reveals; begun: forwards that its block has had."""
    demand, waits = Demand(size, size), Waits(active)
    everyone = np.arange(active)
    not_read = None
    left = [size] * active
    for n, forwards in enumerate(begun):
        for _ in range(forwards):
            left[n] -= min(left[n], reveal(n, left[n]))
    commit = [False] * active
    ran, rows = [], []
    for _ in range(400):
        capacity = demand.capacity(active)
        commits_left, head_left, num_ran, num_commits, num_masked = capacity.commits, capacity.head_rows, 0, 0, 0
        order = np.argsort(~waits.come_first(everyone), kind="stable")
        stalled = np.ones(active, dtype=bool)
        for n in order:
            if commit[n] and not commits_left:
                continue
            if left[n] > head_left:
                break
            commits_left -= commit[n]
            num_commits += commit[n]
            head_left -= left[n]
            num_masked += left[n]
            num_ran += 1
            stalled[n] = False
            if ran_of is not None:
                ran_of[n] += 1
            left[n] -= min(left[n], reveal(n, left[n]))
            commit[n] = not left[n]
            left[n] = left[n] or size
        if not_read is not None:
            demand.observe(*not_read[0])
            waits.observe(everyone, not_read[1])
        not_read = (num_ran, num_commits, num_masked), stalled
        ran.append(num_ran)
        rows.append((capacity.items + capacity.commits) * size)
    return ran, rows

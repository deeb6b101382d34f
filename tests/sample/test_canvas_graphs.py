"""Forwards over canvases at fixed sizes, on a CPU without graphs: the results of the torch engine, whatever pads them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any, Callable

import pytest
import torch

from models.family import DecoderConfig
from models.registry import FAMILIES
from sample.canvas import CanvasEngine, send
from sample.canvas_cache import Item, place_rows
from sample.canvas_graphs import CanvasForward, rows_that_pay, splits_of, tile_bucket, tile_rows
from sample.canvas_kernels import KernelCanvasEngine
from tests.sample.reference import random_requests
from tests.sample.test_canvas import CACHES, assert_same, decoder_of, settings

LLADA, DREAM = FAMILIES.get("llada"), FAMILIES.get("dream")
SHIFTED = dataclasses.replace(DREAM, first_token_from_refresh=False)


class RememberedGraphs:
    """In the place of CudaGraphs on a CPU: what is captured is run again."""

    def __init__(self) -> None:
        self.graphs: dict[Any, Callable[[], None]] = {}
        self.capture_seconds, self.num_replays = 0.0, 0

    def __contains__(self, key: Any) -> bool:
        return key in self.graphs

    def capture(self, key: Any, work: Callable[[], None]) -> None:
        assert key not in self.graphs
        work()
        self.graphs[key] = work

    def replay(self, key: Any) -> None:
        self.graphs[key]()
        self.num_replays += 1

    def clear(self) -> None:
        self.graphs.clear()


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many forwards ran at a fixed size, and packed."""
    count = {"tiled": 0, "packed": 0}

    def counting(way: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            count[way] += 1
            return original(*arguments)

        return counted

    for way in count:
        monkeypatch.setattr(CanvasForward, way, counting(way, getattr(CanvasForward, way)))
    return count


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", ["llada", "dream", "shifted"])
def test_fixed_sizes_change_no_result(kind: str, cache: str, ways: dict[str, int]) -> None:
    """Prompts of several lengths, more canvases than slots, static and dynamic decodings, one engine for all of them. With few rows
    at a fixed size some forwards are too large for one."""
    family, decoder = decoder_of(kind, seed=3)
    assert KernelCanvasEngine(decoder, family).most_rows == 0, "a CPU gains nothing from fixed sizes"
    requests = random_requests([7, 2, 40, 5, 3])
    runs = [
        settings(block_size=4, steps=7, strategy="low_confidence_static", **CACHES[cache]),
        settings(block_size=3, strategy="low_confidence_dynamic", threshold=0.3, stop_early=True, **CACHES[cache]),
    ]
    expected_of = CanvasEngine(decoder, family, 3)
    expected = [expected_of.generate(requests, s) for s in runs]
    for most_rows in [4096, 80]:
        engine = KernelCanvasEngine(decoder, family, 3)
        engine.most_rows = most_rows
        ways.update(tiled=0, packed=0)
        for s, rollouts in zip(runs, expected):
            for ours, theirs in zip(engine.generate(requests, s), rollouts, strict=True):
                assert_same(ours, theirs)
        assert ways["tiled"] > 8 and (ways["packed"] > 0) == (most_rows < 4096), ways
        sizes = engine.forwards.seen
        assert len(sizes) < ways["tiled"] and all(n == tile_bucket(n) for _, n in sizes), sizes


def test_rows_that_pad_store_nothing() -> None:
    """The cache after a call is that of an engine whose rows are packed, and zero where no canvas has been."""
    family, decoder = decoder_of("llada", seed=4)
    requests, s = random_requests([5, 9, 2]), settings(cache="dual", block_size=5)
    caches = []
    for most_rows in [0, 4096]:
        engine = KernelCanvasEngine(decoder, family, 4)
        engine.most_rows = most_rows
        engine.generate(requests, s)
        caches.append(torch.stack([engine.cache.k, engine.cache.v]))
    packed, tiled = caches
    assert packed.shape[3] == 64 and torch.allclose(tiled, packed, atol=1e-5)
    for slot, request in enumerate(requests):
        end = len(request.prompt_ids) + 10
        assert tiled[:, :, slot, :end].abs().amin(-1).min() > 0 and not tiled[:, :, slot, end:].any()


def test_what_pads_a_forward_is_not_in_its_result() -> None:
    """Rows [N, D] of two windows: nothing of what earlier forwards left in the buffers."""
    family, decoder = decoder_of("llada", seed=5)
    engine = KernelCanvasEngine(decoder, family, 3)
    engine.most_rows = 64
    engine.generate(random_requests([9, 9, 9]), settings(cache="dual", block_size=5))
    forwards, length = engine.forwards, engine.cache.length
    items = [Item(0, 3, 5, 19, False), Item(2, 8, 11, 19, False)]
    rows = place_rows(items, length, 8, forwards.num_tiles(items, 8))
    numbers, tiles = send([rows.numbers, rows.tiles], torch.device("cpu"))
    tokens, real = torch.arange(numbers.shape[1]) % 20, numbers[1] >= 0
    found = []
    for junk in [0, 7]:
        forwards.rows.fill_(junk), forwards.tiles.fill_(junk), forwards.hidden.fill_(float("nan"))
        found.append(forwards.tiled(torch.where(real, tokens, junk), numbers, tiles, engine.statistics)[real].clone())
    assert torch.equal(*found) and found[0].isfinite().all() and len(found[0]) == 16


def test_the_cache_is_kept_and_forwards_with_it() -> None:
    """Buffers stay while the cache does: over calls that it serves, until it is released or another takes its place."""
    family, decoder = decoder_of("llada", seed=6)
    engine = KernelCanvasEngine(decoder, family, 3)
    requests, s = random_requests([9, 4, 7]), settings(cache="dual", block_size=5)
    first = engine.generate(requests, s)
    forwards = engine.forwards
    assert engine.generate(requests, s) == first and engine.forwards is forwards
    engine.generate(requests, settings(cache="prefix", block_size=5, seed=8))
    assert engine.forwards is forwards, "the same cache serves"
    engine.release()
    assert engine.forwards is None and engine.cache is None
    assert engine.generate(requests, s) == first
    forwards = engine.forwards
    engine.generate(requests, settings(block_size=5))
    assert engine.forwards is not forwards and len(engine.cache.k) == 1, "without a cache one layer is stored"
    assert engine.generate(requests, s) == first


def test_a_size_is_captured_when_it_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """And replayed from then on, over calls; moved weights and a release drop what was captured."""
    family, decoder = decoder_of("llada", seed=7)
    engine = KernelCanvasEngine(decoder, family, 3)
    engine.most_rows, engine.graphs = 4096, RememberedGraphs()
    came: Counter[int] = Counter()
    tiled = CanvasForward.tiled

    def counted(self: CanvasForward, *arguments: Any) -> torch.Tensor:
        came[arguments[2].shape[1]] += 1
        return tiled(self, *arguments)

    monkeypatch.setattr(CanvasForward, "tiled", counted)
    # Three canvases, a refresh and a window each; then the fourth alone, both of whose forwards are one tile.
    requests, s = random_requests([40, 9, 4, 7]), settings(cache="prefix", block_size=10, steps=2)
    first = engine.generate(requests, s)
    for ours, theirs in zip(first, CanvasEngine(decoder, family, 3).generate(requests, s), strict=True):
        assert_same(ours, theirs)
    assert came == {4: 1, 3: 1, 1: 2} and engine.statistics.graphs == engine.graphs.num_replays == 1
    assert list(engine.graphs.graphs) == [(32, 1)]
    assert engine.generate(requests, s) == first and engine.statistics.graphs == 2
    assert engine.generate(requests, s) == first and engine.statistics.graphs == 0

    for parameter in decoder.parameters():
        parameter.mul_(0.9)
    engine.generate(requests, s)
    assert engine.statistics.graphs == 0, "new weights in place"
    decoder.norm.weight = torch.nn.Parameter(decoder.norm.weight.clone(), requires_grad=False)
    engine.generate(requests, s)
    assert engine.statistics.graphs == 3, "moved weights"
    engine.release()
    assert not engine.graphs.graphs


# -- layout


def test_rows_by_hand() -> None:
    """Tiles of 4 rows, slots of 100 positions: a canvas of 6 tokens in slot 2, a window of 3 from position 5 in slot 0, 4 tiles."""
    items = [Item(2, 0, 6, 6, True), Item(0, 5, 3, 9, False)]
    rows = place_rows(items, 100, 4, 4)
    assert rows.first.tolist() == [0, 8]
    assert rows.numbers.tolist() == [
        [0, 1, 2, 3, 4, 5, 0, 0, 5, 6, 7, 0, 0, 0, 0, 0],
        [200, 201, 202, 203, 204, 205, -1, -1, 5, 6, 7, -1, -1, -1, -1, -1],
    ]
    assert rows.tiles.tolist() == [[2, 2, 0, -1], [6, 6, 9, 0]]
    packed = place_rows(items, 100)
    assert packed.first.tolist() == [0, 6] and packed.tiles.shape == (2, 0)
    assert packed.numbers.tolist() == [[0, 1, 2, 3, 4, 5, 5, 6, 7], [200, 201, 202, 203, 204, 205, 5, 6, 7]]


def test_sizes_are_few() -> None:
    assert [tile_bucket(n) for n in (1, 2, 3, 15, 16, 17, 18, 31, 33, 37, 65)] == [1, 2, 3, 15, 16, 18, 18, 32, 36, 40, 72]
    buckets = {tile_bucket(n) for n in range(1, 129)}
    assert len(buckets) == 16 + 8 + 8 + 8
    assert all(n <= tile_bucket(n) < 1.125 * n for n in range(1, 500))


@pytest.mark.parametrize(
    "family, changes, expected",
    [
        (LLADA, dict(cache="dual", block_size=32), 32),
        (LLADA, dict(cache="dual", block_size=64), 32),
        (LLADA, dict(cache="dual", block_size=4), 8),
        (LLADA, dict(cache="prefix", block_size=32, further_horizon=16), 24),
        (LLADA, dict(cache="prefix", block_size=32), 32),
        (LLADA, dict(block_size=12), 32),
        (DREAM, dict(cache="dual", block_size=32), 32),  # the first token comes from the refresh
        (SHIFTED, dict(cache="dual", block_size=32), 17),  # the window begins a row earlier: 33 rows in two tiles
    ],
)
def test_tiles_divide_the_windows_evenly(family: Any, changes: dict[str, Any], expected: int) -> None:
    assert tile_rows(settings(**changes), family) == expected


def test_where_a_graph_pays_by_hand() -> None:
    """A layer of LLaDA-8B has 4 x 4096^2 + 3 x 4096 x 12,288 = 218.1 million weights: 2^38 is 1,260 of it, whole tiles 1,248."""
    large = DecoderConfig(126_464, 4096, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128, intermediate_size=12_288)
    assert rows_that_pay(large) == 1248
    assert rows_that_pay(dataclasses.replace(large, hidden_size=512, num_heads=4, num_kv_heads=4, intermediate_size=1024)) == 4096
    assert rows_that_pay(dataclasses.replace(large, intermediate_size=10**8)) == 32
    # Programs: 32 key/value heads and one tile of folded rows each, as long as there are no more than 256.
    assert [splits_of(n, 32, large) for n in (1, 2, 3, 16)] == [4, 4, 1, 1]
    grouped = dataclasses.replace(large, num_heads=28, num_kv_heads=4)  # 7 x 32 folded rows: two programs a tile and head
    assert [splits_of(n, 32, grouped) for n in (1, 2, 3, 8, 9)] == [16, 16, 4, 4, 1]

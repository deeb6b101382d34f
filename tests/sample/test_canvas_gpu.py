"""The canvas engine's CUDA graphs: results of the torch engine, and when graphs are captured, kept and dropped."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from common.records import Rollout
from models.decoder import Decoder
from models.family import Family
from models.registry import FAMILIES
from sample.canvas import CanvasEngine, send
from sample.canvas_cache import Item, canvas_attention, group_items, place_rows
from sample.canvas_graphs import CanvasForward, tile_bucket
from sample.canvas_kernels import KernelCanvasEngine
from sample.cuda_graphs import CudaGraphs
from sample.engine import SamplingSettings, Statistics
from sample.kv_cache import KVCache
from tests.sample.reference import random_decoder, random_requests
from tests.sample.test_canvas import assert_same, settings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda", 0)
SMALL = dict(hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=96, qk_norm=False)
CACHES: dict[str, dict[str, Any]] = {
    "none": {},
    "prefix": {"cache": "prefix"},
    "horizon": {"cache": "prefix", "further_horizon": 16},
    "dual": {"cache": "dual"},
}


def canvas_settings(**changes: Any) -> SamplingSettings:
    return settings(**{"max_tokens": 40, "block_size": 16, "steps": 12, "stop_ids": (), **changes})


def model(kind: str, seed: int = 0) -> tuple[Family, Decoder]:
    return FAMILIES.get(kind), random_decoder(seed, **SMALL, qkv_bias=kind == "dream").to(CUDA)


def assert_near(ours: list[Rollout], theirs: list[Rollout]) -> None:
    """Equal in float32; but one sequence may have met a tie, which falls either way."""
    apart = 0
    for one, other in zip(ours, theirs, strict=True):
        if (one.response_ids, one.step_map) == (other.response_ids, other.step_map):
            assert_same(one, other, tolerance=1e-4)
        else:
            apart += 1
    assert apart <= 1, f"{apart} of {len(ours)} sequences differ"


def num_graphs(engine: KernelCanvasEngine) -> int:
    return len(engine.forwards.graphs.graphs)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_equals_the_torch_engine(kind: str, cache: str) -> None:
    """Prompts of several lengths, more canvases than slots, static and dynamic, with the graphs of earlier calls and without."""
    family, decoder = model(kind)
    requests = random_requests([20, 3, 64, 9, 33, 20, 20])
    engine, torch_engine, captured = KernelCanvasEngine(decoder, family, 4), CanvasEngine(decoder, family, 4), 0
    for s in [
        canvas_settings(**CACHES[cache]),
        canvas_settings(**CACHES[cache], strategy="low_confidence_dynamic", threshold=0.3, stop_early=True, stop_ids=(3, 17)),
    ]:
        expected = torch_engine.generate(requests, s)
        for _ in range(2):
            assert_near(engine.generate(requests, s), expected)
            captured += engine.statistics.graphs
    assert captured == num_graphs(engine) > 0
    engine.generate(requests, s)
    assert engine.statistics.graphs == 0, "at the third time all sizes have come before"
    assert all(n == tile_bucket(n) and tile * n <= engine.most_rows for tile, n in engine.forwards.graphs.graphs)


@torch.no_grad()
@pytest.mark.parametrize("num_layers", [1, 3])
def test_one_graph_serves_other_slots_positions_and_numbers_of_keys(num_layers: int) -> None:
    """Hidden states of items that have but the number of tiles in common: run, captured and replayed, and packed with SDPA. With
    one stored layer every item is whole."""
    _, decoder = model("llada", seed=1)
    length, tile = 128, 16
    caches = [KVCache(dataclasses.replace(decoder.config, num_layers=num_layers), 6, length, torch.float32, CUDA) for _ in range(2)]
    for cache in caches:
        torch.manual_seed(2)
        cache.k.normal_(), cache.v.normal_()
    fixed, packed = (CanvasForward(decoder, cache, 256, CudaGraphs(CUDA)) for cache in caches)
    statistics = Statistics()
    forwards = [
        [Item(0, 0, 40, 40, True), Item(3, 10, 16, 90, False), Item(1, 2, 9, 11, False)],
        [Item(5, 0, 33, 33, True), Item(4, 100, 28, 128, False)],
        [Item(0, 64, 16, 128, False), Item(1, 17, 16, 60, False), Item(2, 1, 13, 128, False), Item(4, 5, 32, 37, False)],
        [Item(2, 0, 80, 80, True)],
        [Item(1, 0, 16, 16, True), Item(2, 0, 64, 64, True)],
    ]
    if num_layers == 1:
        forwards = [[Item(i.slot, 0, i.rows, i.rows, True) for i in items] for items in forwards]
    for items in forwards:
        assert fixed.num_tiles(items, tile) == 5
        rows = place_rows(items, length, tile, 6)
        numbers, tiles, plain = send([rows.numbers, rows.tiles, place_rows(items, length).numbers], CUDA)
        tokens, real = torch.randint(0, 20, numbers[1].shape, device=CUDA), numbers[1] >= 0
        found = fixed.tiled(tokens, numbers, tiles, statistics)[real]
        expected = packed.packed(tokens[real], plain, canvas_attention(group_items(items, CUDA), caches[1]))
        assert torch.allclose(found, expected, atol=1e-4), (found - expected).abs().max()
        assert torch.allclose(caches[0].k, caches[1].k, atol=1e-4) and torch.allclose(caches[0].v, caches[1].v, atol=1e-4)
    assert statistics.graphs == 1 == len(fixed.graphs.graphs)


@torch.no_grad()
def test_a_few_rows_of_bfloat16() -> None:
    """Up to 32 rows, whose kernels overlap and whose products are a kernel's: as near to float32 as packed rows, every time."""
    decoder = random_decoder(3, **{**SMALL, "hidden_size": 512, "head_dim": 64, "intermediate_size": 1024}).to(CUDA)
    exact, rounded = decoder, random_decoder(3, **{**SMALL, "hidden_size": 512, "head_dim": 64, "intermediate_size": 1024})
    rounded = rounded.to(CUDA, torch.bfloat16)
    items, length = [Item(1, 20, 16, 96, False), Item(0, 40, 11, 60, False)], 128
    rows = place_rows(items, length, 16, 2)
    numbers, tiles, plain = send([rows.numbers, rows.tiles, place_rows(items, length).numbers], CUDA)
    tokens, real = torch.randint(0, 20, numbers[1].shape, device=CUDA), numbers[1] >= 0

    def forward_of(decoder: Decoder) -> tuple[CanvasForward, KVCache]:
        cache = KVCache(decoder.config, 2, length, decoder.dtype, CUDA)
        torch.manual_seed(4)
        for x in (cache.k, cache.v):
            x.copy_(torch.randn(x.shape, device=CUDA))
        return CanvasForward(decoder, cache, 64, CudaGraphs(CUDA)), cache

    def packed(decoder: Decoder) -> torch.Tensor:
        forward, cache = forward_of(decoder)
        return forward.packed(tokens[real], plain, canvas_attention(group_items(items, CUDA), cache)).float()

    expected, forward = packed(exact), forward_of(rounded)[0]
    error = (packed(rounded) - expected).abs().mean()
    for _ in range(5):
        found = forward.tiled(tokens, numbers, tiles, Statistics())[real].float()
        assert (found - expected).abs().mean() < 1.3 * error
    assert len(forward.graphs.graphs) == 1


def test_graphs_of_canvases_that_drift_apart_are_few() -> None:
    family, decoder = model("llada", seed=2)
    engine = KernelCanvasEngine(decoder, family, 16)
    requests = random_requests(list(range(1, 25)), num_samples=2)
    s = canvas_settings(cache="dual", strategy="low_confidence_dynamic", threshold=0.25)
    engine.generate(requests, s)
    sizes = set(engine.forwards.graphs.graphs)
    tiles = 16 * -(-(24 + 40) // 16)
    assert len(sizes) <= len({tile_bucket(n) for n in range(1, tiles + 1)}) <= 32
    assert engine.statistics.graphs == len(sizes) < engine.statistics.engine_forwards / 3


def test_new_weights_need_no_new_graphs_and_moved_ones_do() -> None:
    family, decoder = model("dream", seed=3)
    requests, s = random_requests([20, 3, 9, 33]), canvas_settings(cache="dual")
    engine = KernelCanvasEngine(decoder, family, 4)
    before = [engine.generate(requests, s) for _ in range(3)][-1]
    for parameter in decoder.parameters():
        parameter.data.copy_(parameter.roll(1, 0))
    after = engine.generate(requests, s)
    assert engine.statistics.graphs == 0 < num_graphs(engine)
    assert after != before
    assert_near(after, CanvasEngine(decoder, family, 4).generate(requests, s))
    kept = num_graphs(engine)
    decoder.norm.weight = torch.nn.Parameter(2.0 * decoder.norm.weight, requires_grad=False)
    moved = engine.generate(requests, s)
    assert engine.statistics.graphs == num_graphs(engine) == kept
    assert_near(moved, CanvasEngine(decoder, family, 4).generate(requests, s))


def test_release_and_other_caches() -> None:
    """What a call takes is free after `release`; longer canvases, and another kind of cache, take new graphs."""
    family, decoder = model("llada", seed=4)
    requests, s = random_requests([20, 3, 9, 33]), canvas_settings(cache="prefix")
    engine, torch_engine = KernelCanvasEngine(decoder, family, 4), CanvasEngine(decoder, family, 4)
    expected, held = torch_engine.generate(requests, s), []
    for _ in range(3):
        assert_near(engine.generate(requests, s), expected)
        assert engine.statistics.graphs == num_graphs(engine) > 0
        engine.release()
        assert engine.cache is None and not engine.graphs.graphs
        held.append(torch.cuda.memory_allocated(CUDA))
    assert held[2] - held[1] < 2**16, held
    longer = [dataclasses.replace(r, prompt_ids=r.prompt_ids * 4) for r in requests]
    for others, changed in [(longer, s), (requests, canvas_settings()), (requests, s)]:
        assert_near(engine.generate(others, changed), torch_engine.generate(others, changed))


def test_an_interrupted_call_leaves_a_working_engine() -> None:
    family, decoder = model("llada", seed=5)
    requests, s = random_requests([20, 3, 9, 33, 7]), canvas_settings(cache="dual")
    engine = KernelCanvasEngine(decoder, family, 3)

    def interrupt(finished: int, tokens: int, forwards: int) -> None:
        if finished:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(requests, s, progress=interrupt)
    assert_near(engine.generate(requests, s), CanvasEngine(decoder, family, 3).generate(requests, s))

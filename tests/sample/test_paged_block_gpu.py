"""The paged engine on a GPU: kernels and graphs against the eager engine, memory, weights, and what the host waits for."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.kernel_times import StepProfiler, summarize
from common.records import Rollout
from models.checkpoint import load_pretrained
from models.decoder import Decoder
from models.family import DecoderConfig
from models.registry import FAMILIES
from sample import noise, paged_block
from sample.block import BlockEngine
from sample.device_memory import DeviceMemory
from sample.engine import Request, SamplingSettings
from sample.paged_block import PagedBlockEngine
from sample.pages import pages_of
from tests.golden import sdar
from tests.sample.reference import MASK, STOPS, block_logits, random_decoder
from train.documents import number
from train.layout import Layout
from train.packing import build_pack
from train.policy import Policy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SDAR = FAMILIES.get("sdar")
CUDA = torch.device("cuda", 0)
CLOSE = 1e-4
"""Scores, confidences and thresholds nearer than this may fall either way in float32."""
SMALL = dict(vocab_size=24, hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=96)


def settings(**changes) -> SamplingSettings:
    default = dict(max_tokens=40, mask_id=MASK, stop_ids=STOPS, forbidden_ids=(MASK, 22), seed=5)
    return SamplingSettings(**{**default, **changes})


def requests_of(count: int, longest: int, vocab_size: int, samples: int = 2, seed: int = 0) -> list[Request]:
    rng = random.Random(seed)
    prompt = lambda: [rng.randrange(vocab_size) for _ in range(rng.randrange(1, longest))]  # noqa: E731
    return [Request(f"task {n}", prompt(), samples) for n in range(count)]


# ------------------------------------------------------------------------------------------------------- equal but for near ties


@torch.no_grad()
def closest_call(decoder: Decoder, request: Request, rollout: Rollout, forward: int, s: SamplingSettings) -> float:
    """How near the decisions of a sequence's `forward`-th forward were: between the two best of the noisy scores of a position,
    between two positions' confidences, or between a confidence and the threshold."""
    size, prompt = s.block_size, len(request.prompt_ids)
    shown = [t if step < forward else s.mask_id for t, step in zip(rollout.response_ids, rollout.step_map)]
    first = prompt + rollout.step_map.index(forward)
    start = first // size * size
    ids = (list(request.prompt_ids) + shown)[: start + size]
    masked = [p for p in range(start, start + size) if p >= prompt and rollout.step_map[p - prompt] >= forward]
    with torch.device(decoder.device):
        logits = block_logits(decoder, ids, size).double() / s.logits_temperature
        logits[:, list(s.forbidden_ids)] = -math.inf
        logprobs = logits.log_softmax(-1)
        key = torch.tensor([noise.sequence_key(s.seed, request.task_id, rollout.sample)], dtype=torch.int32)
        positions = torch.arange(start, start + size)
        keys = noise.row_keys(key.expand(size, 2), positions, torch.full((size,), forward))
        noisy = logprobs if s.is_greedy else logprobs + noise.gumbel(keys, logprobs.shape[1]).double()
        best = noisy.topk(2, dim=-1)
        at = torch.tensor(masked) - start
        gaps = [(best.values[at, 0] - best.values[at, 1]).min()]
        confidence = logprobs[at, best.indices[at, 0]].exp().sort().values
        if len(at) > 1:
            gaps.append((confidence[1:] - confidence[:-1]).min())
        if s.strategy == "low_confidence_dynamic":
            gaps.append((confidence - s.threshold).abs().min())
    return float(torch.stack(gaps).min())


def compare(decoder: Decoder, requests: list[Request], ours: list[Rollout], theirs: list[Rollout], s: SamplingSettings) -> int:
    """Asserts that rollouts are equal up to near ties; the number of sequences that have one."""
    by_id = {request.task_id: request for request in requests}
    apart = 0
    for a, b in zip(ours, theirs, strict=True):
        assert (a.task_id, a.sample) == (b.task_id, b.sample)
        same = [x == y for x, y in zip(zip(a.response_ids, a.step_map), zip(b.response_ids, b.step_map))]
        if not all(same) or len(a.response_ids) != len(b.response_ids):
            apart += 1
            differ = [n for n, equal in enumerate(same) if not equal]
            forward = min(min(a.step_map[n], b.step_map[n]) for n in differ)
            nearest = closest_call(decoder, by_id[a.task_id], b, forward, s)
            assert nearest < CLOSE, f"{a.task_id}, sample {a.sample} differs at forward {forward}: nearest call {nearest}"
            same = [equal and step < forward for equal, step in zip(same, a.step_map)]
        else:
            floats = dict(logprobs=a.logprobs, entropy=a.entropy)
            assert dataclasses.replace(a, **floats) == dataclasses.replace(b, **floats)
        for name in ["logprobs", "entropy"]:
            gaps = [abs(x - y) for x, y, equal in zip(getattr(a, name), getattr(b, name), same) if equal]
            assert max(gaps, default=0.0) < CLOSE, f"{name}: {max(gaps)}"
    return apart


@pytest.mark.parametrize("decoding", [{}, dict(temperature=0.0), dict(top_k=5, top_p=0.9, temperature=0.7)])
@pytest.mark.parametrize("size", [1, 4, 8])
@pytest.mark.parametrize("strategy", ["low_confidence_static", "low_confidence_dynamic", "sequential", "entropy_bounded"])
def test_equals_the_eager_engine(size: int, strategy: str, decoding: dict) -> None:
    decoder = random_decoder(size, **SMALL).to(CUDA)
    s = settings(block_size=size, strategy=strategy, threshold=0.3, entropy_bound=1.0, **decoding)
    requests = requests_of(40, 100, 22)
    engine = PagedBlockEngine(decoder, SDAR, max_active=50)
    apart = compare(decoder, requests, engine.generate(requests, s), BlockEngine(decoder, SDAR, 80).generate(requests, s), s)
    print(f"{apart} of {2 * len(requests)} sequences differ behind a near tie")
    assert apart <= 1 and engine.statistics.graphs == len(engine.graphs.graphs) > 1


@pytest.mark.parametrize("strategy", ["low_confidence_static", "low_confidence_dynamic"])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_large_blocks_equal_the_eager_engine(size: int, strategy: str) -> None:
    """Several blocks of every sequence, in up to eight steps each; of 64 tokens and four heads to a key, two tiles of attention."""
    decoder = random_decoder(size, **SMALL | dict(num_kv_heads=1)).to(CUDA)
    s = settings(block_size=size, steps_per_block=8, strategy=strategy, threshold=0.3, max_tokens=3 * size, stop_ids=())
    requests = requests_of(20, 2 * size + 60, 22)
    engine = PagedBlockEngine(decoder, SDAR, max_active=24)
    apart = compare(decoder, requests, engine.generate(requests, s), BlockEngine(decoder, SDAR, 40).generate(requests, s), s)
    print(f"{apart} of {2 * len(requests)} sequences differ behind a near tie")
    assert apart <= 1 and engine.statistics.commit_items > 2 * len(requests) and len(engine.graphs.graphs) > 1


@pytest.mark.parametrize("decoding", [{}, dict(top_k=5, top_p=0.9)])
def test_logits_in_parts(decoding: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 50 rows at a time; torch's own sampling draws also for rows that nobody has."""
    monkeypatch.setattr(paged_block, "LOGITS", 50 * 24)
    decoder = random_decoder(3, **SMALL).to(CUDA)
    s, requests = settings(strategy="low_confidence_dynamic", threshold=0.3, **decoding), requests_of(40, 100, 22)
    engine = PagedBlockEngine(decoder, SDAR, max_active=50)
    apart = compare(decoder, requests, engine.generate(requests, s), BlockEngine(decoder, SDAR, 80).generate(requests, s), s)
    assert apart <= 1 and max(head_rows for *_, head_rows in engine.graphs.graphs) > 100


def test_golden_generation() -> None:
    for variant in sorted((Path(sdar.__file__).parent / "data" / "sdar").iterdir()):
        model = load_pretrained(str(variant), "sdar", torch.float32, CUDA)
        for file in sorted(variant.glob("generation*.json")):
            result = sdar.check_generation(model, json.loads(file.read_text())["cases"], file.stem, "triton")
            assert result.status == "PASS", result.line()


def large_decoder(num_heads: int, num_kv_heads: int, dtype: torch.dtype = torch.float32) -> Decoder:
    """Four layers of the 4B model's shape, with weights that make distributions of about half a nat."""
    shape = dict(vocab_size=151_936, hidden_size=2560, num_layers=4, head_dim=128, intermediate_size=9728, qk_norm=True)
    torch.manual_seed(0)
    with CUDA:
        decoder = Decoder(DecoderConfig(**shape, num_heads=num_heads, num_kv_heads=num_kv_heads)).requires_grad_(False)
        for parameter in decoder.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=2.0 * parameter.shape[1] ** -0.5)
    return decoder.to(dtype)


LARGE = dict(
    max_tokens=48,
    mask_id=151_669,
    forbidden_ids=tuple(range(151_669, 151_936)),
    stop_ids=(),
    temperature=0.8,
    strategy="low_confidence_dynamic",
    threshold=0.5,
)


@pytest.mark.parametrize("heads", [(32, 8), (16, 16)])
def test_large_layers_equal_the_eager_engine(heads: tuple[int, int]) -> None:
    """In float32, at a temperature, up to 1,200 tokens of context."""
    decoder, s, requests = large_decoder(*heads), settings(**LARGE), requests_of(48, 1200, 151_000)
    ours = PagedBlockEngine(decoder, SDAR, max_active=64).generate(requests, s)
    apart = compare(decoder, requests, ours, BlockEngine(decoder, SDAR, 64).generate(requests, s), s)
    print(f"{apart} of {len(ours)} sequences differ behind a near tie")
    assert apart <= 1


@torch.no_grad()
def gaps_to_trainer(decoder: Decoder, rollouts: list[Rollout], s: SamplingSettings) -> torch.Tensor:
    """Differences of the recorded log-probs to the trainer's, one per token."""
    training = SimpleNamespace(method="TraceRL", block_size=s.block_size, max_gen_length=10_000, shrink=1, post_num=None)
    layout, found = Layout("block", training), []
    for rollout in rollouts:
        predictions = number([layout.document(0, layout.sampled(rollout, 0), None)])
        pack = build_pack([layout.document(0, layout.sampled(rollout, 0), None)], s.mask_id)
        logprobs, _ = Policy(decoder, list(s.forbidden_ids), s.logits_temperature, backend="dense").to(CUDA)(pack.to(CUDA))
        found.append(logprobs.cpu() - torch.tensor([rollout.logprobs[offset] for offset in predictions.offset]))
    return torch.cat(found)


def test_bfloat16_rounds_no_worse_than_the_trainer() -> None:
    """Log-probs of the same tokens by engine and trainer, each against the same weights in float32, and against each other: they
    round in different places, so their difference is that of both."""
    decoder, s, requests = large_decoder(32, 8, torch.bfloat16), settings(**LARGE), requests_of(48, 1200, 151_000)
    exact = copy.deepcopy(decoder).float()
    errors = {}
    for engine in [PagedBlockEngine(decoder, SDAR, max_active=64), BlockEngine(decoder, SDAR, 64)]:
        name, rollouts = type(engine).__name__, engine.generate(requests, s)
        of_engine, to_trainer = gaps_to_trainer(exact, rollouts, s), gaps_to_trainer(decoder, rollouts, s)
        of_trainer = of_engine - to_trainer
        for what, gap in [(name, of_engine), (f"trainer with {name}", of_trainer), (f"{name} to trainer", to_trainer)]:
            size, k3 = gap.abs(), (gap.exp() - 1 - gap).mean()
            errors[what] = float(size.mean())
            numbers = f"mean {size.mean():.1e}, bias {gap.mean():+.1e}, 99th percentile {size.quantile(0.99):.1e}"
            print(f"{what}, {len(gap)} tokens: {numbers}, largest {size.max():.1e}, k3 {k3:.1e}")
        assert abs(float(of_engine.mean())) < 0.2 * errors[name]
    ours, trainer = errors["PagedBlockEngine"], errors["trainer with PagedBlockEngine"]
    assert ours < 1.2 * trainer and errors["PagedBlockEngine to trainer"] < 1.5 * (ours**2 + trainer**2) ** 0.5


def test_a_thousand_requests_together_and_alone_in_any_cache() -> None:
    decoder = random_decoder(2, **SMALL).to(CUDA)
    rng = random.Random(3)
    requests = requests_of(1024, 150, 22, samples=1, seed=1)
    requests = [dataclasses.replace(r, max_tokens=rng.randrange(1, 90)) for r in requests]
    s = settings(strategy="low_confidence_dynamic", threshold=0.3, stop_ids=())
    needs = [pages_of(-(-(len(r.prompt_ids) + r.max_tokens) // 4) * 4) for r in requests]
    expected = BlockEngine(decoder, SDAR, 256).generate(requests, s)
    apart = []
    for cache_pages in [1 + sum(needs) // 3, 1 + max(needs)]:
        engine = PagedBlockEngine(decoder, SDAR, max_active=1024, cache_pages=cache_pages)
        apart.append(compare(decoder, requests, engine.generate(requests, s), expected, s))
    alone = [engine.generate([request], s)[0] for request in requests[::8]]
    apart.append(compare(decoder, requests, alone, expected[::8], s))
    print(f"{apart} of {[len(requests)] * 2 + [len(alone)]} sequences differ behind a near tie")
    assert max(apart) <= 10


# ------------------------------------------------------------------------------------------------------------ weights, memory


def test_new_weights_need_no_new_graphs_and_moved_ones_do() -> None:
    decoder = random_decoder(1, **SMALL).to(CUDA)
    requests, s = requests_of(12, 100, 22), settings()
    engine = PagedBlockEngine(decoder, SDAR, max_active=16)
    before = engine.generate(requests, s)
    for parameter in decoder.parameters():
        parameter.data.copy_(parameter.roll(1, 0))
    engine.release()
    assert engine.cache.num_pages == 0
    after = engine.generate(requests, dataclasses.replace(s, seed=6, max_tokens=39))
    assert engine.statistics.graphs == 0 < engine.statistics.engine_forwards
    fresh = PagedBlockEngine(decoder, SDAR, max_active=16).generate(requests, dataclasses.replace(s, seed=6, max_tokens=39))
    assert after == fresh != before
    decoder.norm.weight = torch.nn.Parameter(2.0 * decoder.norm.weight)
    moved = engine.generate(requests, s)
    assert engine.statistics.graphs > 0
    assert moved == PagedBlockEngine(decoder, SDAR, max_active=16).generate(requests, s)


def test_memory_goes_and_comes_back_at_its_address() -> None:
    torch.zeros(1, device=CUDA)
    memory = DeviceMemory(CUDA, num_regions=3)
    size = 64 * 2**20
    free = lambda: torch.cuda.mem_get_info(CUDA)[0]  # noqa: E731
    at_first = free()
    x = memory.take(size)
    address = x.data_ptr()
    assert at_first - free() >= 3 * size and x.shape[1] >= size and x.stride(0) >= x.shape[1]
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        x[1].add_(3)
        graph.capture_end()
    del x
    memory.give_back()
    assert free() >= at_first - size
    y = memory.take(2 * size)
    assert y.data_ptr() == address and not y.any()
    graph.replay()
    torch.cuda.synchronize()
    assert (y[1, :size] == 3).all() and not y[0].any() and not y[2].any() and not y[1, size + memory.granularity :].any()
    with pytest.raises(torch.OutOfMemoryError):
        memory.take(memory.stride)
    z = memory.take(size)
    assert z.data_ptr() == address and not z.any()
    del y, z
    memory.close()


def test_the_cache_leaves_the_gpu_and_comes_back() -> None:
    decoder = random_decoder(1, **SMALL).to(CUDA)
    requests, s = requests_of(40, 3000, 22, samples=8), settings(max_tokens=3000, stop_ids=())
    s = dataclasses.replace(s, strategy="low_confidence_static", steps_per_block=1, max_tokens=200)
    engine = PagedBlockEngine(decoder, SDAR, max_active=128)
    first = engine.generate(requests, s)
    free, size = torch.cuda.mem_get_info(CUDA)[0], engine.cache.num_bytes
    engine.release()
    assert torch.cuda.mem_get_info(CUDA)[0] - free >= size > 2**25
    assert engine.generate(requests, s) == first and engine.statistics.graphs == 0


def test_an_interrupted_call_leaves_a_working_engine() -> None:
    decoder = random_decoder(1, **SMALL).to(CUDA)
    requests, s = requests_of(40, 100, 22), settings()
    engine = PagedBlockEngine(decoder, SDAR, max_active=16)

    def interrupt(finished: int, tokens: int, forwards: int) -> None:
        if finished > 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(requests, s, progress=interrupt)
    assert engine.generate(requests, s) == PagedBlockEngine(decoder, SDAR, max_active=16).generate(requests, s)


# ----------------------------------------------------------------------------------------------------------- what the host does


def test_one_late_read_a_step() -> None:
    """Over 200 steps with 128 sequences: a copy to the host and a wait in each, and no other."""
    decoder = random_decoder(1, **SMALL).to(CUDA)
    requests, s = requests_of(128, 100, 22, samples=1), settings(max_tokens=400, stop_ids=())
    engine = PagedBlockEngine(decoder, SDAR, max_active=128)
    engine.generate(requests, s)
    profiler, steps = StepProfiler(), []

    def watch(*counts: int) -> None:
        steps.append(counts)
        if len(steps) == 20:
            profiler.start()
        elif len(steps) == 220:
            profiler.stop()

    engine.generate(requests, s, progress=watch)
    found = summarize(profiler.events(), 200)
    assert found["device_to_host_copies_per_step"] <= 1.01, found
    assert sum(found["waits_per_step"].values()) <= 1.01, found["waits_per_step"]

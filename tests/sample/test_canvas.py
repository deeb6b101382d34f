"""The canvas engine against a slow sampler with keys in lists, and against itself with other canvases in flight."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch

from common.errors import UserError
from common.records import Rollout
from models.attention import masked_attention
from models.family import DecoderConfig
from models.registry import FAMILIES
from sample import canvas_cache, noise, sampling
from sample.canvas_cache import GIB, canvases_that_fit
from sample.canvas_schedule import blocks_of, dream, even, steps_of
from sample.engine import Request, SamplingSettings, build_engine
from sample.queue import SharedQueue
from sample.registry import UNRANKED
from sample.unmask import Candidates, low_confidence_dynamic, low_confidence_static
from tests.sample.canvas_reference import slow_canvas
from tests.sample.reference import MASK, STOPS, random_decoder, random_requests

LLADA, DREAM = FAMILIES.get("llada"), FAMILIES.get("dream")
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llada": (LLADA, {"qk_norm": False, "num_kv_heads": 4}),
    "dream": (DREAM, {"qk_norm": False, "qkv_bias": True}),
    # Facts that no shipped family combines so: logits shifted, and any position of a block may be revealed first.
    "shifted": (dataclasses.replace(DREAM, first_token_from_refresh=False, canvas_schedule="even"), {"qkv_bias": True}),
}
CACHES: dict[str, dict[str, Any]] = {
    "none": {"cache": "none"},
    "prefix": {"cache": "prefix"},
    "prefix, horizon 3": {"cache": "prefix", "further_horizon": 3},
    "prefix, horizon 0": {"cache": "prefix", "further_horizon": 0},
    "dual": {"cache": "dual"},
    "dual, horizon 2": {"cache": "dual", "further_horizon": 2},
}
STRATEGIES = ["low_confidence_static", "low_confidence_dynamic", "sequential", "entropy_bounded"]
THRESHOLD = {"confidence": 0.3, "margin_confidence": 0.2, "neg_entropy": -1.8, "random": 0.6}
DECODINGS = [
    dict(temperature=1.0),
    dict(temperature=0.0, pad_target_penalty=2.5, pad_id=5),
    dict(temperature=0.7, top_k=9, top_p=0.9),
    dict(temperature=1.3, top_k=6, top_p=0.9, confidence="filtered"),
    dict(temperature=0.8, top_p=0.8, confidence="filtered", pad_target_penalty=0.5, pad_id=7),
]


def settings(**changes: Any) -> SamplingSettings:
    default = dict(max_tokens=10, mask_id=MASK, stop_ids=STOPS, forbidden_ids=(MASK, 22), seed=5)
    return SamplingSettings(**{**default, **changes})


def decoder_of(kind: str, seed: int = 0):
    family, shape = KINDS[kind]
    return family, random_decoder(seed, **shape)


def assert_same(ours: Rollout, theirs: Rollout, tolerance: float = 1e-5) -> None:
    for name in ["logprobs", "entropy"]:
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=tolerance, rel=0), name
    floats = dict(logprobs=[0.0] * len(ours.response_ids), entropy=[0.0] * len(ours.response_ids))
    assert dataclasses.replace(ours, **floats) == dataclasses.replace(theirs, **floats)


def samples(requests: list[Request]) -> list[tuple[Request, int]]:
    return [(request, n) for request in requests for n in range(request.num_samples)]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_slow_sampler(kind: str, cache: str) -> None:
    """Strategies, targets, decodings, block sizes and schedules change from case to case; fewer slots than sequences."""
    family, decoder = decoder_of(kind)
    requests = random_requests([3, 1, 6], num_samples=2)
    lengths_seen = set()
    rows: list[int] = []
    decoder.lm_head.register_forward_pre_hook(lambda head, args: rows.append(len(args[0])))
    for n, strategy in enumerate(STRATEGIES):
        target = list(THRESHOLD)[(n + len(cache)) % 4]
        s = settings(
            block_size=[4, 3, 10, 1][(n + len(cache)) % 4],  # 10 tokens: the last block of 4 or 3 is shorter
            steps=[None, 7, 4, 10][(n + len(kind)) % 4],
            strategy=strategy,
            target=target,
            threshold=THRESHOLD[target],
            entropy_bound=1.5,
            stop_early=n % 2 == 1,
            **CACHES[cache],
            **DECODINGS[(n + len(cache) + len(kind)) % len(DECODINGS)],
        )
        engine = build_engine(decoder, family, max_active=4)
        rows.clear()
        found = engine.generate(requests, s)
        head_rows = sum(rows)
        facts = dataclasses.replace(s, top_p_first=family.top_p_first)
        expected = [slow_canvas(decoder, family, *one, facts) for one in samples(requests)]
        for ours, (theirs, _) in zip(found, expected, strict=True):
            assert_same(ours, theirs)
        assert head_rows == sum(needed for _, needed in expected), "the head runs on what may be revealed"
        assert engine.statistics.sequence_forwards == sum(theirs.num_forwards for theirs, _ in expected)
        assert engine.statistics.tokens == sum(step > 0 for theirs, _ in expected for step in theirs.step_map)
        lengths_seen |= {rollout.num_forwards for rollout in found}
    assert len(lengths_seen) > 2


@pytest.mark.parametrize("kind, cache", [("llada", "none"), ("llada", "prefix, horizon 3"), ("dream", "dual"), ("dream", "prefix")])
def test_alone_as_together(kind: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what else is in flight, nor the order, nor the slots, nor how many rows a forward may hold changes a sequence."""
    family, decoder = decoder_of(kind, seed=1)
    requests = random_requests([7, 2, 5, 2], num_samples=2)
    s = settings(block_size=4, strategy="low_confidence_dynamic", threshold=0.4, temperature=0.9, **CACHES[cache])
    expected = [
        build_engine(decoder, family).generate([dataclasses.replace(request, num_samples=n + 1)], s)[n]
        for request, n in samples(requests)
    ]
    assert len({rollout.num_forwards for rollout in expected}) > 1
    for max_active in [1, 3, 64]:
        engine = build_engine(decoder, family, max_active)
        for ours, theirs in zip(engine.generate(requests, s), expected, strict=True):
            assert_same(ours, theirs)
        assert engine.statistics.mean_active <= max_active
    backwards = build_engine(decoder, family, 5).generate(requests[::-1], s)
    for ours, theirs in zip(sorted(backwards, key=lambda r: (r.task_id, r.sample)), expected, strict=True):
        assert_same(ours, theirs)
    units = iter(range(100))
    shared = SharedQueue(requests, 1, lambda: next(units))
    for ours, theirs in zip(build_engine(decoder, family, 3).generate(requests, s, queue=shared), expected, strict=True):
        assert_same(ours, theirs)
    monkeypatch.setattr(canvas_cache, "ROWS_AT_A_TIME", 40)
    monkeypatch.setattr(sampling, "LOGITS_AT_A_TIME", 50)
    engine = build_engine(decoder, family, 64)
    for ours, theirs in zip(engine.generate(requests, s), expected, strict=True):
        assert_same(ours, theirs)
    assert engine.statistics.mean_active < 8, "some canvases waited for the next forward"


def test_the_rows_of_a_forward_are_bounded_and_nobody_starves(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for two canvases a forward, three that all want to be refreshed take turns."""
    monkeypatch.setattr(canvas_cache, "ROWS_AT_A_TIME", 24)
    family, decoder = decoder_of("llada")
    rows = []
    hook = decoder.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    engine = build_engine(decoder, family, 3)
    # Blocks of one token: every forward is a refresh of 2 + 10 rows, so three canvases of 10 forwards need 15.
    engine.generate(random_requests([2], num_samples=3), settings(block_size=1, cache="prefix"))
    hook.remove()
    assert rows == [24] * 15


def test_limits_of_single_requests() -> None:
    """Canvases of different lengths: steps in proportion, a last block that is shorter."""
    family, decoder = decoder_of("dream")
    requests = [dataclasses.replace(r, max_tokens=m) for r, m in zip(random_requests([4, 4, 2]), [10, 3, 7], strict=True)]
    s = settings(block_size=4, steps=5, cache="dual")
    for ours, request in zip(build_engine(decoder, family).generate(requests, s), requests, strict=True):
        assert_same(ours, slow_canvas(decoder, family, request, 0, dataclasses.replace(s, top_p_first=True))[0])
        assert len(ours.response_ids) == request.max_tokens


@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_stop_early_leaves_masks_behind_the_stops_block(kind: str) -> None:
    family, decoder = decoder_of(kind, seed=3)
    requests = random_requests([3, 4, 5, 6], num_samples=4)
    s = settings(max_tokens=12, block_size=3, cache="prefix", stop_ids=(1, 2, 3, 17))
    engine = build_engine(decoder, family)
    whole, cut = engine.generate(requests, s), engine.generate(requests, dataclasses.replace(s, stop_early=True))
    skipped = 0
    for all_of_it, part in zip(whole, cut, strict=True):
        assert 0 not in all_of_it.step_map and MASK not in all_of_it.response_ids
        assert (part.num_response, part.finish) == (all_of_it.num_response, all_of_it.finish)
        end = -(-part.num_response // 3) * 3
        for name in ("response_ids", "step_map"):
            assert getattr(part, name)[:end] == getattr(all_of_it, name)[:end]
        assert part.response_ids[end:] == [MASK] * (12 - end) and part.step_map[end:] == [0] * (12 - end)
        assert part.logprobs[end:] == part.entropy[end:] == [0.0] * (12 - end)
        assert part.num_forwards == max(part.step_map)
        skipped += end < 12
    assert skipped and skipped < len(cut)


def test_seed_task_and_sample_change_what_is_drawn() -> None:
    family, decoder = decoder_of("llada", seed=2)
    engine, request = build_engine(decoder, family), random_requests([5], num_samples=3)[0]
    s = settings(stop_ids=())
    first = [r.response_ids for r in engine.generate([request], s)]
    assert len({tuple(ids) for ids in first}) == 3
    assert [r.response_ids for r in engine.generate([request], s)] == first
    assert engine.generate([dataclasses.replace(request, task_id="another")], s)[0].response_ids != first[0]
    assert engine.generate([request], dataclasses.replace(s, seed=6))[0].response_ids != first[0]


def test_alg_temp_draws_positions_in_proportion() -> None:
    """Greedy tokens, so the first forward is the same for all samples: two of three positions are drawn without replacement with
    weights exp(confidence / alg_temp)."""
    family, decoder = decoder_of("llada", seed=4)
    request = dataclasses.replace(random_requests([4])[0], num_samples=3000)
    s = settings(max_tokens=3, block_size=3, steps=2, temperature=0.0, alg_temp=0.1, stop_ids=())
    rollouts = build_engine(decoder, family, 1500).generate([request], s)
    ids = torch.tensor([*request.prompt_ids, MASK, MASK, MASK])
    logits = decoder.lm_head(decoder(ids, torch.arange(7), masked_attention(torch.ones(7, 7, dtype=torch.bool))))[4:]
    logits[:, [MASK, 22]] = -math.inf
    p = (logits.softmax(-1).amax(-1) / 0.1).softmax(0).tolist()
    assert 0.05 < min(p) and max(p) < 0.9
    for left in range(3):
        a, b = (i for i in range(3) if i != left)
        expected = p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b])
        found = sum(rollout.step_map[left] == 2 for rollout in rollouts) / 3000
        assert abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / 3000), (left, found, expected)
    best = dataclasses.replace(s, alg_temp=0.0)
    assert len({tuple(r.step_map) for r in build_engine(decoder, family).generate([request], best)}) == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_which_strategies_see_how_positions_are_scored(strategy: str) -> None:
    """alg_temp, pad_target_penalty and the target change what is revealed, or nothing: what configs/checks.py says of them. With
    greedy tokens the samples of a task differ where chance ranks the positions, and there alone."""
    family, decoder = decoder_of("llada", seed=4)
    request = random_requests([4], num_samples=8)[0]
    s = settings(max_tokens=12, block_size=6, strategy=strategy, threshold=0.3, entropy_bound=1.5, stop_ids=())

    def sampled(**changes: Any) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
        rollouts = build_engine(decoder, family).generate([request], dataclasses.replace(s, **changes))
        return {(tuple(r.response_ids), tuple(r.step_map)) for r in rollouts}

    is_ranked = strategy not in UNRANKED
    plain = sampled()
    drawn = [token for ids, _ in plain for token in ids]
    pad_id = max(drawn, key=drawn.count)
    for changes in [{"alg_temp": 5.0}, {"pad_target_penalty": 9.0, "pad_id": pad_id}, {"target": "random"}]:
        assert (sampled(**changes) != plain) == is_ranked, changes
    for greedy in [{"temperature": 0.0}, {"top_k": 1}]:
        assert len(sampled(**greedy)) == 1
        for changes in [{"alg_temp": 0.5}, {"target": "random"}]:
            assert (len({ids for ids, _ in sampled(**greedy, **changes)}) > 1) == is_ranked, (greedy, changes)


def test_ranking_and_least_of_the_strategies() -> None:
    """Thresholds see the score, the order is the ranking's; a dynamic strategy reveals `least`, whatever the schedule says."""
    masked, score = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[0.9, 0.1, 0.5, 0.3]])
    c = Candidates(masked, score, score, torch.tensor([2]), ranking=torch.tensor([[0.0, 3.0, 1.0, 2.0]]))
    s = settings(threshold=0.8)
    assert low_confidence_static(c, s).tolist() == [[False, True, False, True]]
    assert low_confidence_dynamic(c, s).tolist() == [[True, True, False, True]]
    c.least = 1
    assert low_confidence_dynamic(c, s).tolist() == [[True, True, False, False]]
    c.ranking = None
    assert low_confidence_dynamic(c, s).tolist() == [[True, False, False, False]]
    assert low_confidence_static(c, s).tolist() == [[True, False, True, False]]


def test_noise_of_the_choice_is_no_tokens() -> None:
    keys = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
    choice = noise.gumbel_at(keys, torch.tensor([noise.CHOICE_ID]))
    assert not torch.isin(choice, noise.gumbel(keys, 1000)).any()
    assert torch.equal(noise.gumbel_at(keys, torch.arange(9)), noise.gumbel(keys, 9))


# -- schedules


@pytest.mark.parametrize(
    "size, steps, expected",
    [
        # Times 1, .75025, .5005, .25075, .001: 3 (1 - .5005/.75025) = 0.9987, nothing; 3 (1 - .25075/.5005) = 1.497, one; two.
        (4, 4, [1, 1, 2]),
        (4, 3, [1, 1, 2]),  # times 1, .667, .334, .001: 3 (1 - .334/.667) = 1.4978
        (8, 4, [1, 2, 2, 3]),  # 7 * .33289 = 2.33; 5 * .49900 = 2.495
        (8, 8, [1, 1, 1, 1, 1, 1, 2]),  # the second of eight reveals 7 * 0.14271 = 0.999: nothing
        (4, 2, [1, 3]),
        (8, 1, [1, 7]),
        (1, 5, [1]),
    ],
)
def test_dreams_schedule_by_hand(size: int, steps: int, expected: list[int]) -> None:
    assert dream(size, steps) == expected


def test_schedules_reveal_everything_and_never_nothing() -> None:
    for schedule, size, steps in itertools.product([even, dream], [1, 2, 3, 8, 32], [1, 2, 3, 8, 33]):
        counts = schedule(size, steps)
        assert sum(counts) == size and min(counts) >= 1
        assert len(counts) <= (steps if schedule is even else max(steps, 2))


def test_blocks_and_their_steps() -> None:
    assert blocks_of(10, 4) == [4, 4, 2] and blocks_of(8, 4) == [4, 4] and blocks_of(3, 4) == [3]
    assert steps_of(8, 3) == [3, 3, 2] and steps_of(2, 3) == [1, 1, 1]
    assert even(8, 3) == [3, 3, 2] and even(3, 8) == [1, 1, 1]


# -- what is refused


def test_memory_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaDA-8B, canvases of 1,000 tokens: 1000 * 2 * 32 layers * 32 heads * 128 * 2 bytes = 0.488 GiB each of keys and values."""
    c = DecoderConfig(126_464, 4096, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128, intermediate_size=12_288)
    cuda, bf16 = torch.device("cuda"), torch.bfloat16
    computed = 2 * (6 * 4096 + 4 * 96 * 128 + 4 * 12_288)  # bytes of a row

    def fit(free_gib: float, wanted: int = 64, has_cache: bool = True) -> tuple[int, int]:
        monkeypatch.setattr(canvas_cache, "free_memory", lambda device: int(free_gib * GIB))
        return canvases_that_fit(c, wanted, 1000, has_cache, bf16, cuda)

    usable = lambda free: int(0.9 * free * GIB) - int(1.25 * GIB)  # noqa: E731
    assert fit(120) == (64, 32_768)
    assert fit(20) == ((usable(20) - 32_768 * computed) // 524_288_000, 32_768)
    assert fit(10)[1] == usable(10) // 2 // computed < 32_768, "half of the memory for activations"
    assert fit(120, has_cache=False) == (32, 32_768), "more canvases than fit into a forward would wait"
    assert fit(120, wanted=7, has_cache=False)[0] == 7
    with pytest.raises(UserError, match=r"max_gen_length: one canvas of 1000 tokens takes 0.7 GiB \(0.5 of keys.*2.0 GiB are free"):
        fit(2)
    assert canvases_that_fit(c, 500, 1000, True, bf16, torch.device("cpu")) == (500, 32_768)


def test_requests_that_cannot_be_served() -> None:
    family, decoder = decoder_of("dream")
    engine = build_engine(decoder, family)
    with pytest.raises(UserError, match="token ids must be below"):
        engine.generate([Request("t", [99])], settings())
    with pytest.raises(UserError, match="it is empty, and dream predicts a token from the one before"):
        engine.generate([Request("t", [])], settings())
    for changes in [{"steps": 0}, {"further_horizon": -1}, {"alg_temp": -0.1}, {"pad_target_penalty": 0.0}]:
        with pytest.raises(UserError, match=next(iter(changes))):
            settings(**changes)
    assert engine.generate([], settings()) == []


def test_an_empty_prompt_without_shift() -> None:
    family, decoder = decoder_of("llada")
    s = settings(block_size=4, strategy="sequential")
    request = Request("t", [])
    assert_same(build_engine(decoder, family).generate([request], s)[0], slow_canvas(decoder, family, request, 0, s)[0])


def test_diverged_weights_are_an_error() -> None:
    family, decoder = decoder_of("llada")
    decoder.layers[1].mlp.down.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="have diverged"):
        build_engine(decoder, family).generate(random_requests([4]), settings())

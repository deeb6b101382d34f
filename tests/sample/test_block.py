"""The engine against a slow sampler without a cache, and against itself with other sequences in flight."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from common.errors import UserError
from common.records import Rollout
from models.attention import masked_attention
from models.registry import FAMILIES
from sample import block, sampling
from sample.engine import Request, SamplingSettings, build_engine
from tests.sample.reference import MASK, STOPS, random_decoder, random_requests, slow_generate

SDAR = FAMILIES.get("sdar")
DECODINGS = [
    dict(temperature=1.0),
    dict(temperature=0.0),
    dict(temperature=0.7, top_k=5, top_p=0.9),
    dict(temperature=1.3, top_k=6, confidence="filtered"),
    dict(temperature=0.8, top_p=0.8, confidence="filtered", greedy=True),
]
THRESHOLD = {"confidence": 0.3, "margin_confidence": 0.2, "neg_entropy": -1.8, "random": 0.6}


def settings(**changes) -> SamplingSettings:
    default = dict(max_tokens=11, mask_id=MASK, stop_ids=STOPS, forbidden_ids=(MASK, 22), seed=5)
    return SamplingSettings(**{**default, **changes})


def assert_same(ours: Rollout, theirs: Rollout, tolerance: float = 1e-5) -> None:
    for name in ["logprobs", "entropy"]:
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=tolerance, rel=0), name
    floats = dict(logprobs=[0.0] * len(ours.response_ids), entropy=[0.0] * len(ours.response_ids))
    assert dataclasses.replace(ours, **floats) == dataclasses.replace(theirs, **floats)


@pytest.mark.parametrize("strategy", ["low_confidence_static", "low_confidence_dynamic", "sequential", "entropy_bounded"])
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_equals_the_slow_sampler(size: int, strategy: str) -> None:
    """Every remainder of the prompt, no prompt, prompts within the first block; every target with several decodings."""
    decoder = random_decoder()
    engine = build_engine(decoder, SDAR, max_active=5)
    requests = random_requests([*range(size, max(2 * size, size + 6)), 1, 0])
    seen = set()
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
        # Without a prompt the first block's positions all have one distribution: most scores tie but for rounding.
        tied = strategy == "entropy_bounded" or not (strategy == "sequential" or target == "random")
        some = requests[:: 4 if size == 16 and n else 1]  # every remainder with one target
        some = [request for request in some if request.prompt_ids or not tied]
        for ours, request in zip(engine.generate(some, s), some):
            theirs = slow_generate(decoder, request, 0, s)
            assert_same(ours, theirs)
            seen.add(theirs.finish)
    assert seen == {"stop", "length"}


@pytest.mark.parametrize("decoding", DECODINGS)
def test_decodings_equal_the_slow_sampler(decoding: dict) -> None:
    decoder = random_decoder(1, tie_word_embeddings=True, num_kv_heads=4, qk_norm=False, qkv_bias=True)
    requests = random_requests([3, 6, 9], num_samples=2)
    for strategy in ["low_confidence_dynamic", "entropy_bounded"]:
        s = settings(strategy=strategy, threshold=0.4, **decoding)
        rollouts = build_engine(decoder, SDAR).generate(requests, s)
        expected = [slow_generate(decoder, request, sample, s) for request in requests for sample in range(2)]
        for ours, theirs in zip(rollouts, expected, strict=True):
            assert_same(ours, theirs)


def test_rollouts_do_not_depend_on_what_is_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = random_decoder(2)
    # No empty prompt: the positions of its first block have one distribution, so their scores tie but for rounding, and
    # logits are not promised to be bit-equal across batch shapes.
    requests = random_requests([5, 1, 12, 3, 8, 9, 21, 4], num_samples=5)
    s = settings(strategy="low_confidence_dynamic", threshold=0.3, max_tokens=18)
    expected = [r for request in requests for r in build_engine(decoder, SDAR).generate([request], s)]
    assert [(r.task_id, r.sample) for r in expected] == [(request.task_id, n) for request in requests for n in range(5)]
    for max_active in [1, 3, 7, 64]:
        engine = build_engine(decoder, SDAR, max_active)
        for ours, theirs in zip(engine.generate(requests, s), expected, strict=True):
            assert_same(ours, theirs)
        assert engine.statistics.mean_active > 0.6 * min(max_active, len(expected))
    backwards = build_engine(decoder, SDAR, 6).generate(requests[::-1], s)
    for ours, theirs in zip(sorted(backwards, key=lambda r: (r.task_id, r.sample)), expected, strict=True):
        assert_same(ours, theirs)
    monkeypatch.setattr(block, "PREFILL_TOKENS", 16)
    monkeypatch.setattr(sampling, "LOGITS_AT_A_TIME", 50)
    for ours, theirs in zip(build_engine(decoder, SDAR, 7).generate(requests, s), expected, strict=True):
        assert_same(ours, theirs)


def test_seed_task_and_sample_change_what_is_drawn() -> None:
    decoder = random_decoder(2)
    engine = build_engine(decoder, SDAR)
    s = settings(max_tokens=12, stop_ids=())
    request = random_requests([5], num_samples=3)[0]
    first = [r.response_ids for r in engine.generate([request], s)]
    assert len({tuple(ids) for ids in first}) == 3
    assert [r.response_ids for r in engine.generate([request], s)] == first
    other_task = dataclasses.replace(request, task_id="another")
    assert engine.generate([other_task], s)[0].response_ids != first[0]
    assert engine.generate([request], dataclasses.replace(s, seed=6))[0].response_ids != first[0]


def test_stop_token_ends_at_the_end_of_its_block_and_length_counts_max_tokens() -> None:
    decoder = random_decoder()
    decoder.lm_head.weight.zero_()
    decoder.lm_head.weight[17] = decoder.embed.weight.new_ones(32)  # all hidden states: 17 or, at negative sums, any other id
    decoder.norm.weight.zero_()  # logits are all zero: greedy takes the lowest id, 0
    engine = build_engine(decoder, SDAR)
    request = Request("task", [1, 2, 3, 4, 17], 1)  # a stop token in the prompt does not stop

    rollout = engine.generate([request], settings(temperature=0.0, max_tokens=6))[0]
    assert rollout.response_ids == [0] * 7  # 5 + 6 tokens are 3 blocks: 12
    assert (rollout.num_response, rollout.finish, rollout.num_forwards) == (6, "length", 7)
    assert rollout.step_map == [1, 2, 3, 4, 5, 6, 7]
    assert rollout.logprobs == pytest.approx([-torch.tensor(22.0).log().item()] * 7)  # 24 ids less two forbidden ones
    assert rollout.entropy == pytest.approx([torch.tensor(22.0).log().item()] * 7)

    rollout = engine.generate([request], settings(temperature=0.0, max_tokens=6, stop_ids=(0,)))[0]
    assert (rollout.response_ids, rollout.num_response, rollout.finish) == ([0] * 3, 1, "stop")


def test_stop_token_behind_the_last_response_token_does_not_count() -> None:
    decoder, engine_settings = random_decoder(3), settings(stop_ids=(), max_tokens=5, temperature=0.0)
    request = random_requests([4])[0]
    engine = build_engine(decoder, SDAR)
    free = engine.generate([request], engine_settings)[0]
    behind = next(token for token in free.response_ids[5:] if token not in free.response_ids[:5])
    stopped = engine.generate([request], dataclasses.replace(engine_settings, stop_ids=(behind,)))[0]
    assert (stopped.finish, stopped.num_response, stopped.response_ids) == ("length", 5, free.response_ids)


def test_a_generated_mask_id_is_an_ordinary_token_where_it_is_allowed() -> None:
    """The golden data are made so: what is still masked is known by position, not by token id."""
    decoder = random_decoder()
    decoder.norm.weight.zero_()
    s = settings(temperature=0.0, forbidden_ids=tuple(range(MASK)), max_tokens=8, stop_ids=())
    rollout = build_engine(decoder, SDAR).generate([Request("task", [1], 1)], s)[0]
    assert rollout.response_ids == [MASK] * 11
    assert rollout.step_map == list(range(1, 12))


def test_prompt_is_prefilled_once_for_all_samples() -> None:
    decoder = random_decoder()
    engine = build_engine(decoder, SDAR, max_active=2)
    engine.generate(random_requests([9, 14], num_samples=5), settings())
    assert engine.statistics.prefill_tokens <= 2 * 12  # one forward with both, padded, or two
    assert engine.statistics.sequences == 10


def test_new_weights_are_seen_and_the_cache_is_released() -> None:
    decoder = random_decoder()
    engine = build_engine(decoder, SDAR)
    requests, s = random_requests([6, 9]), settings(temperature=0.0)
    before = engine.generate(requests, s, weights_version=3)
    assert {r.weights_version for r in before} == {3}
    for parameter in decoder.parameters():
        parameter.copy_(torch.roll(parameter, 1, 0))
    engine.release()
    assert engine.cache is None
    for ours, request in zip(engine.generate(requests, s), requests):
        assert_same(ours, slow_generate(decoder, request, 0, s))
    longer = dataclasses.replace(s, max_tokens=30)  # the cache grows
    for ours, request in zip(engine.generate(requests, longer), requests):
        assert_same(ours, slow_generate(decoder, request, 0, longer))


def test_gradients_work_after_sampling() -> None:
    decoder = random_decoder().requires_grad_(True).train()
    engine = build_engine(decoder, SDAR)
    engine.generate(random_requests([6]), settings())
    assert decoder.training
    x = torch.tensor([1, 2])
    decoder.lm_head(decoder(x, x, masked_attention(torch.ones(2, 2, dtype=torch.bool)))).square().sum().backward()
    assert all(p.grad is not None for p in decoder.parameters())


def test_progress_and_statistics() -> None:
    calls = []
    engine = build_engine(random_decoder(), SDAR, max_active=3)
    rollouts = engine.generate(random_requests([6, 7, 8, 9]), settings(), progress=lambda *args: calls.append(args))
    tokens, forwards = sum(len(r.response_ids) for r in rollouts), sum(r.num_forwards for r in rollouts)
    assert calls[-1] == (4, tokens, forwards)
    statistics = engine.statistics
    assert len(calls) == statistics.engine_forwards and statistics.tokens_per_forward == tokens / forwards
    blocks = sum((len(r.prompt_ids) + len(r.response_ids)) // 4 - len(r.prompt_ids) // 4 for r in rollouts)
    assert statistics.commit_items == blocks - 4  # a sequence's last block is never committed


def test_bad_input() -> None:
    engine = build_engine(random_decoder(), SDAR)
    assert engine.generate([], settings()) == []
    with pytest.raises(UserError, match="task 9.*below the vocabulary's 24"):
        engine.generate([Request("9", [24])], settings())
    for changes in [dict(top_p=0.0), dict(max_tokens=0), dict(strategy="dynamic"), dict(target="entropy"), dict(steps_per_block=0)]:
        with pytest.raises(UserError):
            settings(**changes)
    diverged = random_decoder()
    diverged.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="diverged"):
        build_engine(diverged, SDAR).generate(random_requests([4]), settings())

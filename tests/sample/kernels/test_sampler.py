"""The fused sampler against sample/sampling.py, and its noise bit for bit."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from models.kernels.launch import jit, tl
from sample import noise
from sample.engine import SamplingSettings
from sample.kernels import sampler
from sample.kernels.noise import mix, random_bits, uniform
from sample.kernels.sampler import draw_rows, draw_rows_reference, exponential
from sample.registry import TARGETS

OWN_TARGETS = ["confidence", "margin_confidence", "neg_entropy", "random"]


def settings(**changes) -> SamplingSettings:
    return SamplingSettings(max_tokens=1, mask_id=0, **changes)


def random_rows(h: int, vocab_size: int, seed: int, std: float = 3.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits [h, V], keys [h, 2], forbidden [V], a tenth of it."""
    g = torch.Generator().manual_seed(seed)
    keys = torch.randint(-(2**31), 2**31, (h, 2), generator=g).int()
    return std * torch.randn(h, vocab_size, generator=g), keys, torch.rand(vocab_size, generator=g) < 0.1


def in_kernel(device: torch.device, logits, keys, s, forbidden, num_rows=None):
    assert sampler.kernel_target(s) is not None
    return draw_rows(logits.to(device, copy=True), keys.to(device), s, forbidden.to(device), num_rows)


def exact_draws(logits, keys, s, forbidden):
    """The reference in float64: in float32, torch's log-softmax of 150,000 ids on the CPU is 4e-6 off, and the entropy 3e-5."""
    draws = draw_rows_reference(logits.double(), keys, s, forbidden)
    return type(draws)(draws.tokens, *(getattr(draws, f.name).float() for f in dataclasses.fields(draws)[1:]))


def assert_close(ours, theirs, rows: int | None = None) -> None:
    for field in dataclasses.fields(theirs):
        one, other = getattr(ours, field.name)[:rows].cpu(), getattr(theirs, field.name)[:rows]
        if field.name == "tokens":
            assert one.tolist() == other.tolist()
        else:
            torch.testing.assert_close(one, other, atol=2e-5, rtol=0, msg=lambda text, name=field.name: f"{name}: {text}")


@jit
def noise_kernel(keys_ptr, ids_ptr, bits_ptr, uniform_ptr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    k0 = tl.load(keys_ptr + i * 2).to(tl.uint32, bitcast=True)
    k1 = tl.load(keys_ptr + i * 2 + 1).to(tl.uint32, bitcast=True)
    bits = random_bits(k0, k1, mix(tl.load(ids_ptr + i).to(tl.uint32, bitcast=True)))
    tl.store(bits_ptr + i, bits.to(tl.int32, bitcast=True))
    tl.store(uniform_ptr + i, uniform(bits))


def test_noise_is_equal_bit_for_bit(device: torch.device) -> None:
    count, g = 4096, torch.Generator().manual_seed(0)
    keys = torch.randint(-(2**31), 2**31, (count, 2), generator=g).int()
    ids = torch.cat([torch.tensor([-1, 0, 1, 151_935]), torch.randint(0, 200_000, (count - 4,), generator=g)]).int()
    bits, u = torch.empty(count, dtype=torch.int32, device=device), torch.empty(count, device=device)
    noise_kernel[(1,)](keys.to(device), ids.to(device), bits, u, COUNT=count)
    pick = lambda function: torch.cat([function(keys[i : i + 1], ids[i : i + 1])[0] for i in range(count)])  # noqa: E731
    assert torch.equal(bits.cpu(), pick(noise.random_bits))
    assert torch.equal(u.cpu(), pick(noise.uniform))


@jit
def exponential_kernel(v_ptr, out_ptr, APPROXIMATE: tl.constexpr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(out_ptr + i, exponential(tl.load(v_ptr + i), APPROXIMATE))


def test_exponential(device: torch.device) -> None:
    edges = torch.tensor([2.0**-32, 0.0625, 0.06249999, 0.5, 1 - 2.0**-24, 0.9, 0.1, 0.2])
    v = torch.cat([torch.logspace(-31, 0, 2040, base=2) * 0.99, edges])
    out = torch.empty(2048, device=device)
    exponential_kernel[(1,)](v.to(device), out, APPROXIMATE=device.type == "cuda", COUNT=2048)
    exact = -torch.log1p(-v.double()) / math.log(2)
    assert ((out.cpu().double() - exact).abs() / exact).max() < 3e-6  # as far off may a Gumbel value be, which is its logarithm


@pytest.mark.parametrize("target", OWN_TARGETS)
@pytest.mark.parametrize("decoding", [dict(), dict(temperature=0.6), dict(temperature=0), dict(temperature=1.7, greedy=True)])
def test_kernel_equals_reference(decoding: dict, target: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    s = settings(target=target, **decoding)
    if device.type == "cpu":
        monkeypatch.setattr(sampler, "LANES", 16)  # several tiles and splits of a small vocabulary
    shapes = [(1, 50), (3, 300)] if device.type == "cpu" else [(1, 50), (5, 700), (9, 4099), (1, 151_936), (48, 151_936)]
    for h, vocab_size in shapes:
        logits, keys, forbidden = random_rows(h, vocab_size, seed=h)
        forbidden[0] = False
        theirs = exact_draws(logits, keys, s, forbidden)
        assert not forbidden[theirs.tokens].any()
        assert_close(in_kernel(device, logits, keys, s, forbidden), theirs)


def test_ties_go_to_the_lowest_id(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "LANES", 8)
    logits = torch.zeros(4, 300)
    logits[0, [299, 130, 131]] = 5.0
    logits[1, [7, 8]] = 5.0
    forbidden = torch.zeros(300, dtype=torch.bool)
    forbidden[:3] = True
    keys, s = torch.zeros(4, 2, dtype=torch.int32), settings(temperature=0, target="margin_confidence")
    ours = in_kernel(device, logits, keys, s, forbidden)
    assert ours.tokens.tolist() == [130, 7, 3, 3]
    assert ours.score.tolist() == [0.0] * 4
    torch.testing.assert_close(ours.entropy[2].item(), math.log(297), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.logprobs[3].item(), -math.log(297), atol=1e-5, rtol=0)


def test_rows_of_nobody_are_left_alone(device: torch.device) -> None:
    logits, keys, forbidden = random_rows(6, 80, seed=1)
    logits[4:] = torch.nan
    s = settings()
    num_rows = torch.tensor([4], dtype=torch.int32, device=device)
    theirs = draw_rows_reference(logits.clone(), keys, s, forbidden)
    assert_close(in_kernel(device, logits, keys, s, forbidden, num_rows), theirs, rows=4)


@pytest.mark.parametrize("decoding", [dict(), dict(temperature=0)])
def test_what_is_not_finite_shows_in_the_log_prob(decoding: dict, device: torch.device) -> None:
    logits, keys, forbidden = random_rows(7, 100, seed=2)
    forbidden[:20] = False
    logits[0, 3] = torch.nan
    logits[1] = torch.nan
    logits[2, 5] = torch.inf
    logits[3] = -torch.inf
    logits[4, 6:] = -torch.inf  # fine: without probability
    forbidden[99] = True
    logits[5, 99] = torch.nan  # nobody looks at a forbidden id
    ours = in_kernel(device, logits, keys, settings(**decoding), forbidden)
    assert ours.logprobs.isfinite().tolist() == [False, False, False, False, True, True, True]
    assert ((0 <= ours.tokens) & (ours.tokens < 100)).all()
    theirs = draw_rows_reference(logits.clone(), keys, settings(**decoding), forbidden)
    assert ours.logprobs.isfinite().tolist() == theirs.logprobs.isfinite().tolist()
    for name in ["tokens", "logprobs", "entropy", "score"]:
        torch.testing.assert_close(getattr(ours, name)[4:].cpu(), getattr(theirs, name)[4:], atol=1e-5, rtol=0, check_dtype=False)


def test_extreme_logits(device: torch.device) -> None:
    """The largest comes first or last, and far above the others."""
    forbidden, keys = torch.zeros(64, dtype=torch.bool), torch.zeros(3, 2, dtype=torch.int32)
    logits = torch.linspace(-2000.0, 3000.0, 64).repeat(3, 1)
    logits[1] = logits[1].flip(0)
    logits[2] = 1e4
    s = settings(target="margin_confidence")
    assert_close(in_kernel(device, logits, keys, s, forbidden), draw_rows_reference(logits.clone(), keys, s, forbidden))


ONLY_TORCH = [
    dict(top_k=3),
    dict(top_p=0.7),
    dict(top_k=5, confidence="filtered"),
    dict(target="first id"),
    dict(scores_unscaled=True),
]


@pytest.mark.parametrize("changes", ONLY_TORCH)
def test_all_else_is_torch(changes: dict, any_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TARGETS, "_entries", dict(TARGETS._entries) | {"first id": lambda d: d.logprobs[:, 0]})
    s = settings(temperature=0.8, **changes)
    assert sampler.kernel_target(s) is None
    logits, keys, forbidden = random_rows(5, 60, seed=3)
    theirs = sampler.draw((logits / 0.8).masked_fill(forbidden, -torch.inf), keys, s)
    ours = draw_rows(logits.to(any_device), keys.to(any_device), s, forbidden.to(any_device))
    assert_close(ours, theirs)


def test_draws_follow_the_distribution(device: torch.device) -> None:
    """Frequencies within four standard deviations."""
    if device.type == "cpu":
        pytest.skip("many draws take the interpreter long; they equal the reference's, whose frequencies are tested")
    n = 40_000
    p = torch.tensor([0.1, 0.4, 0.0, 0.2, 0.3])
    keys = torch.randint(-(2**31), 2**31, (n, 2), generator=torch.Generator().manual_seed(4)).int()
    draws = in_kernel(device, p.log().repeat(n, 1), keys, settings(), torch.zeros(5, dtype=torch.bool))
    counts = draws.tokens.long().cpu().bincount(minlength=5).tolist()
    assert all(abs(count - n * q) <= 4 * math.sqrt(n * q * (1 - q)) for count, q in zip(counts, p.tolist()))

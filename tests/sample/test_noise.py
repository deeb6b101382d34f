"""The recipe against plain Python integers, and statistics of what comes out."""

from __future__ import annotations

import math

import torch

from sample import noise

WORD = 2**32 - 1


def plain_mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x21F0AAAD & WORD
    x ^= x >> 15
    x = x * 0xD35A2D97 & WORD
    return x ^ x >> 15


def plain_bits(sequence: tuple[int, int], position: int, forward: int, token: int) -> int:
    a, b = (word & WORD for word in sequence)
    k0 = plain_mix((plain_mix(a ^ position) + forward) & WORD)
    k1 = plain_mix(plain_mix((b + position) & WORD) ^ forward)
    x = plain_mix(token) ^ k0
    x ^= x >> 16
    x = (x * 0x21F0AAAD & WORD) ^ k1
    x ^= x >> 15
    x = x * 0xD35A2D97 & WORD
    return x ^ x >> 15


def keys_of(sequences: list[tuple[int, int]], position: torch.Tensor, forward: torch.Tensor) -> torch.Tensor:
    return noise.row_keys(torch.tensor(sequences, dtype=torch.int32).expand(len(position), 2), position, forward)


def test_bits_follow_the_recipe() -> None:
    sequence = noise.sequence_key(5, "task", 3)
    assert sequence == (-140313529, 675691663)  # on every machine
    position, forward = torch.tensor([0, 7, 4095]), torch.tensor([1, 2, 999])
    ids = torch.tensor([0, 1, 27, 151_935])
    bits = noise.random_bits(keys_of([sequence], position, forward), ids)
    for row in range(3):
        for column in range(4):
            expected = plain_bits(sequence, int(position[row]), int(forward[row]), int(ids[column]))
            assert int(bits[row, column]) & WORD == expected
    v = noise.uniform(keys_of([sequence], position, forward), ids)
    assert float(v[0, 0]) == torch.tensor(((int(bits[0, 0]) & WORD) >> 1) + 0.5).mul(2.0**-31).item()


def test_sequence_keys_differ_by_each_part() -> None:
    parts = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1), (1, "0/a", 0), (0, "1/a", 1), (10, "a", 0), (1, "a", 10)]
    assert len({noise.sequence_key(*part) for part in parts}) == len(parts)


def test_uniform_is_inside_the_open_interval_and_gumbel_is_finite() -> None:
    bits = torch.tensor([0, 1, -1, -2, 2**31 - 1, -(2**31)], dtype=torch.int32)
    v = (noise.shift_right(bits, 1).float() + 0.5).mul(2.0**-31).clamp(max=1 - 2.0**-24)
    assert (v > 0).all() and (v < 1).all()
    gumbel = -(-torch.log1p(-v)).log()
    assert gumbel.isfinite().all()
    torch.testing.assert_close(gumbel[0].double(), torch.tensor(2.0**-32).double().log().neg(), rtol=1e-6, atol=0)


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((counts - expected).square() / expected).sum())


def test_tokens_follow_the_distribution_for_every_way_of_counting() -> None:
    """Chi-square with 7 degrees of freedom over 20,000 draws: below 24.3 with probability 0.999."""
    p = torch.tensor([0.02, 0.3, 0.08, 0.2, 0.1, 0.15, 0.05, 0.1])
    n = 20_000
    count, one = torch.arange(n), torch.ones(n, dtype=torch.int64)
    samples = [noise.sequence_key(0, "task", sample) for sample in range(n)]
    for keys in [
        keys_of([noise.sequence_key(0, "task", 0)], count, one),
        keys_of([noise.sequence_key(0, "task", 0)], one, count),
        keys_of(samples, one, one),
    ]:
        tokens = (p.log() + noise.gumbel(keys, 8)).argmax(1)
        assert chi_square(tokens.bincount(minlength=8).double(), n * p.double()) < 24.3


def test_neighbours_are_independent() -> None:
    """Draws at neighbouring positions, forwards, samples and ids: counts of pairs in 4 x 4 cells."""
    n = 20_000
    count, one = torch.arange(n), torch.ones(n, dtype=torch.int64)
    key = [noise.sequence_key(0, "task", 0)]
    ids = torch.tensor([11, 12])
    cells = lambda keys, id: (noise.uniform(keys, ids)[:, id] * 4).long()  # noqa: E731
    first = keys_of(key, count, one)
    for second, id in [
        (keys_of(key, count + 1, one), 0),
        (keys_of(key, count, one + 1), 0),
        (keys_of(key, one, count), 0),
        (keys_of([noise.sequence_key(0, "task", 1)], count, one), 0),
        (keys_of([noise.sequence_key(1, "task", 0)], count, one), 0),
        (first, 1),
    ]:
        pairs = (cells(first, 0) * 4 + cells(second, id)).bincount(minlength=16)
        assert chi_square(pairs.double(), torch.full((16,), n / 16).double()) < 27.9 + 10  # 15 with the margins: 37.7


def test_a_masked_position_is_drawn_anew_at_every_forward() -> None:
    """With two equal ids a token repeats at the next forward half of the time, not always."""
    n = 20_000
    keys = keys_of([noise.sequence_key(0, "task", 0)], torch.full((n,), 9), torch.arange(n))
    tokens = noise.gumbel(keys, 2).argmax(1)
    repeats = int((tokens[1:] == tokens[:-1]).sum())
    assert abs(repeats - n / 2) < 4 * math.sqrt(n) / 2


def test_gumbel_moments() -> None:
    keys = keys_of([noise.sequence_key(3, "x", 0)], torch.arange(2000), torch.ones(2000))
    gumbel = noise.gumbel(keys, 100).double()
    assert abs(gumbel.mean() - 0.57722) < 0.02
    assert abs(gumbel.var() - math.pi**2 / 6) < 0.04

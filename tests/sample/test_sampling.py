"""Filters and recorded numbers on distributions worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from sample.engine import SamplingSettings
from sample.sampling import draw, kept

P = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
KEYS = torch.tensor([[1, 2]], dtype=torch.int32)


@pytest.mark.parametrize(
    "top_k, top_p, expected",
    [
        (0, 1.0, [True, True, True, True]),
        (1, 1.0, [False, True, False, False]),
        (2, 1.0, [False, True, False, True]),
        (9, 1.0, [True, True, True, True]),
        (0, 0.3, [False, True, False, False]),  # 0.4 stays, 0.4 > 0.3 stands before the next
        (0, 0.45, [False, True, False, True]),
        (0, 0.75, [False, True, True, True]),
        (0, 0.95, [True, True, True, True]),
        (2, 0.5, [False, True, False, False]),  # top-p after top-k: 4/7 > 0.5
        (2, 0.6, [False, True, False, True]),
    ],
)
def test_kept(top_k: int, top_p: float, expected: list[bool]) -> None:
    assert kept(P.log(), top_k, top_p)[0].tolist() == expected


def test_top_p_keeps_the_id_before_which_the_mass_equals_top_p() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25]])
    assert kept(p.log(), 0, 0.5)[0].tolist() == [True, True, False]


def settings(**changes) -> SamplingSettings:
    return SamplingSettings(max_tokens=1, mask_id=0, **changes)


def test_numbers_are_recorded_before_the_filters() -> None:
    draws = draw(P.log() + 3.0, KEYS, settings(top_k=2, greedy=True))
    assert draws.tokens.tolist() == [1]
    assert draws.logprobs.item() == pytest.approx(math.log(0.4), abs=1e-6)
    entropy = -sum(p * math.log(p) for p in [0.1, 0.4, 0.2, 0.3])
    assert draws.entropy.item() == pytest.approx(entropy, abs=1e-6)
    assert draws.score.item() == pytest.approx(0.4, abs=1e-6)


def test_filtered_confidence_is_renormalised() -> None:
    draws = draw(P.log(), KEYS, settings(top_k=2, greedy=True, confidence="filtered"))
    assert draws.score.item() == pytest.approx(4 / 7, abs=1e-6)
    assert draws.score_entropy.item() == pytest.approx(-(4 / 7 * math.log(4 / 7) + 3 / 7 * math.log(3 / 7)), abs=1e-6)
    assert draws.logprobs.item() == pytest.approx(math.log(0.4), abs=1e-6)


def test_scores_may_be_of_temperature_1() -> None:
    """LLaDA's sampler: at temperature 0.1 a token of 40 % is nearly certain to be drawn, and scores 0.4."""
    s = settings(temperature=0.1, greedy=True, scores_unscaled=True)
    scaled = [p**10 / sum(q**10 for q in [0.1, 0.4, 0.2, 0.3]) for p in [0.1, 0.4, 0.2, 0.3]]
    entropies = [-sum(p * math.log(p) for p in shares) for shares in ([0.1, 0.4, 0.2, 0.3], scaled)]
    draws = draw(P.log() / 0.1, KEYS, s)
    assert draws.score.item() == pytest.approx(0.4, abs=1e-5)
    assert draws.score_entropy.item() == pytest.approx(entropies[0], abs=1e-5)
    assert draws.logprobs.item() == pytest.approx(math.log(scaled[1]), abs=1e-5)
    assert draws.entropy.item() == pytest.approx(entropies[1], abs=1e-5)
    margin = settings(temperature=0.1, greedy=True, scores_unscaled=True, target="margin_confidence")
    assert draw(P.log() / 0.1, KEYS, margin).score.item() == pytest.approx(0.1, abs=1e-5)
    filtered = settings(temperature=0.1, greedy=True, scores_unscaled=True, top_k=2, confidence="filtered")
    assert draw(P.log() / 0.1, KEYS, filtered).score.item() == pytest.approx(4 / 7, abs=1e-5)
    assert draw(P.log() / 0.1, KEYS, settings(temperature=0.1, greedy=True)).score.item() == pytest.approx(scaled[1], abs=1e-5)


def test_sampling_with_top_k_1_is_certain() -> None:
    draws = draw(torch.randn(50, 30), torch.randint(0, 2**31, (50, 2), dtype=torch.int32), settings(top_k=1, confidence="filtered"))
    assert draws.score.tolist() == [1.0] * 50


def test_targets() -> None:
    score = lambda target, **more: draw(P.log(), KEYS, settings(target=target, greedy=True, **more)).score.item()  # noqa: E731
    assert score("confidence") == pytest.approx(0.4, abs=1e-6)
    assert score("margin_confidence") == pytest.approx(0.1, abs=1e-6)
    assert score("margin_confidence", top_k=2, confidence="filtered") == pytest.approx(1 / 7, abs=1e-6)
    assert score("margin_confidence", top_k=1, confidence="filtered") == 1.0
    assert score("neg_entropy") == pytest.approx(sum(p * math.log(p) for p in [0.1, 0.4, 0.2, 0.3]), abs=1e-6)
    assert 0 < score("random") < 1


def test_forbidden_ids_carry_no_probability_and_are_never_drawn() -> None:
    logits = torch.zeros(2000, 6)
    logits[:, 4:] = -torch.inf
    keys = torch.randint(-(2**31), 2**31 - 1, (2000, 2), generator=torch.Generator().manual_seed(0)).int()
    for s in [settings(), settings(top_k=5, top_p=0.99)]:
        draws = draw(logits.clone(), keys, s)
        assert set(draws.tokens.tolist()) == {0, 1, 2, 3}
        torch.testing.assert_close(draws.logprobs, torch.full((2000,), -math.log(4)))
        torch.testing.assert_close(draws.entropy, torch.full((2000,), math.log(4)))


def test_drawn_tokens_follow_the_filtered_distribution() -> None:
    n = 40_000
    keys = torch.randint(-(2**31), 2**31 - 1, (n, 2), generator=torch.Generator().manual_seed(1)).int()
    for s, expected in [(settings(), [0.1, 0.4, 0.2, 0.3]), (settings(top_k=3), [0.0, 4 / 9, 2 / 9, 3 / 9])]:
        counts = draw(P.log().expand(n, 4), keys, s).tokens.bincount(minlength=4)
        for count, p in zip(counts.tolist(), expected):
            assert abs(count - n * p) <= 4 * math.sqrt(n * p * (1 - p))

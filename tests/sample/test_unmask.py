"""Unmasking strategies on numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from sample.engine import SamplingSettings
from sample.registry import UNMASKING
from sample.unmask import Candidates, rank, schedule


def reveal(strategy: str, masked: str, score: list[float], count: int, entropy: list[float] | None = None, **changes) -> str:
    """One sequence; masks and answers as text, x = masked or revealed. A second, fully masked row goes along."""
    settings = SamplingSettings(max_tokens=1, mask_id=0, strategy=strategy, **changes)
    rows = torch.tensor([[c == "x" for c in masked], [True] * len(masked)])
    values = [torch.tensor([x, x[::-1]]) for x in (score, entropy or [0.0] * len(score))]
    out = UNMASKING.get(strategy)(Candidates(rows, *values, torch.tensor([count, 1])), settings)
    assert out.dtype == torch.bool and not (out & ~rows).any()
    return "".join("x" if c else "." for c in out[0].tolist())


def test_schedule_puts_larger_shares_first() -> None:
    assert schedule(8, 3).tolist() == [3, 3, 2]
    assert schedule(4, 4).tolist() == [1, 1, 1, 1]
    assert schedule(4, 1).tolist() == [4]
    assert schedule(2, 4).tolist() == [1, 1, 0, 0]


def test_rank_breaks_ties_from_left_to_right_and_skips_what_is_revealed() -> None:
    score = torch.tensor([[0.5, 0.9, 0.5, 0.99]])
    assert rank(score, torch.tensor([[True, True, True, False]]))[0, :3].tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    "masked, score, count, expected",
    [
        ("xxxx", [0.1, 0.4, 0.3, 0.2], 2, ".xx."),
        ("x.xx", [0.1, 0.4, 0.3, 0.2], 2, "..xx"),
        ("xxxx", [0.5, 0.5, 0.5, 0.5], 2, "xx.."),
        ("...x", [0.9, 0.9, 0.9, 0.0], 3, "...x"),  # fewer remain than the schedule asks for
        ("xxxx", [-3.0, -1.0, -2.0, -4.0], 1, ".x.."),  # negative entropies
    ],
)
def test_low_confidence_static(masked: str, score: list[float], count: int, expected: str) -> None:
    assert reveal("low_confidence_static", masked, score, count) == expected


@pytest.mark.parametrize(
    "masked, score, count, expected",
    [
        ("xxxx", [0.95, 0.2, 0.91, 0.3], 1, "x.x."),  # all above
        ("xxxx", [0.90, 0.2, 0.89, 0.3], 1, "x..."),  # strictly above: none is, so the best
        ("xxxx", [0.95, 0.2, 0.5, 0.3], 2, "x.x."),  # one above, two due
        (".xxx", [0.99, 0.2, 0.91, 0.3], 1, "..x."),
    ],
)
def test_low_confidence_dynamic(masked: str, score: list[float], count: int, expected: str) -> None:
    assert reveal("low_confidence_dynamic", masked, score, count, threshold=0.9) == expected


def test_sequential() -> None:
    assert reveal("sequential", "..xx", [0.0, 0.0, 0.1, 0.9], 1) == "..x."
    assert reveal("sequential", ".xxx", [0.0, 0.0, 0.1, 0.9], 2) == ".xx."
    assert reveal("sequential", "..xx", [0.0, 0.0, 0.1, 0.9], 3) == "..xx"


def test_entropy_bounded() -> None:
    entropy = [0.5, 0.1, 0.2, 0.15]  # ascending 0.1, 0.15, 0.2, 0.5; sums less the largest: 0, 0.1, 0.25, 0.45
    for bound, expected in [(0.0, ".x.."), (0.099, ".x.."), (0.101, ".x.x"), (0.3, ".xxx"), (0.46, "xxxx")]:
        assert reveal("entropy_bounded", "xxxx", [0.0] * 4, 1, entropy, entropy_bound=bound) == expected
    assert reveal("entropy_bounded", "x.x.", [0.0] * 4, 1, entropy, entropy_bound=0.1) == "..x."  # 0.2 is paid by 0.5
    assert reveal("entropy_bounded", "x.x.", [0.0] * 4, 1, entropy, entropy_bound=0.2001) == "x.x."
    assert reveal("entropy_bounded", "xxxx", [0.0] * 4, 1, [0.0] * 4, entropy_bound=0.0) == "xxxx"  # certain: costs nothing

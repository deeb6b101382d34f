"""The tables of benchmarks/methods.py from made-up runs, and the judge of the tiny task by hand."""

from __future__ import annotations

import pytest

from benchmarks.methods import METHODS, ROOT, START, at_share, curve, seed_table, summary_table, total
from benchmarks.sorting_judge import verdict
from reward.judge_prompts import GradingPrompt


def final(sampled: float, greedy: float, speed: float) -> dict:
    return {
        kind: {"accuracy": value, "standard_error": 0.01, "tokens_per_forward": speed}
        for kind, value in [("sampled", sampled), ("greedy", greedy)]
    }


def run(sampled: float, responses: int) -> dict:
    curve = {10: 0.1, 20: 0.2, 30: 0.4, 40: 0.8}
    return {
        "final": final(sampled, 0.9, 2.0),
        "curve": curve,
        "responses": responses,
        "updates": 40,
        "update_tokens": 12345,
        "seconds": 7.4,
    }


def test_tables():
    results = {START: {seed: {"final": final(0.4, 0.6, 1.5)} for seed in (1, 2)}, "TraceRL": {1: run(0.8, 1000), 2: run(0.9, 2000)}}
    assert summary_table(results).splitlines()[2:] == [
        f"| {START} | 0.400 ± 0.000 | 0.600 ± 0.000 | 1.50 ± 0.00 | 1.50 ± 0.00 |  |  |  |  |  |  |",
        "| TraceRL | 0.850 ± 0.071 | 0.900 ± 0.000 | 2.00 ± 0.00 | 2.00 ± 0.00 | 0.100 | 0.200 | 1,500 | 40 | 12,345 | 7 |",
    ]
    assert seed_table(results).splitlines()[3] == "| TraceRL | 0.800 / 0.900 / 2.00 | 0.900 / 0.900 / 2.00 |"
    assert at_share({40: 0.5, 80: 0.6, 320: 0.9}, 0.25) == 0.6


def test_metrics_are_summed_and_picked():
    rows = [
        {"step": 1, "train/num_updates": 2.0},
        {"step": 2},
        {"step": 3, "train/num_updates": 1, "eval/low_confidence_dynamic/accuracy": 0.5},
    ]
    assert total(rows, "train/num_updates") == 3 and curve(rows) == {3: 0.5}


def test_every_method_has_its_file():
    assert all((ROOT / "configs" / f"{entry.config}.yaml").is_file() for entry in METHODS.values())


@pytest.mark.parametrize(
    "so_far, part, expected",
    [
        ("", "01", 10),
        ("", "02", 5),
        ("", "10", 0),
        ("01", "25", 10),
        ("0125", "9", 10),
        ("0125", "99", 5),
        ("01259", "", 10),
        ("0125", "", 0),
    ],
)
def test_the_judge_knows_digit_sorting(so_far, part, expected):
    """`s52910=` -> 01259. What stands behind the answer is wrong; an empty part ended the response: rightly, or too early."""
    assert verdict(GradingPrompt("s52910=", part, "0a1b2c3d4e", so_far).text()) == expected

"""The numbers of an evaluation by hand."""

from __future__ import annotations

import pytest

from common.records import ScoredRollout
from eval import solve_rates


def scored(task_id, correct):
    return ScoredRollout(task_id, 0, [1], [2], [1], [0.0], [0.0], 1, "stop", 1, 0, 4, reward=float(bool(correct)), correct=correct)


def test_accuracy_standard_error_and_pass_at_k():
    rollouts = [scored("a", True), scored("a", False), scored("b", True), scored("b", True), scored("c", False), scored("c", False)]
    rates = solve_rates(rollouts, ["a", "b", "c", "too long"], k=2)
    # Rates 0.5, 1, 0, 0: mean 0.375, variance (0.125^2 + 0.625^2 + 2 * 0.375^2) / 3.
    assert rates["accuracy"] == pytest.approx(0.375)
    assert rates["standard_error"] == pytest.approx((0.6875 / 3 / 4) ** 0.5)
    assert rates["pass_at_k"] == 0.5


def test_a_reward_without_a_verdict_gives_no_accuracy():
    assert solve_rates([scored("a", None)], ["a"], 1) == {"accuracy": None, "standard_error": None, "pass_at_k": None}

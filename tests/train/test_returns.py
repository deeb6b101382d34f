"""Step-wise returns and advantages by hand and by brute force."""

from __future__ import annotations

import numpy as np
import pytest

from train.returns import collapsed_steps, outcome_rewards, step_returns


def test_collapsed_steps_are_named_by_the_largest_of_their_group():
    assert collapsed_steps(np.array([[5, 2, 9, 2], [1, 1, 1, 1]]), 2).tolist() == [[5, 5, 9, 5], [1, 1, 1, 1]]


def test_two_steps_by_hand():
    # Step 1 reveals tokens 0 and 2, step 4 token 1; token 3 is not trained. gam 0.5, lam 0.5.
    times = np.array([1, 4, 1, -1])
    rewards, values = np.array([1.0, 4.0, 3.0, 9.0]), np.array([0.5, 1.0, 1.5, 9.0])
    returns, advantages = step_returns(rewards, values, times, 0.5, 0.5)
    # r* = 2, 4; V* = 1, 1; A*_2 = 4 - 1 = 3
    assert returns == pytest.approx([1 + 0.5 * 4, 4, 3 + 0.5 * 4, 0])
    assert advantages == pytest.approx([0.5 + 0.5 * 1 + 0.25 * 3, 3, 1.5 + 0.5 * 1 + 0.25 * 3, 0])


def test_lambda_one_gives_returns_less_values():
    rng = np.random.default_rng(0)
    times, rewards, values = rng.integers(1, 6, 20), rng.normal(size=20), rng.normal(size=20)
    returns, advantages = step_returns(rewards, values, times, 0.9, 1.0)
    assert advantages == pytest.approx(returns - values)


def test_an_outcome_reward_falls_on_the_last_step():
    assert outcome_rewards(2.0, np.array([3, 1, 3, -1])).tolist() == [2.0, 0.0, 2.0, 0.0]
    assert outcome_rewards(2.0, np.array([-1])).tolist() == [0.0]

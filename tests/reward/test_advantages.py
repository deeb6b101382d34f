import numpy as np
import pytest

from common.errors import UserError
from reward.advantages import ADVANTAGES, drop_reason, filter_groups, group_advantages, is_overlong, mean_only, rloo, zscore


def test_zscore_by_hand():
    # mean 1/4, population std sqrt(3)/4
    np.testing.assert_allclose(zscore(np.array([1.0, 0, 0, 0])), np.array([3, -1, -1, -1]) / np.sqrt(3), rtol=1e-12)


def test_rloo_is_the_mean_of_the_others():
    rewards = np.array([0.3, 1.0, 0.0, 2.5])
    brute = [r - np.delete(rewards, n).mean() for n, r in enumerate(rewards)]
    np.testing.assert_allclose(rloo(rewards), brute, rtol=1e-12)
    np.testing.assert_allclose(mean_only(rewards), rewards - 0.95, rtol=1e-12)


@pytest.mark.parametrize("method", ADVANTAGES.names())
@pytest.mark.parametrize("rewards", [[0.1, 0.1, 0.1], [1.0], [0.0, 0.0]])  # np.std([0.1] * 3) is not 0
def test_equal_rewards_give_exactly_zero(method, rewards):
    assert group_advantages(rewards, ["t"] * len(rewards), method).tolist() == [0.0] * len(rewards)


def test_groups_are_by_task_in_any_order():
    got = group_advantages([1, 5, 3, 5], ["a", "b", "a", "b"], "mean_only")
    assert got.tolist() == [-1, 0, 1, 0]
    with pytest.raises(UserError, match="mean_only"):
        group_advantages([1, 2], ["a", "a"], "mean")


@pytest.mark.parametrize(
    "num_right, size, reason",
    [
        (0, 5, "solve rate below 0.2"),
        (1, 5, None),  # bounds are inclusive
        (4, 5, None),
        (5, 5, "solve rate above 0.8"),
        (7, 8, "solve rate above 0.8"),
        (1, 8, "solve rate below 0.2"),
    ],
)
def test_drop_reason(num_right, size, reason):
    correct = [n < num_right for n in range(size)]
    assert drop_reason([float(c) for c in correct], correct, (0.2, 0.8)) == reason


def test_equal_rewards_are_dropped_whatever_the_bounds():
    assert drop_reason([0.5, 0.5], [True, False], (0.0, 1.0)) == "all rewards equal"
    assert drop_reason([0.5, 0.6], [None, None], (0.2, 0.8)) is None  # unknown correctness filters nothing
    reasons = filter_groups([0, 1, 1, 1], [False, True, True, True], ["a", "a", "b", "b"], (0.0, 1.0))
    assert reasons == [None, None, "all rewards equal", "all rewards equal"]


def test_is_overlong():
    assert [is_overlong(n, 200, 5) for n in (194, 195, 200)] == [False, True, True]
    assert not is_overlong(200, 200, -1) and not is_overlong(200, 200, None)
    assert is_overlong(200, 200, 0) and not is_overlong(199, 200, 0)


def test_a_critic_learns_from_equal_rewards_and_from_single_responses():
    assert drop_reason([1.0, 1.0], [None, None]) == "all rewards equal"
    assert drop_reason([1.0, 1.0], [None, None], has_critic=True) is None
    assert drop_reason([1.0], [True], (0.2, 0.8), has_critic=True) is None
    assert drop_reason([1.0, 1.0], [True, True], (0.2, 0.8), has_critic=True) == "solve rate above 0.8"

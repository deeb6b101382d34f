"""Group-relative advantages and the choice of groups that are trained on: plain numpy, no state.

A group is the k responses to one task; rewards has shape [k].
"""

from __future__ import annotations

from typing import Callable, Sequence

import numpy as np

from common.registry import Registry

SOLVE_RATE_TOLERANCE = 1e-9  # bounds are inclusive: 1/5 counts as 0.2 whatever the last bit says

ADVANTAGES: Registry[Callable[[np.ndarray], np.ndarray]] = Registry("advantage")


def all_equal(rewards: np.ndarray) -> bool:
    """Asked of the values, not of their std: the std of [0.1, 0.1, 0.1] is 1e-17 in floats."""
    return bool(np.all(rewards == rewards[0]))


@ADVANTAGES.register("zscore")
def zscore(rewards: np.ndarray) -> np.ndarray:
    """A_i = (r_i - mean) / std with the population std; 0 where all are equal (GRPO, arXiv 2402.03300, without its epsilon)."""
    if all_equal(rewards):
        return np.zeros(len(rewards))
    return (rewards - rewards.mean()) / rewards.std()


@ADVANTAGES.register("mean_only")
def mean_only(rewards: np.ndarray) -> np.ndarray:
    """A_i = r_i - mean (Dr. GRPO, arXiv 2503.20783)."""
    return np.zeros(len(rewards)) if all_equal(rewards) else rewards - rewards.mean()


@ADVANTAGES.register("rloo")
def rloo(rewards: np.ndarray) -> np.ndarray:
    """A_i = r_i - mean of the other k-1 (arXiv 2402.14740) = (r_i - mean) * k / (k - 1); 0 for a group of one."""
    if all_equal(rewards):
        return np.zeros(len(rewards))
    return mean_only(rewards) * len(rewards) / (len(rewards) - 1)


def is_overlong(num_response: int, max_response: int, margin: int | None) -> bool:
    """Whether a response counts as wrong for its length: num_response >= max_response - margin. None or negative: never."""
    return margin is not None and margin >= 0 and num_response >= max_response - margin


def drop_reason(
    rewards: Sequence[float],
    correct: Sequence[bool | None],
    keep_solve_rate: tuple[float, float] = (0.0, 1.0),
    has_critic: bool = False,
) -> str | None:
    """Why a group is not trained on ("solve rate above 0.8", "all rewards equal"), or None where it is.

    The reasons are few, whatever the rewards: metrics count dropped groups by reason.
    The solve rate counts `correct`; it filters nothing where a response's correctness is unknown (None).
    has_critic: advantages are against a value model, which equal rewards teach as well as others, and a group may be one response.
    """
    low, high = keep_solve_rate
    if all(c is not None for c in correct) and not (has_critic and len(correct) == 1):
        rate = sum(map(bool, correct)) / len(correct)
        if rate > high + SOLVE_RATE_TOLERANCE:
            return f"solve rate above {high:g}"
        if rate < low - SOLVE_RATE_TOLERANCE:
            return f"solve rate below {low:g}"
    if not has_critic and all_equal(np.asarray(rewards, dtype=np.float64)):
        return "all rewards equal"
    return None


def group_indices(task_ids: Sequence[str]) -> dict[str, list[int]]:
    """task id -> where its responses are, in order of first appearance."""
    groups: dict[str, list[int]] = {}
    for n, task_id in enumerate(task_ids):
        groups.setdefault(task_id, []).append(n)
    return groups


def group_advantages(rewards: Sequence[float], task_ids: Sequence[str], method: str = "zscore") -> np.ndarray:
    """Advantage of every response within the group of its task, [N] float64."""
    advantage = ADVANTAGES.get(method, "training.advantage")
    values = np.asarray(rewards, dtype=np.float64)
    result = np.zeros(len(values))
    for members in group_indices(task_ids).values():
        result[members] = advantage(values[members])
    return result


def filter_groups(
    rewards: Sequence[float],
    correct: Sequence[bool | None],
    task_ids: Sequence[str],
    keep_solve_rate: tuple[float, float] = (0.0, 1.0),
    has_critic: bool = False,
) -> list[str | None]:
    """For every response, why its group is dropped, or None: one entry per response."""
    result: list[str | None] = [None] * len(rewards)
    for members in group_indices(task_ids).values():
        reason = drop_reason([rewards[n] for n in members], [correct[n] for n in members], keep_solve_rate, has_critic)
        for n in members:
            result[n] = reason
    return result

"""Step-wise returns and advantages of the diffusion value model (arXiv 2509.06949, proposition 1). Pure; numpy.

Time is the denoising step, not the position: tau(t) are the tokens revealed at collapsed step t of a response. With r_k, V_k the
reward and old value of token k, and means over tau(t) written r*_t, V*_t:

    R*_t = r*_t + gam R*_{t+1}                  return of token k in step t:     r_k + gam R*_{t+1}
    delta_t = r*_t - V*_t + gam V*_{t+1}
    A*_t = delta_t + gam lam A*_{t+1}           its advantage:     (r_k - V_k) + gam V*_{t+1} + gam lam A*_{t+1}

All of them are 0 behind the last step.
"""

from __future__ import annotations

import numpy as np

from train.traces import NEVER, Grid, dense_rank

NOT_TRAINED = -1
"""Time of a token that is not part of the sums."""


def collapsed_steps(steps: np.ndarray, shrink: int) -> np.ndarray:
    """Step ids of blocks [W, B]: the distinct ones of each row, sorted, joined `shrink` at a time, each named by its largest.

    NEVER is sorted behind all others and names nothing: tokens that were never revealed keep a 0.
    """
    group = dense_rank(steps) // shrink
    named = np.zeros_like(steps)
    for g in range(int(group.max()) + 1):
        in_group = (group == g) & (steps != NEVER)
        largest = np.where(in_group, steps, np.iinfo(steps.dtype).min).max(axis=1, keepdims=True)
        named = np.where(in_group, largest, named)
    return named


def response_times(grid: Grid, step_map: np.ndarray, trained: np.ndarray, shrink: int) -> np.ndarray:
    """Collapsed step of every response token [L], NOT_TRAINED where `trained` (bool [L]) is false or it was never revealed.

    Steps are collapsed block by block (full attention: over the response), as the slices are; equal ids in different blocks are one
    step of the response.
    """
    steps = np.where(step_map > 0, step_map, NEVER).astype(np.int64)
    times = np.empty(len(step_map), dtype=np.int64)
    start = 0
    for is_response in grid.is_response:
        count = int(is_response.sum())
        own = slice(start, start + count)
        times[own] = collapsed_steps(steps[None, own], shrink)[0]
        start += count
    return np.where(trained & (step_map > 0), times, NOT_TRAINED)


def outcome_rewards(reward: float, times: np.ndarray) -> np.ndarray:
    """An outcome reward as token rewards [L]: it falls on the tokens of the last step."""
    last = times.max(initial=NOT_TRAINED)
    return np.where((times == last) & (times != NOT_TRAINED), reward, 0.0)


def step_returns(
    rewards: np.ndarray, values: np.ndarray, times: np.ndarray, gam: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns and advantages of every token, each [L], from token rewards, old values and times [L]; 0 where not trained."""
    returns, advantages = np.zeros(len(times)), np.zeros(len(times))
    trained = np.flatnonzero(times != NOT_TRAINED)
    if not len(trained):
        return returns, advantages
    r, v = rewards[trained].astype(np.float64), values[trained].astype(np.float64)
    _, step, counts = np.unique(times[trained], return_inverse=True, return_counts=True)
    mean_r, mean_v = np.bincount(step, r) / counts, np.bincount(step, v) / counts
    num_steps = len(counts)
    # One entry more: everything is 0 behind the last step.
    R, V, A = np.zeros(num_steps + 1), np.append(mean_v, 0.0), np.zeros(num_steps + 1)
    for t in reversed(range(num_steps)):
        R[t] = mean_r[t] + gam * R[t + 1]
        A[t] = mean_r[t] - V[t] + gam * V[t + 1] + gam * lam * A[t + 1]
    returns[trained] = r + gam * R[step + 1]
    advantages[trained] = (r - v) + gam * V[step + 1] + gam * lam * A[step + 1]
    return returns, advantages

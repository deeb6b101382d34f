"""How a canvas is cut into blocks and a block into denoising steps, by the families' fixed schedules: plain numbers, without torch.

A schedule is a function (tokens of a block, its steps) -> how many tokens each forward reveals, none of them zero: a forward that
reveals nothing leaves everything as it was, so it is not run.
"""

from __future__ import annotations

from typing import Callable

LAST_TIME = 1e-3
"""Where Dream's time, which runs from 1 downwards, ends."""


def split(total: int, parts: int) -> list[int]:
    """`total` as a sum of `parts` integers, larger ones first (8 over 3: 3, 3, 2)."""
    share, rest = divmod(total, parts)
    return [share + (part < rest) for part in range(parts)]


def blocks_of(canvas: int, block_size: int) -> list[int]:
    """Tokens of the blocks of a canvas; the last one is shorter where they do not fit."""
    whole, rest = divmod(canvas, block_size)
    return [block_size] * whole + [rest] * (rest > 0)


def steps_of(steps: int, num_blocks: int) -> list[int]:
    """Steps of the blocks: larger shares first, and at least one each."""
    return [max(1, share) for share in split(steps, num_blocks)]


def even(size: int, steps: int) -> list[int]:
    """Equal shares, larger ones first (LLaDA)."""
    return split(size, min(steps, size))


def dream(size: int, steps: int) -> list[int]:
    """One token first. Then, with times t_j = 1 - j (1 - 0.001) / steps, step i reveals the share 1 - t_{i+1}/t_i, rounded down, of
    what is still masked, and the last one the rest (Dream; arXiv 2508.15487)."""
    time = [1 - j * (1 - LAST_TIME) / steps for j in range(steps + 1)]
    counts, masked, step = [1], size - 1, 1
    while masked > 0:
        count = int(masked * (1 - time[step + 1] / time[step])) if step < steps - 1 else masked
        counts.append(count)
        masked -= count
        step += 1
    return [count for count in counts if count > 0]


SCHEDULES: dict[str, Callable[[int, int], list[int]]] = {"even": even, "dream": dream}
"""By `Family.canvas_schedule`."""


def counts_of(schedule: str, canvas: int, block_size: int, steps: int) -> list[list[int]]:
    """By block and forward: how many tokens the schedule reveals of a response of `canvas` tokens in `steps` forwards."""
    blocks = blocks_of(canvas, block_size)
    return [SCHEDULES[schedule](size, share) for size, share in zip(blocks, steps_of(steps, len(blocks)), strict=True)]


def count_at(counts: list[int], step: int) -> int:
    """What forward `step` of a block reveals by its counts; a strategy that takes more forwards goes on as in the last."""
    return counts[min(step, len(counts) - 1)]

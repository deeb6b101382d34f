"""How large the next forward of the paged engine is: places for items, for commit items and for head rows.

A CUDA graph has fixed sizes, so sizes are few and always rounded up. What the next step will need is not known when it is
launched (the host is a step late), and need not be: an item that finds no place waits for the next step. So the capacities
follow the averages of recent steps, and a step that happens to need more spreads its load over the next ones. Sequences that
start together come apart in this way, until every step commits about as many blocks as the next. `Waits` sees to it that it is not
always the same who wait.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

ALL_FIT = 128
"""Rows of a forward up to which its time is that of reading the weights: there is place for every commit and every masked row."""
HEAD_ROWS, HEAD_SIZES = 64, 16
"""Head rows are rounded up to a multiple of HEAD_ROWS: to one that leaves not many more than HEAD_SIZES sizes up to all rows of the
items. Else the average, which is never at rest, would ask for another graph at every step of large blocks."""
MEMORY = 1 / 16
"""Weight of the newest step in the averages."""
ROWS_OF_WEIGHTS, ROWS_OF_ATTENTION = 256, 2
"""Rows of a forward that take the time of reading the weights, and of an item's attention: roughly those of 4B and 8B models, with
contexts of 1,000, on an H200."""
HEAD_MARGIN = 1.05
"""Head rows cost little: a step has so many times the average."""
WAITS_MEMORY, OFTEN, MORE_THAN_OTHERS = 1 / 32, 1 / 8, 1.25
"""Weight of the newest step in the share of steps that a sequence waited; from which share on it may come first; if that is so many
times what all waited."""


def item_bucket(num_items: int) -> int:
    """1, 2, 4, 8, 16, 32, then multiples of 32 up to 128 and of 64 beyond."""
    if num_items <= 32:
        return 1 << (num_items - 1).bit_length()
    step = 32 if num_items <= 128 else 64
    return -(-num_items // step) * step


def whole_rows(num_rows: int) -> int:
    """What a forward's rows are rounded up to: as many take hardly longer, on one H200 at the shapes of 4B and 8B models. (Some
    even take less: the products of the 4B model 4.7 ms for 320 rows and 4.3 for 384; those of the 8B model 6.5 and 7.6.)"""
    step = 32 if num_rows <= 256 else 64 if num_rows <= 384 else 128
    return -(-num_rows // step) * step


def commit_capacity(num_items: int, block_size: int, needed: float) -> int:
    """Places for commit items beside n denoising ones, where `needed` are needed on average.

    As many as go into the next whole number of rows; or, where most of these would only pad, into the one below: with c places
    min(1, c / needed) of the work gets done, in a time that goes with the rows, (n + c) * B, and the attention of n items. One
    where none go into either (large blocks, few items): somebody has to commit, so the rows are then what they are.
    """

    def rate(commits: int) -> float:
        time = max(ROWS_OF_WEIGHTS, (num_items + commits) * block_size) + ROWS_OF_ATTENTION * num_items
        return min(1.0, commits / needed) / time

    places = lambda rows: min(num_items, rows // block_size - num_items)  # noqa: E731
    enough = whole_rows(math.ceil((num_items + min(needed, num_items)) * block_size))
    fewer = max(rows for rows in (0, *(enough - step for step in (32, 64, 128))) if whole_rows(rows) == rows)
    candidates = [places(rows) for rows in (enough, fewer) if places(rows) >= 1]
    return max(candidates, key=rate, default=1)


@dataclass
class Capacity:
    """Of one forward."""

    items: int
    commits: int
    head_rows: int


class Demand:
    """What recent steps needed, per item that ran."""

    def __init__(self, block_size: int, num_steps: int) -> None:
        self.block_size = block_size
        # Until something is known: a block takes its scheduled steps, and half of it is masked on average.
        self.commits = 1 / min(num_steps, block_size)
        self.masked = (block_size + 1) / 2
        self.num_steps_seen = 0

    def observe(self, num_ran: int, num_commits: int, num_masked: int) -> None:
        """One step: items that took part, commit items among them, and the positions that they have masked behind it: what the next
        step needs head rows for. A sequence that is done has none."""
        if not num_ran:
            return
        self.num_steps_seen += 1
        weight = max(MEMORY, 1 / (self.num_steps_seen + 4))
        self.commits += weight * (num_commits / num_ran - self.commits)
        self.masked += weight * (num_masked / num_ran - self.masked)

    def capacity(self, num_active: int) -> Capacity:
        """For a forward of `num_active` >= 1 sequences."""
        size, n = self.block_size, item_bucket(num_active)
        if 2 * n * size <= ALL_FIT:
            return Capacity(n, n, n * size)
        multiple = HEAD_ROWS * max(1, n * size // (HEAD_SIZES * HEAD_ROWS))
        head = -(-int(HEAD_MARGIN * self.masked * num_active + 1) // multiple) * multiple
        return Capacity(n, commit_capacity(n, size, self.commits * num_active), max(size, min(head, n * size)))


class Waits:
    """In which share of recent steps a sequence waited, by slot.

    Places are given away in the order of the items, the longest first, so without this it would be the shortest that wait. Who
    waited much more often than others comes before them; no more than these, for long items that start late make a step longer.
    What counts is a share and not the newest step: that is known when the next one has been launched, in the order that it had.
    """

    def __init__(self, num_slots: int) -> None:
        self.share = np.zeros(num_slots)

    def begin(self, slots: list[int]) -> None:
        """Somebody new is in these slots."""
        self.share[slots] = 0.0

    def observe(self, order: np.ndarray, stalled: np.ndarray) -> None:
        """One step: the slots of its items, and which of these waited (bool)."""
        self.share[order] += WAITS_MEMORY * (stalled - self.share[order])

    def come_first(self, slots: np.ndarray) -> np.ndarray:
        """bool, of the slots in flight: before all others."""
        shares = self.share[slots]
        return shares > max(OFTEN, MORE_THAN_OTHERS * shares.mean())

"""How large the next forward of the paged engine is: places for items, for commit items and for head rows.

A CUDA graph has fixed sizes, so sizes are few and always rounded up. What the next step will need is not known when it is
launched (the host is a step late), and need not be: an item that finds no place waits for the next step. So the capacities
follow the averages of recent steps, and a step that happens to need more spreads its load over the next ones. Sequences that
start together come apart in this way, until every step commits about as many blocks as the next.
"""

from __future__ import annotations

from dataclasses import dataclass

ALL_FIT = 128
"""Rows of a forward up to which its time is that of reading the weights: there is place for every commit and every masked row."""
HEAD_ROWS = 64
"""Head rows are rounded up to a multiple of it."""
LOGITS = 2**29
"""Entries of the largest [head rows, vocabulary] tensor: 2 GiB."""
MEMORY = 1 / 16
"""Weight of the newest step in the averages."""
SLACK = 0.03
"""Share of the average number of commits that may be missing: waiting costs less than another tile of rows."""
HEAD_MARGIN = 1.05
"""Head rows cost little: a step has so many times the average."""


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


def most_head_rows(num_items: int, block_size: int, vocab_size: int) -> int:
    """Of a forward of so many items: all their rows, or what the logits may have."""
    return min(num_items * block_size, max(block_size, LOGITS // vocab_size))


@dataclass
class Capacity:
    """Of one forward."""

    items: int
    commits: int
    head_rows: int


class Demand:
    """What recent steps needed, per item that ran."""

    def __init__(self, block_size: int, num_steps: int, vocab_size: int) -> None:
        self.block_size, self.vocab_size = block_size, vocab_size
        # Until something is known: a block takes its scheduled steps, and half of it is masked on average.
        self.commits = 1 / min(num_steps, block_size)
        self.masked = (block_size + 1) / 2
        self.num_steps_seen = 0

    def observe(self, num_ran: int, num_commits: int, num_masked: int) -> None:
        """One step: items that took part, commit items and masked rows among them."""
        if not num_ran:
            return
        self.num_steps_seen += 1
        weight = max(MEMORY, 1 / (self.num_steps_seen + 4))
        self.commits += weight * (num_commits / num_ran - self.commits)
        self.masked += weight * (num_masked / num_ran - self.masked)

    def capacity(self, num_active: int) -> Capacity:
        """For a forward of `num_active` >= 1 sequences."""
        size, n = self.block_size, item_bucket(num_active)
        most_head = most_head_rows(n, size, self.vocab_size)
        if 2 * n * size <= ALL_FIT:
            return Capacity(n, n, most_head)
        # Eighths of the places, then whatever else there is place for in rows that cost nothing.
        eighth = -(-n // 8)
        wanted = -(-max(1, round((1 - SLACK) * self.commits * num_active)) // eighth) * eighth
        commits = max(1, min(n, whole_rows((n + wanted) * size) // size - n))
        head = -(-int(HEAD_MARGIN * self.masked * num_active + 1) // HEAD_ROWS) * HEAD_ROWS
        return Capacity(n, commits, max(size, min(head, most_head)))

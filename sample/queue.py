"""Where an engine takes its work from: all of a list, in its order, or what the other ranks have left of it.

    queue = ListQueue(requests)                          # one process, or a list of this rank's own
    queue = SharedQueue(requests, num_ranks, next_unit)  # all ranks hold the same list
    while (unit := queue.take(free_slots)) is not None: ...

Where the ranks share a queue, who samples what is decided as they go: a rank whose answers are short takes more of them, and
none idles behind a long tail.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable, Protocol

if TYPE_CHECKING:
    from sample.engine import Request


@dataclass(frozen=True)
class Unit:
    """Some samples of one request: who samples them prefills its prompt once. A queue hands out one at least; what an engine has
    left of a unit may be none."""

    request: int
    """Index into the list of requests."""
    samples: range


class WorkQueue(Protocol):
    """What an engine is given. It asks whenever it has room, and samples all that it was handed."""

    share: int
    """Sequences that would be this engine's if all ranks were alike. It has no more of them in flight, so that the first rank
    that comes does not take everything: an engine uses min(max_active, share) slots."""

    def take(self, most: int) -> Unit | None:
        """The next samples of one request, `most` (>= 1) of them at most. None: nothing is left, now and later."""


class ListQueue:
    """All samples of all requests, in their order."""

    def __init__(self, requests: list[Request]) -> None:
        units = (Unit(index, range(request.num_samples)) for index, request in enumerate(requests))
        self._left = deque(unit for unit in units if unit.samples)
        self.share = sum(request.num_samples for request in requests)

    def take(self, most: int) -> Unit | None:
        return _take(self._left, most)


class SharedQueue:
    """All samples of all requests, over all ranks: every one goes to exactly one rank, in the order of the list.

    Every rank cuts the list into the same units; `next_unit` says which to take: 0, 1, 2, ..., each on one rank only
    (`common.dist.SharedCounter`). A unit is a whole request, until what is left makes less than two of them for every rank: from
    there on they get smaller, down to single samples, so that the ranks run out of work together.

    Taking never waits for another rank, so a dead one makes nobody hang here: what it had taken is missing when the results are
    gathered, which ends with the process group's timeout at the latest.
    """

    def __init__(self, requests: list[Request], num_ranks: int, next_unit: Callable[[], int]) -> None:
        """`requests` and `num_ranks` equal on all ranks."""
        self._units = cut_into_units([request.num_samples for request in requests], num_ranks)
        self._next_unit = next_unit
        self._left: deque[Unit] = deque()  # of the unit that was taken last
        self.share = -(-sum(request.num_samples for request in requests) // num_ranks)

    def take(self, most: int) -> Unit | None:
        if not self._left and self._units:
            index = self._next_unit()
            if index < len(self._units):
                self._left.append(self._units[index])
            else:
                self._units = []  # nothing is left: ask no more
        return _take(self._left, most)


def cut_into_units(num_samples: list[int], num_ranks: int) -> list[Unit]:
    """The units of a list of requests with so many samples each: of one request at most, and of no more than half of what is then
    left for one rank, rounded up (guided self-scheduling, Polychronopoulos and Kuck 1987)."""
    units, left = [], sum(num_samples)
    for request, count in enumerate(num_samples):
        first = 0
        while first < count:
            size = min(count - first, -(-left // (2 * num_ranks)))
            units.append(Unit(request, range(first, first + size)))
            first, left = first + size, left - size
    return units


def _take(left: deque[Unit], most: int) -> Unit | None:
    """The first `most` samples of the first unit, which go."""
    assert most >= 1
    if not left:
        return None
    unit = left.popleft()
    if len(unit.samples) > most:
        left.appendleft(Unit(unit.request, unit.samples[most:]))
    return Unit(unit.request, unit.samples[:most])

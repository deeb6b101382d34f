"""Who owns which page of the cache: worst-case admission, prompts shared by their samples, nothing lost.

A page holds the keys and values of PAGE consecutive positions of one sequence, in every layer. A sequence is admitted only when
pages for its longest possible response are free, so none is ever preempted and none waits for another to give something up.

The samples of a request share the pages that its prompt fills. The prompt's last, partly filled page is written by the samples,
each behind the prompt, so every sample in flight needs its own; since nobody writes in front of the prompt's end, a page that a
finished sample leaves still holds the prompt. It is kept until all samples have been admitted, and the next one takes it over
if it is free, or a copy if it is not. A request therefore never holds more than the pages of its samples in flight, or those of
one sample where none is: a cache that holds the longest sequence serves every request.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PAGE = 64
"""Positions of a page."""


def pages_of(num_positions: int) -> int:
    """Pages that hold so many positions."""
    return -(-num_positions // PAGE)


class Pages:
    """Pages 1 .. num_pages - 1 with a count of owners each. Page 0 is never given out: what goes nowhere may be written there."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, 0, -1))
        self._owners = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_usable(self) -> int:
        return self.num_pages - 1

    def owners(self, page: int) -> int:
        return self._owners[page]

    def take(self, count: int) -> list[int]:
        """So many free pages, with one owner each."""
        assert 0 <= count <= len(self._free), f"{count} pages wanted, {len(self._free)} free"
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._owners[page] = 1
        return taken

    def share(self, pages: list[int]) -> None:
        """One more owner for each."""
        for page in pages:
            assert self._owners[page] > 0, f"page {page} is free"
            self._owners[page] += 1

    def give_back(self, pages: list[int]) -> None:
        """One owner less for each; a page without any is free."""
        for page in pages:
            assert self._owners[page] > 0, f"page {page} is free already"
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)


@dataclass
class PromptPages:
    """The prompt of one request, from its first sample's admission until its last one's."""

    num_positions: int
    """Of the prompt's whole blocks: what is prefilled."""
    shared: list[int] = field(default_factory=list)
    """Pages that these positions fill."""
    tail: int | None = None
    """The page that they fill partly."""
    filled: bool = False
    """Whether a sample has been admitted, whose forward writes the prompt."""


@dataclass
class Grant:
    """The pages of one sequence."""

    pages: list[int]
    """In the order of positions: a row of the block table."""
    prefill: bool
    """Whether the prompt has to be computed: for the first sample of a request that has whole blocks."""
    copy: tuple[int, int] | None = None
    """(source, target): the page to copy before the sequence starts, the prompt being there."""


def admit(pages: Pages, prompt: PromptPages, num_positions: int) -> Grant | None:
    """Pages for one sample of `num_positions` positions in all, prompt included; None where too few are free.

    The caller retires the sample with `pages.give_back(grant.pages)`, and calls `close` once all samples have been admitted.
    """
    count = pages_of(num_positions)
    num_shared = prompt.num_positions // PAGE
    if not prompt.filled:
        if pages.num_free < count:
            return None
        taken = pages.take(count)
        prompt.shared = taken[:num_shared]
        prompt.tail = taken[num_shared] if prompt.num_positions % PAGE else None
        prompt.filled = True
        pages.share(prompt.shared + ([] if prompt.tail is None else [prompt.tail]))
        return Grant(taken, prefill=prompt.num_positions > 0)
    own = count - num_shared
    take_over = prompt.tail is not None and pages.owners(prompt.tail) == 1
    if pages.num_free < own - take_over:
        return None
    pages.share(prompt.shared)
    if take_over:
        pages.share([prompt.tail])
        return Grant([*prompt.shared, prompt.tail, *pages.take(own - 1)], prefill=False)
    taken = pages.take(own)
    return Grant([*prompt.shared, *taken], prefill=False, copy=None if prompt.tail is None else (prompt.tail, taken[0]))


def close(pages: Pages, prompt: PromptPages) -> None:
    """All samples have been admitted: the prompt's pages live as long as those that use them."""
    pages.give_back(prompt.shared + ([] if prompt.tail is None else [prompt.tail]))
    prompt.shared, prompt.tail, prompt.filled = [], None, False

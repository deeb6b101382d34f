"""The page allocator under random traffic, against sets kept by hand."""

from __future__ import annotations

import random

import pytest

from sample.pages import PAGE, Pages, PromptPages, admit, close, pages_of


def test_pages_of_and_page_zero() -> None:
    assert [pages_of(n) for n in [0, 1, PAGE, PAGE + 1, 3 * PAGE]] == [0, 1, 1, 2, 3]
    pages = Pages(4)
    assert sorted(pages.take(3)) == [1, 2, 3] and pages.num_free == 0


def test_misuse_is_noticed() -> None:
    pages = Pages(4)
    taken = pages.take(2)
    with pytest.raises(AssertionError):
        pages.take(2)
    pages.share(taken[:1])
    pages.give_back(taken)
    pages.give_back(taken[:1])
    for misuse in [pages.give_back, pages.share]:
        with pytest.raises(AssertionError):
            misuse(taken[:1])


def test_samples_share_whole_pages_and_have_their_own_tail() -> None:
    pages, prompt = Pages(100), PromptPages(2 * PAGE + 12)
    first, second, third = (admit(pages, prompt, 5 * PAGE) for _ in range(3))
    assert (first.prefill, second.prefill) == (True, False)
    assert first.pages[:2] == second.pages[:2] == third.pages[:2]
    tail = first.pages[2]
    assert (first.copy, second.copy, third.copy) == (None, (tail, second.pages[2]), (tail, third.pages[2]))
    assert len({*first.pages, *second.pages, *third.pages}) == 2 + 3 * 3
    pages.give_back(first.pages)  # its tail still holds the prompt: the next sample takes it over
    fourth = admit(pages, prompt, 5 * PAGE)
    assert fourth.copy is None and fourth.pages[2] == first.pages[2]
    fifth = admit(pages, prompt, 5 * PAGE)
    assert fifth.copy == (first.pages[2], fifth.pages[2])
    close(pages, prompt)
    assert pages.num_free == 99 - 2 - 4 * 3
    for grant in [second, third, fourth, fifth]:
        pages.give_back(grant.pages)
    assert pages.num_free == 99


@pytest.mark.parametrize("prompt_positions", [0, 12, PAGE, PAGE + 4])
def test_the_smallest_cache_serves_every_sample_one_after_the_other(prompt_positions: int) -> None:
    length = prompt_positions + 70
    pages, prompt = Pages(1 + pages_of(length)), PromptPages(prompt_positions)
    for sample in range(5):
        grant = admit(pages, prompt, length)
        assert grant is not None and grant.copy is None and grant.prefill == (sample == 0 and prompt_positions > 0)
        assert admit(pages, prompt, length) is None
        pages.give_back(grant.pages)
    close(pages, prompt)
    assert pages.num_free == pages.num_usable


@pytest.mark.parametrize("seed", range(20))
def test_random_traffic(seed: int) -> None:
    """No page has two writers, prompts stay whole, counts are those of sets kept by hand, all comes back, nothing waits forever."""
    rng = random.Random(seed)
    lengths = [(rng.randrange(0, 5 * PAGE), rng.randrange(1, 4 * PAGE)) for _ in range(60)]
    longest = max(pages_of(prompt + response) for prompt, response in lengths)
    pages = Pages(1 + longest + rng.choice([0, 0, 1, 5, 40]))
    waiting = [(start, start + response, rng.randrange(1, 6)) for start, response in lengths]
    holds: dict[int, list[int]] = {}  # who -> pages; a request's own hold under a negative number
    content: dict[int, int] = {}  # page -> the request whose prompt is in it
    running: dict[int, tuple[int, list[int]]] = {}
    number, prompt, admitted = 0, None, 0
    most = 0
    for request, (start, length, samples) in enumerate(waiting):
        prompt, left = PromptPages(start), samples
        while left:
            grant = admit(pages, prompt, length)
            if grant is None:
                assert running, "nothing in flight and yet no room"
                who = rng.choice(sorted(running))
                pages.give_back(running.pop(who)[1])
                del holds[who]
                continue
            number += 1
            left -= 1
            admitted += 1
            assert len(grant.pages) == pages_of(length) == len(set(grant.pages)) and 0 not in grant.pages
            num_shared, partly = start // PAGE, start % PAGE > 0
            own = grant.pages[num_shared:]
            written = {page for who, (other, taken) in running.items() for page in taken[waiting[other][0] // PAGE :]}
            assert not written & set(own), "a page with two writers"
            assert not set(grant.pages[:num_shared]) & written, "a shared page that somebody writes"
            if grant.prefill:
                content = {page: owner for page, owner in content.items() if page not in grant.pages}
                content |= dict.fromkeys(grant.pages[: num_shared + partly], request)
            elif start:
                if grant.copy is not None:
                    source, target = grant.copy
                    assert content[source] == request and target == own[0]
                    content[target] = request
                assert all(content.get(page) == request for page in grant.pages[: num_shared + partly])
            for page in own[int(partly and not grant.prefill) :]:
                if not (grant.prefill and partly and page == own[0]):
                    content.pop(page, None)  # overwritten
            running[number] = request, grant.pages
            holds[number] = grant.pages
            holds[-1] = grant.pages[:num_shared] + ([prompt.tail] if prompt.tail is not None else [])
            counts = {page: sum(page in held for held in holds.values()) for page in range(1, pages.num_pages)}
            assert counts == {page: pages.owners(page) for page in counts}
            assert pages.num_free == sum(count == 0 for count in counts.values())
            most = max(most, len(running))
            if rng.random() < 0.2:
                who = rng.choice(sorted(running))
                pages.give_back(running.pop(who)[1])
                del holds[who]
        close(pages, prompt)
        del holds[-1]
    for _, taken in running.values():
        pages.give_back(taken)
    assert pages.num_free == pages.num_usable and admitted == sum(samples for *_, samples in waiting)
    assert most > 1 or pages.num_pages - 1 == longest

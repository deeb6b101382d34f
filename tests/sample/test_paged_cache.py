"""How many pages the cache has, with a driver that only keeps books (conftest.py); the rest of it: test_paged_block.py."""

from __future__ import annotations

from typing import Iterator

import pytest
import torch

from common.errors import UserError
from models.family import DecoderConfig
from sample.paged_cache import PagedCache
from sample.pages import PAGE
from tests.sample.conftest import GRANULE, Books

# A page of a region is half a granule: 64 positions x 1 head x 8 numbers of 4 bytes. Two layers: four regions.
CONFIG = DecoderConfig(vocab_size=24, hidden_size=8, num_layers=2, num_heads=1, num_kv_heads=1, head_dim=8, intermediate_size=8)
PAGE_BYTES = GRANULE // 2


@pytest.fixture
def cache(books: Books) -> Iterator[PagedCache]:
    cache = PagedCache(CONFIG, torch.float32, torch.device("cuda", 0))
    assert cache.page_bytes == PAGE_BYTES == PAGE * 8 * 4
    books.calls.clear()
    yield cache
    cache.close()
    assert books.room == books.size and not books.reserved


def test_as_many_pages_as_are_wanted_or_fit(books: Books, cache: PagedCache) -> None:
    """Of 64 granules 0.9, 57.6, are 28.8 pages in four regions; less two, for regions are whole granules."""
    cache.take(10, 3, 0)
    assert cache.num_pages == 10 and cache.regions.shape == (4, 10, PAGE, 1, 8) and not cache.regions.any()
    cache.release()
    assert books.room == books.size
    cache.take(100, 3, 0)
    assert cache.num_pages == 26
    cache.release()
    cache.take(100, 3, 20 * GRANULE)  # 44 granules are 22 pages
    assert cache.num_pages == 20
    cache.release()
    cache.take(100, 3, 20 * GRANULE, 2 * GRANULE)  # two granules a page, and as much for its sequence's rows: 11 less two
    assert cache.num_pages == 10  # whole granules


def test_too_little_memory_is_refused_with_the_numbers(books: Books, cache: PagedCache) -> None:
    """Beside 52 granules for forwards there are 12: 6 pages, less two."""
    with pytest.raises(UserError) as refused:
        cache.take(100, 5, 52 * GRANULE)
    line = str(refused.value)
    assert line.startswith("rollout.max_token: ") and "(5 pages of 64 positions)" in line and "\n" not in line
    assert books.calls == [] and cache.num_pages == 0
    cache.take(100, 4, 52 * GRANULE)
    assert cache.num_pages == 4
    with pytest.raises(UserError, match=r"\(5 pages of"):  # of what the cache has already as well
        cache.take(100, 5, 52 * GRANULE)


def test_the_refusal_counts_in_gibibytes(books: Books, cache: PagedCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 GiB free, 30 of them for forwards: 10 GiB of pages of 8 KiB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 * 2**30, 80 * 2**30))
    least = 12 * 2**30 // (4 * PAGE_BYTES)
    words = rf"take 12.0 GiB \({least} pages of 64 positions\), and of 40.0 GiB free GPU memory the cache can have 10.0: lower"
    with pytest.raises(UserError, match=words):
        cache.take(2 * least, least, 30 * 2**30)


def test_what_is_there_stays_where_no_more_would_fit(books: Books, cache: PagedCache) -> None:
    mapped = lambda: books.calls.count("cuMemMap")  # noqa: E731
    cache.take(100, 3, 0)
    assert (cache.num_pages, mapped()) == (26, 4)
    cache.regions.fill_(7)
    cache.take(100, 3, 0)
    cache.take(200, 26, 4 * GRANULE)
    cache.take(26, 3, 12 * GRANULE)  # all that is wanted
    assert (cache.num_pages, mapped()) == (26, 4) and (cache.regions == 7).all() and "cuMemUnmap" not in books.calls

    books.size += GRANULE // 4  # 57.8 granules, still 28 pages less two
    cache.take(100, 3, 0)
    assert (cache.num_pages, mapped()) == (26, 4)
    books.size += 8 * GRANULE  # 65.0 granules, 32 pages less two
    cache.take(100, 3, 0)
    assert (cache.num_pages, mapped()) == (30, 8) and not cache.regions.any()
    books.size -= 8 * GRANULE  # 4.25 granules beside the cache's 60: enough for forwards, and then not
    cache.take(100, 3, 4 * GRANULE)
    assert (cache.num_pages, mapped()) == (30, 8)
    cache.take(100, 3, 8 * GRANULE)  # 56.25 granules, 28 pages less two
    assert (cache.num_pages, mapped()) == (26, 12) and books.room >= 8 * GRANULE
    cache.take(100, 3, 8 * GRANULE)
    assert (cache.num_pages, mapped()) == (26, 12)
    cache.take(28, 3, 0)  # more is wanted, and fits
    assert (cache.num_pages, mapped()) == (28, 16)
    cache.release()
    assert books.room == books.size and cache.num_pages == 0


def test_what_is_there_makes_room_for_what_forwards_need(books: Books, cache: PagedCache) -> None:
    """Also where it is all that is wanted: many sequences, then one that is longer to compute."""
    cache.take(26, 3, 0)
    assert cache.num_pages == 26 and books.room == 12 * GRANULE
    with pytest.raises(UserError, match=r"\(3 pages of"):
        cache.take(26, 3, 60 * GRANULE)
    cache.take(26, 3, 40 * GRANULE)  # 24 granules, 12 pages less two
    assert cache.num_pages == 10 and books.room >= 40 * GRANULE
    mapped = books.calls.count("cuMemMap")
    cache.take(5, 3, 44 * GRANULE)  # as much as is free: nothing changes
    assert cache.num_pages == 10 and books.calls.count("cuMemMap") == mapped


def test_an_interrupt_behind_the_driver_is_no_loss(books: Books, cache: PagedCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(regions: torch.Tensor) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(cache, "_use", interrupt)
        cache.take(100, 3, 0)
    assert cache.num_pages == 0 and books.room == 12 * GRANULE
    cache.take(100, 3, 0)
    assert cache.num_pages == 26 and books.room == 12 * GRANULE

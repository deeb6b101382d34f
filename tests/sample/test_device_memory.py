"""What DeviceMemory asks of the driver, with a driver that only keeps books; the real one: test_paged_block_gpu.py."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
from types import CodeType, FrameType
from typing import Any, Iterator

import pytest
import torch

from sample import device_memory
from sample.device_memory import AllocationProperties, DeviceMemory, interrupts_held_back
from tests.sample.conftest import GRANULE, Books


def test_regions_keep_their_addresses(books: Books) -> None:
    memory = DeviceMemory(torch.device("cuda", 0), num_regions=6)
    addresses = []
    for size in [5 * GRANULE, 1, 10 * GRANULE]:
        regions = memory.take(size)
        assert regions.shape == (6, max(size, GRANULE)) and not regions.any()
        addresses.append(sorted(books.mapped))
        assert all(usable for _, usable in books.mapped.values()) and books.room == (64 - 6 * max(1, size // GRANULE)) * GRANULE
    assert addresses[0] == addresses[1] == addresses[2]
    memory.give_back()
    memory.give_back()
    assert not books.mapped and books.room == 64 * GRANULE
    memory.close()
    assert not books.reserved


def test_what_does_not_fit_leaves_nothing_behind(books: Books) -> None:
    memory = DeviceMemory(torch.device("cuda", 0), num_regions=6)
    memory.take(GRANULE)
    with pytest.raises(torch.OutOfMemoryError):
        memory.take(11 * GRANULE)
    assert not books.mapped and books.room == 64 * GRANULE
    assert memory.take(10 * GRANULE).shape == (6, 10 * GRANULE)


def test_who_lets_go_of_it_gives_it_back(books: Books) -> None:
    memory = DeviceMemory(torch.device("cuda", 0), num_regions=2)
    memory.take(GRANULE)
    del memory
    assert not books.mapped and not books.reserved


# ------------------------------------------------------------------------------------------------ calls that break off


REGIONS = 3
CALLS = REGIONS * ["cuMemUnmap"] + REGIONS * ["cuMemCreate", "cuMemMap", "cuMemRelease", "cuMemSetAccess"]
"""Of a `take` that finds memory mapped."""


def taken(books: Books) -> DeviceMemory:
    """Two granules of every region; `books.calls` counts from here."""
    memory = DeviceMemory(torch.device("cuda", 0), REGIONS)
    memory.take(2 * GRANULE)
    books.calls.clear()
    return memory


def assert_works(memory: DeviceMemory, books: Books) -> None:
    """Nobody holds what is not noted, and the memory can be taken, given back and let go of."""
    books.fault = lambda: None
    assert sorted(books.mapped) == sorted(memory.mapped) and books.handles == {handle.value for handle in memory.handles}
    regions = memory.take(20 * GRANULE)
    assert regions.shape == (REGIONS, 20 * GRANULE) and not regions.any()
    assert len(books.mapped) == REGIONS and all(usable for _, usable in books.mapped.values()) and not books.handles
    memory.give_back()
    assert books.room == 64 * GRANULE and not books.mapped
    memory.close()
    assert not books.reserved


@pytest.mark.parametrize("in_a_row", [1, 2, 3])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_any_call_may_fail(books: Books, error: type[Exception], in_a_row: int) -> None:
    """in_a_row: also the calls behind it fail, with which it is undone."""
    memory = taken(books)
    memory.take(4 * GRANULE)
    assert books.calls == CALLS
    memory.close()
    for n in range(len(CALLS)):
        memory = taken(books)

        def fault(first: int = n) -> None:
            if first < len(books.calls) <= first + in_a_row:
                raise error

        books.fault = fault
        with pytest.raises(error):
            memory.take(4 * GRANULE)
        if in_a_row == 1 and n >= REGIONS:
            assert books.room == 64 * GRANULE and not books.mapped, "it was undone at once"
        assert_works(memory, books)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt: not so where a shell has started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("when", ["in front", "behind"])
def test_an_interrupt_of_any_call(books: Books, ctrl_c: None, when: str) -> None:
    for n in range(len(CALLS)):
        memory, name = taken(books), CALLS[n]
        act = getattr(books, name)

        def interrupted(*arguments: Any, number: int = n + 1, act: Any = act) -> None:
            for at in ["in front", "behind"]:
                if at == when and len(books.calls) == number:
                    signal.raise_signal(signal.SIGINT)
                if at == "in front":
                    act(*arguments)

        setattr(books, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            memory.take(4 * GRANULE)
        delattr(books, name)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert_works(memory, books)


def test_an_interrupt_on_any_line(books: Books, ctrl_c: None) -> None:
    """Of what runs from the first `take` to the last `close`, but for what a destructor does: Python swallows that."""
    files, count, number = {device_memory.__file__, contextlib.__file__}, 0, 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        code: CodeType = frame.f_code
        if code.co_filename not in files or code.co_name == "__del__":
            return None
        if event == "line":
            count += 1
            if count == number:
                signal.raise_signal(signal.SIGINT)
        return trace

    interrupts = 0
    while count >= number:
        number, count = number + 1, 0
        memory = DeviceMemory(torch.device("cuda", 0), REGIONS)
        before = sys.gettrace()
        try:
            sys.settrace(trace)
            memory.take(2 * GRANULE)
            memory.take(4 * GRANULE)
            memory.close()
        except KeyboardInterrupt:
            interrupts += 1
        finally:
            sys.settrace(before)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if memory.base:
            assert_works(memory, books)
        else:
            assert not books.reserved and not books.mapped and books.room == 64 * GRANULE
    assert interrupts == number - 1 > 100


def test_interrupts_wait_for_what_is_inside(ctrl_c: None) -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):
        with interrupts_held_back():
            signal.raise_signal(signal.SIGINT)
            done.append("inside")
    with pytest.raises(KeyboardInterrupt) as caught:
        with interrupts_held_back():
            signal.raise_signal(signal.SIGINT)
            raise RuntimeError("inside")
    assert done == ["inside"] and str(caught.value.__context__) == "inside"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts_held_back():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_the_structures_are_the_drivers() -> None:
    """Sizes and offsets of cuda.h on a 64-bit machine."""
    assert ctypes.sizeof(AllocationProperties) == 32 and ctypes.sizeof(device_memory.Access) == 12
    offsets = {name: getattr(AllocationProperties, name).offset for name, _ in AllocationProperties._fields_}
    assert offsets == {"type": 0, "handle_types": 4, "location": 8, "win32_metadata": 16, "flags": 24}

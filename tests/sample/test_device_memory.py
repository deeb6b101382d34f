"""What DeviceMemory asks of the driver, with a driver that only keeps books; the real one: test_paged_block_gpu.py."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

from sample import device_memory
from sample.device_memory import AllocationProperties, DeviceMemory

GRANULE, TOTAL, BASE = 2**21, 2**30, 2**40


class Books:
    """Reserved, created and mapped memory; it runs out behind `room` bytes."""

    def __init__(self, room: int) -> None:
        self.room, self.reserved, self.handles, self.mapped = room, {}, {}, {}

    def __call__(self, name: str, *arguments) -> None:
        getattr(self, name)(*arguments)

    def cuMemGetAllocationGranularity(self, out, properties, option) -> None:
        out._obj.value = GRANULE

    def cuMemAddressReserve(self, out, size, *rest) -> None:
        self.reserved[BASE] = size
        out._obj.value = BASE

    def cuMemAddressFree(self, address, size) -> None:
        assert not self.mapped and self.reserved.pop(address) == size

    def cuMemCreate(self, out, size, *rest) -> None:
        if size > self.room:
            raise torch.OutOfMemoryError
        self.room -= size
        out._obj.value = len(self.handles) + 1
        self.handles[out._obj.value] = size

    def cuMemMap(self, address, size, offset, handle, flags) -> None:
        assert address % GRANULE == size % GRANULE == 0 and self.handles[handle.value] == size
        assert all(address + size <= other or address >= other + length for other, (length, _) in self.mapped.items())
        assert BASE <= address and address + size <= BASE + self.reserved[BASE]
        self.mapped[address] = size, False

    def cuMemRelease(self, handle) -> None:
        assert handle.value in self.handles  # the memory lives as long as it is mapped

    def cuMemSetAccess(self, address, size, access, count) -> None:
        assert self.mapped[address] == (size, False) and count == 1
        self.mapped[address] = size, True

    def cuMemUnmap(self, address, size) -> None:
        assert self.mapped.pop(address)[0] == size
        self.room += size


@pytest.fixture
def books(monkeypatch: pytest.MonkeyPatch) -> Books:
    books = Books(64 * GRANULE)
    monkeypatch.setattr(device_memory, "call", books)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=TOTAL))
    interface = lambda x: x.__cuda_array_interface__  # noqa: E731
    monkeypatch.setattr(torch, "as_tensor", lambda x, device: torch.ones(interface(x)["shape"], dtype=torch.uint8))
    return books


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


def test_the_structures_are_the_drivers() -> None:
    """Sizes and offsets of cuda.h on a 64-bit machine."""
    assert ctypes.sizeof(AllocationProperties) == 32 and ctypes.sizeof(device_memory.Access) == 12
    offsets = {name: getattr(AllocationProperties, name).offset for name, _ in AllocationProperties._fields_}
    assert offsets == {"type": 0, "handle_types": 4, "location": 8, "win32_metadata": 16, "flags": 24}

"""A CUDA driver that only keeps books, for what asks it for memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Callable

import pytest
import torch

from sample import device_memory

GRANULE, TOTAL, BASE = 2**12, 2**21, 2**40


class Books:
    """Reserved, created and mapped memory; there are `size` bytes of it."""

    def __init__(self, size: int) -> None:
        self.size, self.reserved = size, {}
        self.created: list[int] = []
        """Sizes; a handle is a place in it, from 1 on."""
        self.handles: set[int] = set()
        """Not released."""
        self.mapped: dict[int, tuple[int, bool]] = {}
        """By address: handle, and whether it may be used."""
        self.calls: list[str] = []
        self.fault: Callable[[], None] = lambda: None
        """Called in front of what a call does."""

    def __call__(self, name: str, *arguments) -> None:
        self.calls.append(name)
        self.fault()
        getattr(self, name)(*arguments)

    @property
    def room(self) -> int:
        """Memory lives as long as it is mapped or its handle is held."""
        return self.size - sum(self.created[n - 1] for n in self.handles | {handle for handle, _ in self.mapped.values()})

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
        self.created.append(size)
        self.handles.add(len(self.created))
        out._obj.value = len(self.created)

    def cuMemMap(self, address, size, offset, handle, flags) -> None:
        assert address % GRANULE == size % GRANULE == 0 and handle.value in self.handles and self.created[handle.value - 1] == size
        taken = [(other, self.created[handle - 1]) for other, (handle, _) in self.mapped.items()]
        assert all(address + size <= other or address >= other + length for other, length in taken)
        assert BASE <= address and address + size <= BASE + self.reserved[BASE]
        self.mapped[address] = handle.value, False

    def cuMemRelease(self, handle) -> None:
        self.handles.remove(handle.value)

    def cuMemSetAccess(self, address, size, access, count) -> None:
        handle, usable = self.mapped[address]
        assert self.created[handle - 1] == size and not usable and count == 1
        self.mapped[address] = handle, True

    def cuMemUnmap(self, address, size) -> None:
        assert self.created[self.mapped.pop(address)[0] - 1] == size


@pytest.fixture
def books(monkeypatch: pytest.MonkeyPatch) -> Books:
    """64 granules."""
    books = Books(64 * GRANULE)
    monkeypatch.setattr(device_memory, "call", books)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=TOTAL))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (books.room, TOTAL))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    interface = lambda x: x.__cuda_array_interface__  # noqa: E731
    monkeypatch.setattr(torch, "as_tensor", lambda x, device: torch.ones(interface(x)["shape"], dtype=torch.uint8))
    return books

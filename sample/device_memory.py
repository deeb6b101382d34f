"""GPU memory behind virtual addresses that stay: given back to the driver and taken again, it does not move.

A CUDA graph holds the addresses of what its kernels touch. The cache of an engine has to make room for the update between two
rollouts, and graphs captured over it should live on. So addresses are reserved once, and physical memory is mapped behind them
when it is wanted: the driver's virtual memory management (CUDA Driver API, "Virtual Memory Management"), called through ctypes.

Such memory is not torch's: `torch.cuda.memory_allocated` does not count it, `torch.cuda.mem_get_info` does.
"""

from __future__ import annotations

import ctypes
import functools
import signal
import sys
import threading
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint64, c_ushort, c_void_p
from typing import Any, Iterator

import torch
from torch import Tensor

PINNED, ON_DEVICE, READ_WRITE = 1, 1, 3
"""CU_MEM_ALLOCATION_TYPE_PINNED, CU_MEM_LOCATION_TYPE_DEVICE, CU_MEM_ACCESS_FLAGS_PROT_READWRITE."""


class Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = [("type", c_int), ("id", c_int)]


class AllocationFlags(ctypes.Structure):
    _fields_ = [("compression", c_ubyte), ("gpu_direct_rdma", c_ubyte), ("usage", c_ushort), ("reserved", c_ubyte * 4)]


class AllocationProperties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = [
        ("type", c_int),
        ("handle_types", c_int),
        ("location", Location),
        ("win32_metadata", c_void_p),
        ("flags", AllocationFlags),
    ]


class Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = [("location", Location), ("flags", c_int)]


SIGNATURES = {
    "cuGetErrorString": [c_int, POINTER(c_char_p)],
    "cuMemGetAllocationGranularity": [POINTER(c_size_t), POINTER(AllocationProperties), c_int],
    "cuMemAddressReserve": [POINTER(c_uint64), c_size_t, c_size_t, c_uint64, c_uint64],
    "cuMemAddressFree": [c_uint64, c_size_t],
    "cuMemCreate": [POINTER(c_uint64), c_size_t, POINTER(AllocationProperties), c_uint64],
    "cuMemMap": [c_uint64, c_size_t, c_size_t, c_uint64, c_uint64],
    "cuMemSetAccess": [c_uint64, c_size_t, POINTER(Access), c_size_t],
    "cuMemUnmap": [c_uint64, c_size_t],
    "cuMemRelease": [c_uint64],
}


@functools.cache
def driver() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    for name, arguments in SIGNATURES.items():
        getattr(library, name).argtypes = arguments
        getattr(library, name).restype = c_int
    return library


def call(name: str, *arguments: object) -> None:
    """Call the driver. Raises torch.OutOfMemoryError where there is too little memory, RuntimeError for any other error."""
    error = getattr(driver(), name)(*arguments)
    if error:
        text = c_char_p()
        driver().cuGetErrorString(error, byref(text))
        raise (torch.OutOfMemoryError if error == 2 else RuntimeError)(f"{name}: {(text.value or b'?').decode()} ({error})")


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """A Ctrl-C takes effect behind what is inside: none comes between what the driver does and the note of it.

    Python's handler waits, not the signal: a mask is one thread's, and torch has others that would take it.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):  # no handler runs here
        yield
        return
    came: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *arguments: came.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])


class Mapped:
    """`__cuda_array_interface__` of mapped regions, for torch to make a tensor of, which keeps it, and so the memory, alive."""

    def __init__(self, memory: DeviceMemory) -> None:
        self.memory = memory
        self.__cuda_array_interface__ = {
            "shape": (memory.num_regions, memory.region_bytes),
            "strides": (memory.stride, 1),
            "typestr": "|u1",
            "data": (memory.base, False),
            "version": 3,
        }


class DeviceMemory:
    """`num_regions` regions of one size, each at an address of its own that never changes while the size may.

    Who lets go of it, and of its tensors, has given all back.
    """

    def __init__(self, device: torch.device, num_regions: int) -> None:
        torch.cuda.synchronize(device)  # the device's context exists
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device, self.num_regions = torch.device("cuda", index), num_regions
        self.properties = AllocationProperties(type=PINNED, location=Location(ON_DEVICE, index))
        granularity = c_size_t()
        call("cuMemGetAllocationGranularity", byref(granularity), byref(self.properties), 0)
        self.granularity = granularity.value
        # Addresses for all the memory there is, whatever part of it the regions will have.
        total = torch.cuda.get_device_properties(self.device).total_memory
        self.stride = self._whole(total // num_regions + 1)
        self.region_bytes = 0
        """Of every region that is mapped."""
        self.mapped: list[int] = []
        """Addresses of regions with memory behind them: all, or none but where the driver has failed."""
        self.handles: list[c_uint64] = []
        """Of memory that was created and not released: none but inside `take`, or where the driver has failed."""
        base = c_uint64()
        with interrupts_held_back():
            call("cuMemAddressReserve", byref(base), self.stride * num_regions, 0, 0, 0)
            self.base = base.value

    @property
    def num_bytes(self) -> int:
        """Mapped now, of all regions."""
        return len(self.mapped) * self.region_bytes

    def _whole(self, num_bytes: int) -> int:
        return -(-num_bytes // self.granularity) * self.granularity

    def take(self, region_bytes: int) -> Tensor:
        """Have that many bytes or a little more in every region: uint8 [num_regions, bytes], zeroed. What was there is lost.

        Tensors of an earlier `take` must not be used any more. Raises torch.OutOfMemoryError: then no region has any.
        """
        self.give_back()
        size = self._whole(region_bytes)
        assert 0 < size <= self.stride
        with interrupts_held_back():
            self.region_bytes = size
            try:
                for n in range(self.num_regions):
                    self._map(self.base + n * self.stride)
            except BaseException:
                self._unmap()
                raise
        regions = torch.as_tensor(Mapped(self), device=self.device)
        for region in regions:  # each is contiguous: a memset
            region.zero_()
        return regions

    def _map(self, address: int) -> None:
        """Put memory behind one region's address. What the driver has done is noted before it is asked for more."""
        handle, access = c_uint64(), Access(self.properties.location, READ_WRITE)
        call("cuMemCreate", byref(handle), self.region_bytes, byref(self.properties), 0)
        self.handles.append(handle)
        call("cuMemMap", address, self.region_bytes, 0, handle, 0)
        self.mapped.append(address)
        self._release()  # mapped memory lives until it is unmapped
        call("cuMemSetAccess", address, self.region_bytes, byref(access), 1)

    def _release(self) -> None:
        while self.handles:
            call("cuMemRelease", self.handles[-1])
            self.handles.pop()

    def _unmap(self) -> None:
        """Undo what is noted; where the driver fails, the rest stays noted for the next time."""
        while self.mapped:
            call("cuMemUnmap", self.mapped[-1], self.region_bytes)
            self.mapped.pop()
        self._release()
        self.region_bytes = 0

    def give_back(self) -> None:
        """Give the memory, not the addresses, back to the driver."""
        if self.mapped or self.handles:
            torch.cuda.synchronize(self.device)
            with interrupts_held_back():
                self._unmap()

    def close(self) -> None:
        """Give back the addresses as well."""
        if self.base:
            self.give_back()
            with interrupts_held_back():
                call("cuMemAddressFree", self.base, self.stride * self.num_regions)
                self.base = 0

    def __del__(self) -> None:
        if getattr(self, "base", 0) and not sys.is_finalizing():  # at the end of the process the driver takes all
            self.close()

"""Keys and values in pages: the tensors behind sample/pages.py.

Shapes: L layers, P pages of PAGE positions, G key/value heads, K head_dim; E = P*PAGE entries of a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.errors import UserError
from models.family import DecoderConfig
from sample.device_memory import DeviceMemory
from sample.pages import PAGE

GIB = 2**30
MEMORY_SHARE = 0.9
"""Of the free GPU memory, what the cache may take at most."""
PAGES_AT_A_TIME = 16
"""Copied by one operation: what lies in between is L times as large, twice."""


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy that nobody waits for: torch keeps the pinned memory in between until the copy is over."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


class PagedCache:
    """One layer's keys, and its values, are a region each. On CUDA a region's address stays when the memory behind it goes and
    comes back, so that graphs stay valid; page numbers are all that the rest knows."""

    def __init__(self, config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        self.memory = DeviceMemory(device, 2 * config.num_layers) if device.type == "cuda" else None
        self.num_pages = 0
        self.regions: Tensor | None = None  # [2L, P, PAGE, G, K]
        self.k: list[Tensor] = []
        """Per layer [E, G, K]."""
        self.v: list[Tensor] = []

    @property
    def page_shape(self) -> tuple[int, int, int]:
        return PAGE, self.config.num_kv_heads, self.config.head_dim

    @property
    def page_bytes(self) -> int:
        """Of one page in one region."""
        return torch.Size(self.page_shape).numel() * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return 2 * self.config.num_layers * self.num_pages * self.page_bytes

    def matches(self, config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> bool:
        return (self.config, self.dtype, self.device) == (config, dtype, device)

    def take(self, wanted: int, least: int, reserve_bytes: int, bytes_beside_page: int = 0) -> None:
        """Have `wanted` pages or as many as the free GPU memory allows. What is there already stays if it is enough, and all
        that is wanted or no more would fit now, and beside it there is what forwards need; else it is lost.

        reserve_bytes: what forwards need beside the cache; bytes_beside_page: and for every page of it (of a cache that stays
        the graphs hold that already). Raises UserError where fewer than `least` fit.
        """
        free_now = lambda: torch.cuda.mem_get_info(self.device)[0]  # noqa: E731
        if self.num_pages >= wanted and (self.memory is None or free_now() >= reserve_bytes):
            return
        if self.memory is None:
            self._use(torch.zeros(2 * self.config.num_layers, wanted, *self.page_shape, dtype=self.dtype, device=self.device))
            return
        torch.cuda.empty_cache()  # what torch holds without using it is not the driver's to map
        beside = free_now()
        free = beside + self.memory.num_bytes
        all_regions = 2 * self.config.num_layers * self.page_bytes
        fitting = max(0, int(min(MEMORY_SHARE * free, free - reserve_bytes))) // (all_regions + bytes_beside_page)
        # Whole allocation units of a region: at most so many pages less than the memory has.
        fitting -= self.memory.granularity // self.page_bytes if fitting < wanted else 0
        if self.num_pages >= max(least, min(wanted, fitting)) and beside >= reserve_bytes:
            return
        if fitting < least:
            raise UserError(
                f"rollout.max_token: the keys and values of the longest sequence take {least * all_regions / GIB:.1f} GiB "
                f"({least} pages of {PAGE} positions), and of {free / GIB:.1f} GiB free GPU memory the cache can have "
                f"{max(0, fitting) * all_regions / GIB:.1f}: lower it, or use a GPU with more memory"
            )
        self.release()
        mapped = self.memory.take(min(wanted, fitting) * self.page_bytes)  # uint8 [2L, bytes]
        count = mapped.shape[1] // self.page_bytes
        self._use(mapped[:, : count * self.page_bytes].view(self.dtype).unflatten(1, (count, *self.page_shape)))

    def _use(self, regions: Tensor) -> None:
        self.regions, self.num_pages = regions, regions.shape[1]
        entries = regions.flatten(1, 2)  # [2L, E, G, K]
        self.k, self.v = list(entries[0::2]), list(entries[1::2])

    def release(self) -> None:
        self.regions, self.k, self.v, self.num_pages = None, [], [], 0
        if self.memory is not None:
            self.memory.give_back()

    def close(self) -> None:
        """Not to be used any more."""
        self.release()
        if self.memory is not None:
            self.memory.close()

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy pages (source, target), all layers. No target is a source."""
        for first in range(0, len(pairs), PAGES_AT_A_TIME):
            sources, targets = to_device(torch.tensor(pairs[first : first + PAGES_AT_A_TIME]), self.device).unbind(1)
            self.regions.index_copy_(1, targets, self.regions.index_select(1, sources))

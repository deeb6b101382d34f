"""What a GPU has, where a kernel's tiles depend on it."""

from __future__ import annotations

import functools

import torch


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program on it may have: 227 KiB on an H100, 99 on smaller ones. No limit in the interpreter."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 2**30

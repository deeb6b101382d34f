"""Memory of a device."""

from __future__ import annotations

import torch


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that can still be allocated: what the driver has, and what torch holds without using it."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def free_memory_share(device: torch.device) -> float:
    """Share of a GPU's memory that can still be allocated; 1 where there is no GPU."""
    if device.type != "cuda":
        return 1.0
    return free_memory(device) / torch.cuda.mem_get_info(device)[1]

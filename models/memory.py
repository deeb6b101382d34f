"""Memory of a device and of the host."""

from __future__ import annotations

import math
from pathlib import Path

import torch


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that can still be allocated: what the driver has, and what torch holds without using it."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


CONTROL_GROUPS = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Of Linux, version 2 and 1, by what /proc/self/cgroup calls them: folder, limit, use, and the use that is page cache to spare."""


def free_host_memory(root: Path = Path("/")) -> float:
    """Bytes of the host that processes of this machine, container or batch job can still fill; inf where nobody says.

    The kernel's own estimate (MemAvailable), and what the limits of our control group and of those around it leave, page cache
    that can go counted as free.
    """
    free = 1024.0 * _fields(root / "proc/meminfo").get("MemAvailable:", math.inf)
    for line in _lines(root / "proc/self/cgroup"):
        _, controller, path = line.split(":", 2)
        if controller not in CONTROL_GROUPS:
            continue
        folder, limit_file, used_file, cache = CONTROL_GROUPS[controller]
        top = root / "sys/fs/cgroup" / folder
        own = top / path.lstrip("/")  # inside a container it may not be there: then the top is its own
        for group in (own, *own.parents):
            limit = _number(group / limit_file) if group.is_relative_to(top) else None
            if limit is not None:
                used = (_number(group / used_file) or 0) - _fields(group / "memory.stat").get(cache, 0)
                free = min(free, limit - used)
    return max(free, 0.0)


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.is_file() else []


def _fields(file: Path) -> dict[str, int]:
    """First words of lines, and the numbers behind them."""
    return {words[0]: int(words[1]) for line in _lines(file) if (words := line.split())[1:2]}


def _number(file: Path) -> int | None:
    """None where there is no such file, or no limit in it ("max")."""
    text = "".join(_lines(file)).strip()
    return int(text) if text.isdigit() else None

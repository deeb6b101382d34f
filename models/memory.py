"""Memory of a device and of the host."""

from __future__ import annotations

import math
from pathlib import Path

import torch


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that can still be allocated: what the driver has, and what torch holds without using it."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def free_host_memory(root: Path = Path("/")) -> float:
    """Bytes of the host that processes of this machine, or of this container, can still fill; inf where nobody says.

    The kernel's own estimate (MemAvailable), and under a limit of a control group (version 2) what it leaves, page cache that can
    go counted as free.
    """
    free = math.inf
    meminfo = _fields(root / "proc/meminfo")
    if "MemAvailable:" in meminfo:
        free = 1024.0 * meminfo["MemAvailable:"]
    group = root / "sys/fs/cgroup"
    limit = _number(group / "memory.max")
    if limit is not None:
        used = (_number(group / "memory.current") or 0) - _fields(group / "memory.stat").get("inactive_file", 0)
        free = min(free, limit - used)
    return max(free, 0.0)


def _fields(file: Path) -> dict[str, int]:
    """First words of lines, and the numbers behind them."""
    if not file.is_file():
        return {}
    return {words[0]: int(words[1]) for line in file.read_text().splitlines() if (words := line.split())[1:2]}


def _number(file: Path) -> int | None:
    """None where there is no such file, or no limit in it ("max")."""
    text = file.read_text().strip() if file.is_file() else ""
    return int(text) if text.isdigit() else None

"""Limits of a sandboxed program, and what it uses, seen from outside through /proc."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

from reward.sandbox_runner import descendants

TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Limits:
    """Of one test. Memory, processes and processor time are those of the program with all of its children."""

    seconds: float = 4.0
    """Processor time; on the clock twice that, at least one second more: a busy machine makes no program wrong."""
    memory_bytes: int = 1 << 30
    num_processes: int = 64
    """Processes and threads."""
    file_bytes: int = 64 << 20
    """Of one file, and of all of them where the scratch directory is in memory."""
    output_bytes: int = 16 << 20
    """Written to stdout, besides what is expected."""

    @property
    def clock_seconds(self) -> float:
        return max(2 * self.seconds, self.seconds + 1)

    def of_process(self, num_used: int, num_tests: int = 1) -> dict[str, int]:
        """RLIMIT name -> value, of a process that lives for `num_tests` tests, where the user runs `num_used` others.

        Address space is more than memory: threads reserve far more than they touch.
        """
        return {
            "AS": 4 * self.memory_bytes,
            "CPU": int(self.seconds * num_tests) + 2,  # a second line, for when this process is gone
            "FSIZE": self.file_bytes,
            "NPROC": self.num_processes + num_used,
            "NOFILE": 256,
            "CORE": 0,
            "MEMLOCK": 1 << 16,
            "MSGQUEUE": 0,
        }


@dataclass
class Usage:
    seconds: float = 0.0
    memory_bytes: int = 0
    num_processes: int = 0


def usage(pid: int) -> Usage:
    """Of all processes below `pid`, and of their children that have ended. Pages of files do not count as memory."""
    total = Usage()
    for one in [pid, *descendants(pid)]:
        try:
            with open(f"/proc/{one}/stat", "rb") as file:
                stat = file.read().rpartition(b")")[2].split()
            with open(f"/proc/{one}/statm", "rb") as file:
                _, resident, shared, *_ = map(int, file.read().split())
        except (OSError, ValueError):
            continue  # ended meanwhile
        total.seconds += sum(map(int, stat[11:15])) / TICKS
        if one != pid:
            total.memory_bytes += (resident - shared) * PAGE
            total.num_processes += int(stat[17])
    return total


def kernel() -> tuple[int, int]:
    major, minor = platform.release().split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


def num_threads_of_user() -> int:
    own, total = os.geteuid(), 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.stat(f"/proc/{name}").st_uid == own:
                    total += len(os.listdir(f"/proc/{name}/task"))
            except OSError:
                continue  # ended meanwhile
    return total

"""The time of every step of a rollout, taken from inside the engine's `progress` hook."""

from __future__ import annotations

import time

import numpy as np
import torch

from benchmarks.kernel_times import StepProfiler


class Clock:
    """A `progress` hook that keeps the time and the counts of every step, and profiles steps `profiled`."""

    def __init__(self, profiled: range = range(0), device: torch.device | None = None) -> None:
        self.started = time.perf_counter()
        self.times: list[float] = []
        self.counts: list[tuple[int, int, int]] = []  # finished sequences, tokens, forwards of all sequences
        self.profiled, self.device = profiled, device
        self.profiler = StepProfiler() if len(profiled) else None
        self.used_bytes = 0

    def __call__(self, finished: int, tokens: int, forwards: int) -> None:
        self.times.append(time.perf_counter())
        self.counts.append((finished, tokens, forwards))
        if self.profiler is not None:
            if len(self.times) == self.profiled.start:
                self.profiler.start()
            elif len(self.times) == self.profiled.stop:
                self.profiler.stop()
        if self.device is not None and self.device.type == "cuda" and len(self.times) % 64 == 1:
            free, total = torch.cuda.mem_get_info(self.device)  # the paged cache is not torch's own memory
            self.used_bytes = max(self.used_bytes, total - free)

    def between(self, first: int, last: int) -> dict[str, float]:
        """Rates over the steps behind step `first` (from 1) up to step `last`."""
        seconds = self.times[last - 1] - self.times[first - 1]
        _, tokens, forwards = np.subtract(self.counts[last - 1], self.counts[first - 1])
        return {
            "steps": last - first,
            "seconds": seconds,
            "tokens_per_second": float(tokens / seconds),
            "tokens_per_forward": float(tokens / max(1, forwards)),
            "ms_per_forward": 1e3 * seconds / (last - first),
            "mean_active": float(forwards / (last - first)),
        }

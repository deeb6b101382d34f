"""Where the time of a step goes on the GPU: the kernels of a torch.profiler trace, grouped, and how often the host waits."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Iterator

GROUPS: dict[str, str] = {
    "attention": r"attention|attend|fmha|flash|sdpa|combine",
    "products": r"gemm|gemv|cutlass|cublas|nvjet|xmma|splitk|matmul|skinny",
    "sampler": r"sampl|draw|reveal|plan|advance|noise|gumbel",
    "norms, rotary, SwiGLU": r"norm|rotary|rope|swiglu|silu",
    "copies": r"^memcpy|^memset",
}
"""Group -> pattern of its kernels' names, case ignored; the first that fits. The others are "other"."""
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""Calls in which the host waits for the device; the asynchronous copies are not among them."""


def group_of(name: str) -> str:
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def summarize(events: list[dict[str, Any]], num_steps: int) -> dict[str, Any]:
    """Of a trace's events (Chrome format, times in us) over `num_steps` steps: milliseconds and counts per step.

    busy_ms is the time in which any kernel runs: where two streams overlap it is less than the sum of the groups.
    """
    device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    groups: dict[str, float] = defaultdict(float)
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in device:
        groups[group_of(event["name"])] += event["dur"]
        kernels[event["name"]].append(event["dur"])
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in device)
    calls = Counter(e["name"] for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver"))
    per_step = 1e-3 / num_steps
    whole, busy = (max(end for _, end in spans) - spans[0][0] if spans else 0.0), covered(spans)
    longest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:25]
    return {
        "profiled_steps": num_steps,
        "profiled_ms": whole * per_step,
        "busy_ms": busy * per_step,
        "gaps_ms": (whole - busy) * per_step,
        "gaps_share": 1 - busy / whole if whole else 0.0,
        "groups_ms": {group: total * per_step for group, total in sorted(groups.items(), key=lambda item: -item[1])},
        "kernels_per_step": sum(e["cat"] == "kernel" for e in device) / num_steps,
        "device_to_host_copies_per_step": sum("dtoh" in e["name"].lower() for e in device) / num_steps,
        "waits_per_step": {name: calls[name] / num_steps for name in WAITS if calls[name]},
        "longest_kernels": [
            {"name": name[:120], "ms": sum(times) * per_step, "per_step": len(times) / num_steps, "group": group_of(name)}
            for name, times in longest
        ],
    }


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals, sorted by their starts."""
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


class StepProfiler:
    """Profiles a stretch of steps from inside a `progress` hook: `start()` before the first of them, `stop()` behind the last."""

    def __init__(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        self.profile = profile(activities=[ProfilerActivity.CUDA])
        self.running = False

    def start(self) -> None:
        self.profile.start()
        self.running = True

    def stop(self) -> None:
        self.profile.stop()
        self.running = False

    def events(self) -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory(prefix="unmask-trace-") as folder:
            path = Path(folder, "trace.json")
            self.profile.export_chrome_trace(str(path))
            return list(_complete(json.loads(path.read_text(errors="replace"))["traceEvents"]))


def _complete(events: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (event for event in events if event.get("ph") == "X" and "dur" in event)

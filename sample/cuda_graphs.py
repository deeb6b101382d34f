"""CUDA graphs, captured when they are first needed and kept for later.

All share one memory pool: they never run at the same time, and what one leaves in the pool no other reads, so a graph's
intermediate results take the place of another's. What has to outlive a replay lies in tensors that were allocated before.
"""

from __future__ import annotations

import gc
import time
from collections import OrderedDict
from typing import Any, Callable, Hashable

import torch

LIMIT = 96
"""Graphs kept at most: one of a 36-layer decoder has about 400 kernels and takes a few MB."""


class CudaGraphs:
    """Graphs by key; the one that has not been used for longest goes where there would be too many."""

    def __init__(self, device: torch.device, limit: int = LIMIT) -> None:
        self.device, self.limit = device, limit
        self.graphs: OrderedDict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = OrderedDict()  # and what it keeps
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)  # capturing needs one that is not the default
        self.num_captured, self.capture_seconds = 0, 0.0

    def __contains__(self, key: Hashable) -> bool:
        return key in self.graphs

    def replay(self, key: Hashable) -> None:
        """Queue the captured work on the current stream."""
        self.graphs.move_to_end(key)
        self.graphs[key][0].replay()

    def capture(self, key: Hashable, work: Callable[[], None], keeps: Any = None) -> None:
        """Capture `work`. It is run once before that, for what it compiles and loads: it must do no harm.

        keeps: tensors of this graph, which are to live as long as it does.
        """
        started = time.perf_counter()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            work()
            self.stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Not torch.cuda.graph(): it empties torch's memory cache and collects garbage every time. What collecting garbage would
            # free (another engine's memory, say) may be what a capture forbids, so there is none meanwhile. Other threads (NCCL's
            # watchdog) may call what is forbidden; only this one's calls count.
            collects = gc.isenabled()
            gc.disable()
            try:
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    work()
                finally:
                    graph.capture_end()
            finally:
                if collects:
                    gc.enable()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        while len(self.graphs) >= self.limit:
            self.graphs.popitem(last=False)
        self.graphs[key] = graph, keeps
        self.num_captured += 1
        self.capture_seconds += time.perf_counter() - started

    def clear(self) -> None:
        """Drop all graphs: an address that they hold has changed."""
        if self.graphs:
            torch.cuda.synchronize(self.device)  # none may be running
            self.graphs.clear()
            self.pool = torch.cuda.graph_pool_handle()  # the old one went with its last graph

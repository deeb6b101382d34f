"""What sampling can be told to do, by name. No torch is imported: a config is checked against these names first."""

from __future__ import annotations

import math

from common.registry import Registry

ENGINES: Registry = Registry("attention kind")
"""By `Family.attention`: a class with the interface of sample/engine.py's `Engine`."""
ENGINES.register("block", "sample.block:BlockEngine")
ENGINES.register("full", "sample.canvas:CanvasEngine")

KERNEL_ENGINES: Registry = Registry("attention kind with an engine of kernels")
"""Likewise: engines in Triton and CUDA graphs, for the attention kinds that have one."""
KERNEL_ENGINES.register("block", "sample.paged_block:PagedBlockEngine")
KERNEL_ENGINES.register("full", "sample.canvas_kernels:KernelCanvasEngine")

UNMASKING: Registry = Registry("unmasking strategy")
"""Functions (Candidates, SamplingSettings) -> bool [S, B], the positions to reveal (sample/unmask.py)."""
UNMASKING.register("low_confidence_static", "sample.unmask:low_confidence_static")
UNMASKING.register("low_confidence_dynamic", "sample.unmask:low_confidence_dynamic")
UNMASKING.register("sequential", "sample.unmask:sequential")
UNMASKING.register("entropy_bounded", "sample.unmask:entropy_bounded")

THRESHOLDED = "low_confidence_dynamic"
"""The one among them that compares scores with the threshold; what others of your own make of it is theirs to say."""
UNRANKED = frozenset({"sequential", "entropy_bounded"})
"""Strategies among them that do not see the target: what changes scores, or how they rank, changes nothing there."""

TARGETS: Registry = Registry("unmasking target")
"""Functions Distribution -> float32 [M], what ranks the masked positions (sample/sampling.py): higher is revealed earlier."""
TARGETS.register("confidence", "sample.sampling:confidence")
TARGETS.register("margin_confidence", "sample.sampling:margin_confidence")
TARGETS.register("neg_entropy", "sample.sampling:neg_entropy")
TARGETS.register("random", "sample.sampling:random_score")

SCORE_RANGES: dict[str, tuple[float, float]] = {"neg_entropy": (-math.inf, 0.0)}
"""Where the scores of a target lie, and so a threshold on them, if not from 0 to 1. One of your own adds its line here."""

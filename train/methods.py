"""Training methods: which slices (train/traces.py) meet which objective (train/objectives.py). A new one is one line here.

No torch is imported: a config is checked against this table first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from common.registry import Registry


@dataclass(frozen=True)
class Method:
    trace: str
    """Name in train.traces.TRACES: what is masked."""
    objective: str
    """Name in train.objectives.OBJECTIVES: what is minimised."""
    stage: Literal["rl", "sft"]
    """Which job it belongs to."""


METHODS: Registry[Method] = Registry("training method")

METHODS.register("TraceRL", Method(trace="trace", objective="clipped", stage="rl"))
METHODS.register("semi-ar", Method(trace="random_mask", objective="likelihood", stage="sft"))
METHODS.register("trace", Method(trace="trace", objective="likelihood", stage="sft"))

"""What a training method is, and the table of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from common.registry import Registry


@dataclass(frozen=True)
class Method:
    trace: str
    """Name in train.traces.TRACES: what is masked."""
    objective: str
    """Name in train.registry.OBJECTIVES: what is minimised."""
    stage: Literal["rl", "sft"]
    """Which job it belongs to."""
    follows_steps: bool = False
    """Whether its slices are the ones that sampling saw (at shrink 1), so that engine and trainer log-probs are of one thing."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Settings that the method stands for, used where the config does not say otherwise."""


METHODS: Registry[Method] = Registry("training method")

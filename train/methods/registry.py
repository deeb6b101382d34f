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
    """Name in train.registry.OBJECTIVES: what RL minimises; finetuning, the likelihood."""
    stage: Literal["rl", "sft", "any"]
    """Which job it belongs to."""
    follows_steps: bool = False
    """Whether its slices are the ones that sampling saw (at shrink 1), so that engine and trainer log-probs are of one thing."""
    block_size: int | None = None
    """Width of its slices, whatever family and config say; None: train/layout.py."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Settings that the method stands for, used where the config does not say otherwise."""

    def fits(self, job: str) -> bool:
        """Whether it is a method of `job` ("rl" or "sft")."""
        return self.stage in (job, "any")

    def objective_of(self, job: str) -> str:
        return "likelihood" if self.stage == "any" and job == "sft" else self.objective

    def is_sampled(self, training: Any, rollout: Any, attention: str) -> bool:
        """Whether its slices are the ones that sampling saw under these sections of the config, for an attention kind."""
        if attention == "full":  # a canvas is cut to max_gen_length
            same_blocks = training.max_gen_length >= rollout.max_token
        else:
            same_blocks = training.block_size == rollout.block_size
        return self.follows_steps and training.shrink == 1 and same_blocks


METHODS: Registry[Method] = Registry("training method")

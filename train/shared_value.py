"""A value head on the policy's own trunk (`model.value_shared`): one model, one optimizer step, two losses.

loss = policy loss + training.value_loss_weight * value loss
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from common.records import ScoredRollout
from models.value import VALUE_HEAD, VALUE_HEAD_FILE
from train.documents import Document, Predictions
from train.loop import Columns, Tables, Trainer
from train.objectives import Measures, Objective, ObjectiveInput, ObjectiveOutput
from train.traces import Response
from train.value import ValueInput, ValueTables, clipped_value, returns_and_advantages

VALUES = 2
"""Place of the values among the policy's outputs: (logprobs, entropy, values)."""


@dataclass
class JointInput:
    policy: ObjectiveInput
    value: ValueInput


@dataclass
class JointTables(Tables):
    """The policy's tables and the critic's, for one forward."""

    old_values: np.ndarray | None = None
    returns: np.ndarray | None = None

    def pick(self, columns: Columns, outputs: tuple[Tensor, ...]) -> JointInput:
        critic = ValueTables(self.old_values, self.returns, self.weights)
        return JointInput(super().pick(columns, outputs), critic.pick(columns, outputs[VALUES:]))

    def diagnose(self, x: JointInput, outputs: tuple[Tensor, ...]) -> Measures:
        measures = super().diagnose(x.policy, outputs)
        measures.sums["value/error"] = (x.value.values - x.value.returns).square().sum()
        return measures


def joint(objective: Objective, weight: float) -> Objective:
    """The policy's objective with the value loss added."""

    def both(x: JointInput, training: Any) -> ObjectiveOutput:
        output = objective(x.policy, training)
        return ObjectiveOutput(output.loss + weight * clipped_value(x.value, training).loss, output.measures)

    return both


class SharedValueUpdate:
    """In the place of `ValueUpdate` where the critic is a head of the policy: it has no step of its own."""

    def __init__(self, trainer: Trainer, config: Any) -> None:
        """trainer: the policy's, whose module has a value head."""
        self.trainer, self.config = trainer, config

    def advantages(
        self, rollouts: list[ScoredRollout], responses: list[Response], documents: list[Document], p: Predictions
    ) -> tuple[np.ndarray, ValueTables, dict[str, float]]:
        old = self.trainer.outputs(documents, len(p), output=VALUES)
        return returns_and_advantages(old, rollouts, responses, p, self.trainer.layout)

    def join(self, tables: Tables, critic: ValueTables, objective: Objective) -> tuple[Tables, Objective]:
        """The policy's tables and objective, with the critic's in them."""
        joined = JointTables(**vars(tables), old_values=critic.old_values, returns=critic.returns)
        return joined, joint(objective, self.config.training.value_loss_weight)

    def is_due(self, step: int) -> bool:
        return False

    # The head is part of the policy's state; its checkpoint is a file of its own, so that the policy's stays loadable anywhere.

    def save_state(self, folder: Path) -> None:
        pass

    def load_state(self, folder: Path) -> None:
        pass

    def save_checkpoint(self, folder: Path) -> None:
        state = self.trainer.state_dict()
        if self.trainer.accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / ".value_head.partial"
            save_file({VALUE_HEAD: state["value_head.weight"].detach().cpu().contiguous()}, partial)
            partial.replace(folder / VALUE_HEAD_FILE)

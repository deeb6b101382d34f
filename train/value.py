"""The value model's part of training: values from packed rows, advantages for the policy, and the value update.

Shapes: M predictions of a batch, as everywhere in train/; L tokens of a response.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common import dist
from common.records import ScoredRollout
from common.state import load_state, save_state
from models.attention import attention_backend
from models.lora import prepare_for_training
from models.value import ValueModel, load_value_model, save_value_model
from train.documents import Document, Predictions
from train.layout import Layout
from train.loop import Columns, StepResult, Tables, Trainer
from train.objectives import Measures, Objective, ObjectiveOutput
from train.packing import Pack
from train.returns import outcome_rewards, response_times, step_returns
from train.traces import Response


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, eps: float) -> Tensor:
    """Clipped squared error of every token [M]: 0.5 max((v - R)^2, (v_old + clamp(v - v_old, -eps, eps) - R)^2)."""
    bounded = old_values + (values - old_values).clamp(-eps, eps)
    return 0.5 * torch.maximum((values - returns).square(), (bounded - returns).square())


class PackedValues(nn.Module):
    """The value model over packed rows. A module, so that DDP and DeepSpeed wrap the whole forward."""

    def __init__(self, model: ValueModel, backend: str) -> None:
        super().__init__()
        self.model = model
        self.backend = backend

    def forward(self, pack: Pack) -> tuple[Tensor]:
        """(values [M],), float32, read where the policy reads its log-probs: in the slice that revealed the token."""
        attend = attention_backend(self.backend, pack.token_ids, self.model.decoder.dtype)
        return (self.model(pack.input_ids, pack.positions, attend, pack.rows),)


@dataclass
class ValueInput:
    """Everything per prediction, each [M]."""

    values: Tensor
    old_values: Tensor
    returns: Tensor
    weights: Tensor


@dataclass
class ValueTables:
    """What the value loss needs about every prediction of a batch, each float array [M]."""

    old_values: np.ndarray
    returns: np.ndarray
    weights: np.ndarray

    def pick(self, columns: Columns, outputs: tuple[Tensor, ...]) -> ValueInput:
        zero = torch.zeros_like(outputs[0])
        old, returns, weights = (columns.get(name, zero) for name in ("old_values", "returns", "weights"))
        return ValueInput(outputs[0], old, returns, weights * columns.real)

    def diagnose(self, x: ValueInput, outputs: tuple[Tensor, ...]) -> Measures:
        return Measures({"error": (x.values - x.returns).square().sum()})


def clipped_value(x: ValueInput, training: Any) -> ObjectiveOutput:
    """The objective of the value model: minimise sum w value_loss."""
    return ObjectiveOutput((x.weights * value_loss(x.values, x.old_values, x.returns, training.eps)).sum())


def token_values(values: np.ndarray, p: Predictions, starts: np.ndarray) -> np.ndarray:
    """Values of predictions [M] -> of the tokens of all responses, one behind the other [starts[-1]].

    A token that several masks predict has their mean; one that none predicts has 0 and takes part in nothing.
    """
    place = starts[p.response] + p.offset
    counts = np.bincount(place, minlength=starts[-1])
    return np.bincount(place, values, minlength=starts[-1]) / np.maximum(counts, 1)


def token_returns(
    rollouts: list[ScoredRollout], responses: list[Response], values: np.ndarray, p: Predictions, starts: np.ndarray, layout: Layout
) -> tuple[np.ndarray, np.ndarray]:
    """Returns and advantages of every token of all responses, each [starts[-1]], from old values [starts[-1]].

    An outcome reward falls on the tokens of the last step; a process reward (`token_rewards`) gives each token its own, and what
    the record has beside it as `outcome` falls on the last step too.
    """
    training = layout.training
    returns, advantages = np.zeros(starts[-1]), np.zeros(starts[-1])
    predicted = np.zeros(starts[-1], bool)
    predicted[starts[p.response] + p.offset] = True
    for index, (rollout, response) in enumerate(zip(rollouts, responses, strict=True)):
        own = slice(starts[index], starts[index + 1])
        times = response_times(layout.grid(response), response.step_map, predicted[own], training.shrink)
        if rollout.token_rewards is None:
            rewards = outcome_rewards(rollout.reward, times)
        else:
            rewards = outcome_rewards(rollout.outcome, times)
            given = rollout.token_rewards[: len(rewards)]  # a canvas may have been cut
            rewards[: len(given)] += given
        returns[own], advantages[own] = step_returns(rewards, values[own], times, training.gam, training.lam)
    return returns, advantages


def explained_variance(values: np.ndarray, returns: np.ndarray) -> float:
    """1 - var(returns - values) / var(returns): 1 is a perfect critic, 0 a constant one. 0 where all returns are equal."""
    variance = float(returns.var())
    return 1 - float((returns - values).var()) / variance if variance > 0 else 0.0


def returns_and_advantages(
    old: np.ndarray, rollouts: list[ScoredRollout], responses: list[Response], p: Predictions, layout: Layout
) -> tuple[np.ndarray, ValueTables, dict[str, float]]:
    """For every prediction [M], from its old value [M]: the policy's advantage, what the value update needs, and metrics."""
    starts = np.cumsum([0] + [len(r.response_ids) for r in responses])
    values = token_values(old, p, starts)
    returns, advantages = token_returns(rollouts, responses, values, p, starts, layout)
    place = starts[p.response] + p.offset
    metrics = {
        "value/explained_variance": explained_variance(old, returns[place]),
        "value/mean": float(old.mean()),
        "value/return": float(returns[place].mean()),
    }
    # The weights of their losses come part by part.
    return advantages[place], ValueTables(old, returns[place], np.zeros(0)), metrics


class ValueUpdate:
    """The critic beside the policy: old values and advantages before the policy's update, its own update with it."""

    def __init__(self, config: Any, accelerator: Any) -> None:
        """accelerator: the value model's own (common/dist.py)."""
        self.config = config
        name, family, dtype = config.model.value_base_model, config.model.model_base, dist.weights_dtype(config)
        self.model, module = load_value_model(name, family, dtype, accelerator.device, config.training.seed)
        prepare_for_training(self.model, config.training.lora, name, config.training.seed)
        packed = PackedValues(module, config.training.attention_backend)
        self.trainer = Trainer(packed, self.model, config, accelerator, config.optimizer.params.value_learning_rate)

    def advantages(
        self, rollouts: list[ScoredRollout], responses: list[Response], documents: list[Document], p: Predictions
    ) -> tuple[np.ndarray, ValueTables, dict[str, float]]:
        """For every prediction [M] of the batch: the policy's advantage, and what the value update needs."""
        old = self.trainer.outputs(documents, len(p))
        return returns_and_advantages(old, rollouts, responses, p, self.trainer.layout)

    def join(self, tables: Tables, critic: ValueTables, objective: Objective) -> tuple[Tables, Objective]:
        """The policy's update is its own."""
        return tables, objective

    # -- kept with the policy's state and checkpoints

    def save_state(self, folder: Path) -> None:
        """Into FOLDER/value; all ranks together."""
        save_state(self.trainer.accelerator, folder / dist.VALUE)
        if self.trainer.accelerator.is_main_process:
            (folder / dist.VALUE / "num_steps").write_text(str(self.trainer.num_steps))

    def load_state(self, folder: Path) -> None:
        accelerator, file = self.trainer.accelerator, folder / dist.VALUE / "num_steps"
        load_state(accelerator, folder / dist.VALUE)
        self.trainer.num_steps = dist.broadcast_object(accelerator, int(file.read_text()) if accelerator.is_main_process else None)

    def save_checkpoint(self, folder: Path) -> None:
        state = self.trainer.state_dict()
        if self.trainer.accelerator.is_main_process:
            save_value_model(self.model, {name.removeprefix("model."): tensor for name, tensor in state.items()}, folder)

    # -- the update

    def is_due(self, step: int) -> bool:
        """`experiment.train_value_every`."""
        return step % self.config.experiment.train_value_every == 0

    def step(self, part: list[Document], tables: ValueTables, weights: np.ndarray, progress: float) -> list[StepResult]:
        """The critic's optimizer step on a part of the batch, its tokens weighted as the policy's are."""
        tables.weights = weights
        return [self.trainer.step(part, tables, clipped_value, progress)]

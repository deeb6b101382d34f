"""The update of one RL step: scored rollouts -> slices -> optimizer steps along the very steps of the unmasking."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np

from common.errors import UserError
from common.records import ScoredRollout
from models.checkpoint import Pretrained
from train.loop import Tables, Trainer, merge_results
from train.methods import METHODS
from train.objectives import OBJECTIVES, token_weights
from train.packing import Document, Predictions, build_document, number, split_rows
from train.policy import Policy, build_policy
from train.shared_value import SharedValueUpdate
from train.traces import TRACES, Response, sampled_response
from train.value import ValueUpdate


def trace_generator(seed: int, step: int, rollout: ScoredRollout) -> np.random.Generator:
    """Random masks depend on these four alone, so a resumed run draws the same ones."""
    return np.random.default_rng([seed, step, zlib.crc32(rollout.task_id.encode()), rollout.sample])


def update_plan(training: Any, num_rows: int, num_processes: int) -> tuple[int, int]:
    """(epochs, optimizer steps in each) on one batch of rollouts: as set, or what the reference makes of its own settings:

    num_train_epochs times ceil(N / (batch_size_lm * gradient_accumulation_steps * processes)), N the number of pairs (response, k).
    """
    if training.num_updates_per_step is not None:
        return 1, training.num_updates_per_step
    rows_per_update = training.batch_size_lm * training.gradient_accumulation_steps * num_processes
    return training.num_train_epochs, max(1, math.ceil(num_rows / rows_per_update))


class PolicyUpdate:
    """Updates the policy from scored rollouts. Holds the trainer, and the frozen reference model where KL is held to one."""

    def __init__(
        self,
        trainer: Trainer,
        config: Any,
        fill_id: int,
        reference: Pretrained | None = None,
        value: ValueUpdate | SharedValueUpdate | None = None,
    ) -> None:
        """fill_id: the model's; reference: the frozen model of the KL term, if it is held to one; value: the critic, if any."""
        self.trainer, self.config, self.fill_id, self.value = trainer, config, fill_id, value
        self.block_size = config.training.block_size
        method = METHODS.get(config.training.method, "training.method")
        if method.stage != "rl":
            raise UserError(f"training.method: {config.training.method} is for {method.stage}, this is rl: choose TraceRL")
        self.trace = TRACES.get(method.trace)
        self.follows_steps = method.follows_steps and config.training.shrink == 1
        self.follows_steps &= self.block_size == config.rollout.block_size
        self.objective = OBJECTIVES.get(config.training.objective or method.objective, "training.objective")
        self.reference: Policy | None = None
        if reference is not None:
            self.reference = build_policy(reference, config, config.rollout.temperature).to(trainer.accelerator.device)
            self.reference.requires_grad_(False)

    def responses(self, rollouts: list[ScoredRollout]) -> list[Response]:
        return [sampled_response(r, self.config.training.max_gen_length, self.block_size, self.fill_id) for r in rollouts]

    def documents(self, rollouts: list[ScoredRollout], step: int) -> list[Document]:
        """One document per response that trains something; `Document.response` indexes `rollouts`."""
        training = self.config.training
        documents = []
        for index, (rollout, response) in enumerate(zip(rollouts, self.responses(rollouts), strict=True)):
            trace = self.trace(response, self.block_size, training, trace_generator(training.seed, step, rollout))
            document = build_document(index, response, trace, self.block_size)
            if document is not None:
                documents.append(document)
        return documents

    def __call__(self, rollouts: list[ScoredRollout], step: int) -> dict[str, float]:
        """All updates of RL step `step` (from 1) on `rollouts`: those that are trained, of all ranks, the same list on each."""
        training = self.config.training
        documents = self.documents(rollouts, step)
        if not documents:
            return {}
        predictions = number(documents)
        num_rows = sum(len(np.unique(d.trace.rank)) for d in documents)
        epochs, updates = update_plan(training, num_rows, self.trainer.accelerator.num_processes)
        generator = np.random.default_rng([training.seed, step])
        parts = [part for _ in range(epochs) for part in split_rows(documents, updates, generator)]
        # Whatever must be known before the first update changes the weights.
        tables = self.before_update(documents, predictions, rollouts, several=len(parts) > 1)
        objective, critic, metrics = self.objective, None, {}
        if self.value is not None:
            tables.advantages, critic, metrics = self.value.advantages(rollouts, self.responses(rollouts), documents, predictions)
            tables, objective = self.value.join(tables, critic, objective)
        longest = min(training.max_gen_length, max(r.num_response for r in rollouts))
        results, value_results = [], []
        for index, part in enumerate(parts):
            own = np.concatenate([d.numbers for d in part])
            tables.weights = np.zeros(len(predictions))
            tables.weights[own] = token_weights(predictions.select(own), training.loss_weighting, longest, training.max_gen_length)
            tables.kl_weights = tables.weights
            tables.is_first = index == 0
            progress = (step - 1 + index / len(parts)) / self.config.experiment.total_step
            if self.value is not None and self.value.is_due(step):
                value_results += self.value.step(part, critic, tables.weights, progress)
            results.append(self.trainer.step(part, tables, objective, progress))
        return {**merge_results(results), **merge_results(value_results, "value"), **metrics}

    def before_update(self, documents: list[Document], p: Predictions, rollouts: list[ScoredRollout], several: bool) -> Tables:
        """What is known of the predictions before any weight moves (the weights of their losses come part by part)."""
        training = self.config.training
        advantages = np.array([r.advantage for r in rollouts])[p.response]
        # Other slices than those that sampling saw have other log-probs: there is nothing to compare with.
        engine = gather_tokens([r.logprobs for r in rollouts], p) if self.follows_steps else None
        old = kl = None
        if training.old_logprobs == "engine":
            old = engine
        elif training.old_logprobs == "trainer" or (training.old_logprobs == "auto" and several):
            old = self.trainer.outputs(documents, len(p))
        if self.reference is not None:
            kl = self.trainer.outputs(documents, len(p), self.reference)
        empty = np.zeros(0)
        return Tables(advantages, empty, empty, old_logprobs=old, kl_logprobs=kl, engine_logprobs=engine)


def gather_tokens(values: list[list[float]], predictions: Predictions) -> np.ndarray:
    """Per-response lists of per-token values -> the value of every prediction."""
    starts = np.cumsum([0] + [len(v) for v in values])
    flat = np.concatenate([np.asarray(v, dtype=np.float64) for v in values]) if values else np.zeros(0)
    return flat[starts[predictions.response] + predictions.offset]

"""The update of one RL step: scored rollouts -> slices -> optimizer steps along the very steps of the unmasking."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np

from common.errors import UserError
from common.records import ScoredRollout
from models.checkpoint import Pretrained
from train.loop import StepResult, Tables, Trainer, merge_results
from train.methods import METHODS
from train.objectives import OBJECTIVES, token_weights
from train.packing import Document, Predictions, build_document, number, split_rows
from train.policy import Policy
from train.traces import TRACES, Response


def as_response(rollout: ScoredRollout, max_response: int, block_size: int, fill_id: int) -> Response:
    """What training keeps of a rollout: all tokens as context, the first `max_response` up to the stop for training.

    Where training blocks are larger than those of sampling, the last one may reach behind the response: there stands what sampling
    never got to, so it is a mask at every step (`fill_id` where a mask method shows it).
    """
    num_fill = -(len(rollout.prompt_ids) + len(rollout.response_ids)) % block_size
    return Response(
        prompt_ids=np.asarray(rollout.prompt_ids, dtype=np.int64),
        response_ids=np.asarray(rollout.response_ids + [fill_id] * num_fill, dtype=np.int64),
        num_trained=min(rollout.num_response, max_response),
        step_map=np.asarray(rollout.step_map + [0] * num_fill, dtype=np.int64),
    )


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

    def __init__(self, trainer: Trainer, config: Any, fill_id: int, reference: Pretrained | None = None) -> None:
        """fill_id: the model's; reference: the frozen model of the KL term, if it is held to one."""
        self.trainer, self.config, self.fill_id = trainer, config, fill_id
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
            self.reference = trainer.build_policy(reference, config.rollout.temperature).to(trainer.accelerator.device)
            self.reference.requires_grad_(False)

    def documents(self, rollouts: list[ScoredRollout], step: int) -> list[Document]:
        """One document per response that trains something; `Document.response` indexes `rollouts`."""
        training = self.config.training
        documents = []
        for index, rollout in enumerate(rollouts):
            response = as_response(rollout, training.max_gen_length, self.block_size, self.fill_id)
            trace = self.trace(response, self.block_size, training, trace_generator(training.seed, step, rollout))
            document = build_document(index, response, trace, self.block_size)
            if document is not None:
                documents.append(document)
        return documents

    def __call__(self, rollouts: list[ScoredRollout], step: int) -> dict[str, float]:
        """All updates of RL step `step` (from 1) on `rollouts` (those that are trained, of all ranks, the same list on every rank)."""
        training = self.config.training
        documents = self.documents(rollouts, step)
        if not documents:
            return {}
        num_rows = sum(len(np.unique(d.trace.rank)) for d in documents)
        epochs, updates = update_plan(training, num_rows, self.trainer.accelerator.num_processes)
        generator = np.random.default_rng([training.seed, step])
        parts = [part for _ in range(epochs) for part in split_rows(documents, updates, generator)]
        # Log-probs that must be known before the first update changes the weights.
        before = [self.before_update(part, rollouts, several=len(parts) > 1) for part in parts]
        results: list[StepResult] = []
        for index, (part, (predictions, tables)) in enumerate(zip(parts, before, strict=True)):
            number(part)  # again: epochs share documents
            longest = max(r.num_response for r in rollouts)
            tables.weights = token_weights(predictions, training.loss_weighting, longest, self.config.rollout.max_response_length)
            tables.kl_weights = tables.weights
            progress = (step - 1 + index / len(parts)) / self.config.experiment.total_step
            results.append(self.trainer.step(part, tables, self.objective, progress))
        return merge_results(results)

    def before_update(self, part: list[Document], rollouts: list[ScoredRollout], several: bool) -> tuple[Predictions, Tables]:
        """The predictions of a part and what is known of them before any weight moves."""
        training = self.config.training
        predictions = number(part)
        advantage = np.array([r.advantage for r in rollouts])[predictions.response]
        # Other slices than those that sampling saw have other log-probs: there is nothing to compare with.
        engine = gather_tokens([r.logprobs for r in rollouts], predictions) if self.follows_steps else None
        old = None
        if training.old_logprobs == "engine":
            old = engine
        elif training.old_logprobs == "trainer" or (training.old_logprobs == "auto" and several):
            old = self.trainer.logprobs(part, len(predictions))
        kl = None
        if self.reference is not None:
            kl = self.trainer.logprobs(part, len(predictions), self.reference)
        empty = np.zeros(0)
        return predictions, Tables(advantage, empty, empty, old_logprobs=old, kl_logprobs=kl, engine_logprobs=engine)


def gather_tokens(values: list[list[float]], predictions: Predictions) -> np.ndarray:
    """Per-response lists of per-token values -> the value of every prediction."""
    starts = np.cumsum([0] + [len(v) for v in values])
    flat = np.concatenate([np.asarray(v, dtype=np.float64) for v in values]) if values else np.zeros(0)
    return flat[starts[predictions.response] + predictions.offset]

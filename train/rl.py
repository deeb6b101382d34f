"""The update of one RL step: scored rollouts -> slices -> optimizer steps along the very steps of the unmasking."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np

from common.errors import UserError
from common.records import ScoredRollout
from models.checkpoint import Pretrained
from train.documents import Document, Predictions, draw_rows, number, rows_of_any, split_rows
from train.gap import SampledGap
from train.layout import warn_of_repeats
from train.loop import Tables, Trainer, merge_results
from train.objectives import OBJECTIVES, kl_weights, token_weights
from train.policy import Policy, build_policy
from train.shared_value import SharedValueUpdate
from train.traces import Response
from train.value import ValueUpdate


def trace_generator(seed: int, step: int, rollout: ScoredRollout, *which: int) -> np.random.Generator:
    """What is drawn for a response depends on these alone, so a resumed run draws the same.

    which: nothing for the masks, the number of the update, from 1, for its rows.
    """
    return np.random.default_rng([seed, step, zlib.crc32(rollout.task_id.encode()), rollout.sample, *which])


def update_plan(training: Any, num_rows: int, num_processes: int) -> tuple[int, int]:
    """(epochs, optimizer steps in each) on one batch of rollouts: as set, or what the reference makes of its own settings:

    num_train_epochs times ceil(N / (batch_size_lm * gradient_accumulation_steps * processes)), N the number of pairs (response, k)
    that are trained in an epoch.
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
        self.layout = trainer.layout
        method = self.layout.method
        if not method.fits("rl"):
            raise UserError(f"training.method: {config.training.method} is for {method.stage}, this is rl: choose TraceRL")
        self.is_sampled = method.is_sampled(config.training, config.rollout, self.layout.attention)
        # Where the update's own slices say nothing of it.
        self.gap = None if self.is_sampled or not config.logging.gap_responses else SampledGap(trainer, config, fill_id)
        self.objective = OBJECTIVES.get(config.training.objective or method.objective_of("rl"), "training.objective")
        self.warned_of_repeats = False
        self.reference: Policy | None = None
        if reference is not None:
            self.reference = build_policy(reference, config, config.rollout.temperature).to(trainer.accelerator.device)
            self.reference.requires_grad_(False)

    def responses(self, rollouts: list[ScoredRollout]) -> list[Response]:
        return [self.layout.sampled(rollout, self.fill_id) for rollout in rollouts]

    def documents(self, rollouts: list[ScoredRollout], step: int) -> list[Document]:
        """One document per response that trains something, with all of its rows; `Document.response` indexes `rollouts`."""
        seed = self.config.training.seed
        documents = (
            self.layout.document(index, response, trace_generator(seed, step, rollout))
            for index, (rollout, response) in enumerate(zip(rollouts, self.responses(rollouts), strict=True))
        )
        return [document for document in documents if document is not None]

    def __call__(self, rollouts: list[ScoredRollout], step: int) -> dict[str, float]:
        """All updates of RL step `step` (from 1) on `rollouts`: those that are trained, of all ranks, the same list on each."""
        training = self.config.training
        documents = self.documents(rollouts, step)
        if not documents:
            return {}
        if self.trainer.accelerator.is_main_process and not self.warned_of_repeats:
            longest_document = max(documents, key=lambda document: document.num_tokens)
            self.warned_of_repeats = warn_of_repeats(longest_document, training.max_tokens_per_microbatch)
        predictions = number(documents)
        max_rows = training.max_rows_per_response
        num_rows = sum(d.num_rows if max_rows is None else min(d.num_rows, max_rows) for d in documents)
        epochs, updates = update_plan(training, num_rows, self.trainer.accelerator.num_processes)
        generator = np.random.default_rng([training.seed, step])
        parts = [part for _ in range(epochs) for part in split_rows(documents, updates, generator)]

        def drawn_rows(part: list[Document], update: int) -> tuple[list[Document], list[float]]:
            return draw_rows(part, max_rows, lambda d: trace_generator(training.seed, step, rollouts[d.response], update))

        # Each update draws its own rows, and its loss stands for that of its whole part.
        draws = [drawn_rows(part, update) for update, part in enumerate(parts, start=1)]
        # Whatever must be known before the first update changes the weights.
        trained = rows_of_any(documents, [drawn for drawn, _ in draws])
        tables = self.before_update(trained, predictions, rollouts, several=len(parts) > 1)
        objective, critic, metrics = self.objective, None, {} if self.gap is None else self.gap(rollouts, step)
        if self.value is not None:
            tables.advantages, critic, own = self.value.advantages(rollouts, self.responses(rollouts), documents, predictions)
            metrics |= own
            tables, objective = self.value.join(tables, critic, objective)
        longest = min(training.max_gen_length, max(r.num_response for r in rollouts))
        results, value_results = [], []
        for index, (part, (drawn, factors)) in enumerate(zip(parts, draws, strict=True)):
            tables.weights, tables.kl_weights = self.weights(part, predictions, longest)
            for document, factor in zip(drawn, factors, strict=True):
                tables.weights[document.numbers] *= factor
                tables.kl_weights[document.numbers] *= factor
            tables.is_first = not any(result.is_taken for result in results)
            progress = (step - 1 + index / len(parts)) / self.config.experiment.total_step
            if self.value is not None and self.value.is_due(step):
                value_results += self.value.step(drawn, critic, tables.weights, progress)
            results.append(self.trainer.step(drawn, tables, objective, progress))
        return {**merge_results(results), **merge_results(value_results, "value"), **metrics}

    def weights(self, part: list[Document], p: Predictions, longest: int) -> tuple[np.ndarray, np.ndarray]:
        """Weights of the losses and of the KL of one update, each [M] over all predictions, 0 outside its `part` of the rows."""
        own = np.concatenate([d.numbers for d in part])
        selected, weighting, attention = p.select(own), self.config.training.loss_weighting, self.layout.attention
        loss = token_weights(selected, weighting, longest, self.config.training.max_gen_length, attention)
        weights = []
        for values in (loss, kl_weights(selected, loss, weighting, attention)):
            weights.append(np.zeros(len(p)))
            weights[-1][own] = values
        return weights[0], weights[1]

    def before_update(self, documents: list[Document], p: Predictions, rollouts: list[ScoredRollout], several: bool) -> Tables:
        """What is known of the predictions of `documents` before any weight moves (the weights of their losses come part by part).
        Tables are over all predictions `p`; what a prediction that is never trained would need is left at 0."""
        training = self.config.training
        advantages = np.array([r.advantage for r in rollouts])[p.response]
        # Other slices than those that sampling saw have other log-probs: there is nothing to compare with.
        engine = gather_tokens([r.logprobs for r in rollouts], p) if self.is_sampled else None
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

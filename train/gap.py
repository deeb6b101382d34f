"""How far the engine's log-probabilities are from the trainer's, while the weights are those that sampled.

Of the update's own predictions it costs nothing (train/loop.py), where their slices are those that sampling saw. Joined steps,
random masks and other blocks are not: then a few responses are laid out once more, along their own steps, and looked at before the
update. It is rounding alone wherever the cache is exact; what an approximate cache of canvases has done to log-probs shows here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.records import ScoredRollout
from train.documents import draw_rows, number
from train.layout import Layout
from train.objectives import Measures, kl_estimate

ROWS = 8
"""Of a response at most, drawn anew in every step: a row of a canvas costs all of its tokens."""


def gap_measures(logprobs: Tensor, engine: Tensor) -> Measures:
    """Of log-probs [M], the trainer's and the engine's: |difference|, summed and largest; the k3 estimate of KL(engine, trainer)
    summed."""
    gap = logprobs - engine
    k3 = kl_estimate(-gap, torch.zeros_like(gap), k3=True)
    return Measures(
        {"gap/logprob_mean": gap.abs().sum(), "gap/k3": k3.sum()},
        {"gap/logprob_max": gap.abs().max()},
    )


class SampledGap:
    """The gap on a few responses, along the steps in which they were sampled."""

    def __init__(self, trainer: Any, config: Any, fill_id: int) -> None:
        """trainer: of the policy; fill_id: the model's."""
        rollout = config.rollout
        along_steps = dataclasses.replace(
            config.training, method="TraceRL", shrink=1, block_size=rollout.block_size, max_gen_length=rollout.max_token
        )
        self.trainer, self.fill_id, self.layout = trainer, fill_id, Layout(trainer.layout.attention, along_steps)
        self.seed, self.num_responses = config.training.seed, config.logging.gap_responses

    def __call__(self, rollouts: list[ScoredRollout], step: int) -> dict[str, float]:
        """gap/* of RL step `step`, the same on every rank; `rollouts`: as of `PolicyUpdate`. All ranks together."""
        chosen = np.unique(np.linspace(0, len(rollouts) - 1, self.num_responses).round().astype(int)).tolist()
        generator = np.random.default_rng([self.seed, step])
        laid_out = [
            self.layout.document(index, self.layout.sampled(rollouts[index], self.fill_id), generator) for index in chosen
        ]
        documents = [document for document in laid_out if document is not None]
        if not documents:
            return {}
        predictions = number(documents)
        drawn, _ = draw_rows(documents, ROWS, lambda document: generator)
        numbers = np.concatenate([document.numbers for document in drawn])
        trainer = self.trainer.outputs(drawn, len(predictions))[numbers]
        p = predictions.select(numbers)
        engine = np.array([rollouts[response].logprobs[offset] for response, offset in zip(p.response, p.offset)])
        measures = gap_measures(*(torch.as_tensor(values, dtype=torch.float64) for values in (trainer, engine)))
        means = {name: float(total) / len(numbers) for name, total in measures.sums.items()}
        return means | {name: float(value) for name, value in measures.extremes.items()}

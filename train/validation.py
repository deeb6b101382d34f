"""The validation loss: held-out responses under masks that are the same every time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from common.errors import UserError
from train.loop import Trainer
from train.objectives import token_weights
from train.packing import Document, build_document, number
from train.traces import Response, TraceMethod

VALIDATION = 1
"""Keys the validation masks apart from those of training."""


def build_documents(responses: list[Response], trace: TraceMethod, training: Any, key: list[int]) -> list[Document]:
    """One document per response that trains something; masks are a function of the seed, `key` and the place in the list."""
    documents = []
    for place, response in enumerate(responses):
        generator = np.random.default_rng([training.seed, *key, place])
        document = build_document(place, response, trace(response, training.block_size, training, generator), training.block_size)
        if document is not None:
            documents.append(document)
    return documents


class Validation:
    """Holds the masked documents; called, it gives their loss under the current weights. All ranks together."""

    def __init__(self, responses: list[Response], trace: TraceMethod, training: Any) -> None:
        # Step 0 is no step of training, whose keys are (seed, step, place).
        self.documents = build_documents(responses, trace, training, [0, VALIDATION])
        if not self.documents:
            raise UserError("the validation data trains nothing: every response is empty, or training.upper_p too low")
        predictions = number(self.documents)
        longest = max(len(response.response_ids) for response in responses)
        self.weights = token_weights(predictions, training.loss_weighting, longest, training.max_gen_length)

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        """validation_loss: as the training loss is counted. validation_nll: mean over predicted tokens of -log p, nats.
        validation_perplexity: its exponential."""
        logprobs = trainer.outputs(self.documents, len(self.weights)).astype(np.float64)
        nll = -float(logprobs.mean())
        return {
            "eval/validation_loss": -float((self.weights * logprobs).sum()),
            "eval/validation_nll": nll,
            "eval/validation_perplexity": math.exp(min(nll, 700.0)),
        }

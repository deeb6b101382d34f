"""The validation loss: held-out responses under masks that are the same every time."""

from __future__ import annotations

import math

import numpy as np

from common.errors import UserError
from train.documents import Document, Predictions, draw_rows, number
from train.layout import Layout
from train.loop import Trainer
from train.objectives import token_weights
from train.traces import Response

VALIDATION = 1
"""Keys the validation masks apart from those of training."""
ROWS = 1
"""Keys what is drawn of a response's rows apart from its masks."""


def build_documents(responses: list[Response], layout: Layout, key: list[int]) -> list[Document]:
    """One document per response that trains something; masks are a function of the seed, `key` and the place in the list."""
    documents = (
        layout.document(place, response, np.random.default_rng([layout.training.seed, *key, place]))
        for place, response in enumerate(responses)
    )
    return [document for document in documents if document is not None]


def drawn_and_weighted(
    documents: list[Document], p: Predictions, longest: int, layout: Layout, key: list[int]
) -> tuple[list[Document], np.ndarray]:
    """The rows of a batch that are computed (`training.max_rows_per_response`), and the weight of every prediction [M].

    p: of `number(documents)`; longest: response of the batch, tokens; key: as in `build_documents`.
    """
    training = layout.training
    weights = token_weights(p, training.loss_weighting, longest, training.max_gen_length, layout.attention)

    def generator(document: Document) -> np.random.Generator:
        return np.random.default_rng([training.seed, *key, document.response, ROWS])

    drawn, factors = draw_rows(documents, training.max_rows_per_response, generator)
    for document, factor in zip(drawn, factors, strict=True):
        weights[document.numbers] *= factor
    return drawn, weights


class Validation:
    """Holds the masked documents; called, it gives their loss under the current weights. All ranks together."""

    def __init__(self, responses: list[Response], layout: Layout) -> None:
        # Step 0 is no step of training, whose keys are (seed, step, place).
        key = [0, VALIDATION]
        documents = build_documents(responses, layout, key)
        if not documents:
            raise UserError("the validation data trains nothing: every response is empty, or training.upper_p too low")
        predictions = number(documents)
        longest = max(len(response.response_ids) for response in responses)
        self.documents, weights = drawn_and_weighted(documents, predictions, longest, layout, key)
        self.own = np.concatenate([document.numbers for document in self.documents])
        self.weights = weights[self.own]
        self.num_predictions = len(predictions)

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        """validation_loss: as the training loss is counted. validation_nll: mean over predicted tokens of -log p, nats.
        validation_perplexity: its exponential."""
        logprobs = trainer.outputs(self.documents, self.num_predictions)[self.own].astype(np.float64)
        nll = -float(logprobs.mean())
        return {
            "eval/validation_loss": -float((self.weights * logprobs).sum()),
            "eval/validation_nll": nll,
            "eval/validation_perplexity": math.exp(min(nll, 700.0)),
        }

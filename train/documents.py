"""Documents: what a batch of responses is made of before it is packed (train/packing.py), and their predictions.

A document is one response: its clean sequence once, then the slices that train it, B tokens each. Rows of it may be drawn, split
over updates, or cut into parts that carry the clean text that their slices see. Every prediction (one token predicted by one slice)
is numbered over the whole batch, so that advantages, old log-probs and weights are plain arrays over predictions, whatever the
packing.

Shapes: S slices, B block size, M predictions.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Callable

import numpy as np

from train.traces import Response, Trace


@dataclass
class Document:
    """One response (or a part of its slices) as tokens."""

    response: int
    """Index of the response in its batch."""
    ids: np.ndarray
    """Prompt and response, clean."""
    prompt_length: int
    block_size: int
    trace: Trace
    numbers: np.ndarray
    """Number of each of its predictions in its batch, in slice order."""

    @property
    def num_clean(self) -> int:
        """Clean tokens that some slice sees: nobody reads the clean copy of the last slice's block."""
        return int(self.trace.block.max()) * self.block_size

    @property
    def num_tokens(self) -> int:
        return self.num_clean + self.num_slice_tokens

    @property
    def prefix(self) -> bytes | None:
        """What documents may share: the prompt's whole blocks, which see no token of the response; None: nothing.

        The last (prompt length) % B prompt tokens stand in a block that sees the response, so every document has its own.
        """
        length = self.prompt_length // self.block_size * self.block_size
        return self.ids[:length].tobytes() if length and self.num_clean else None

    @property
    def num_slice_tokens(self) -> int:
        return 0 if self.trace.reads_clean else len(self.trace.block) * self.block_size

    @property
    def num_predictions(self) -> int:
        return int(self.trace.predicted.sum())

    @property
    def num_rows(self) -> int:
        """Pairs (response, k): what the reference counts as rows."""
        return len(np.unique(self.trace.rank))

    def select(self, keep: np.ndarray) -> Document:
        """A part of the slices (ascending indices or bool over S); its predictions keep their numbers."""
        kept = np.zeros(len(self.trace.block), bool)
        kept[keep] = True
        numbers = self.numbers[kept[self.trace.predicted.nonzero()[0]]]
        return Document(self.response, self.ids, self.prompt_length, self.block_size, self.trace.select(keep), numbers)


@dataclass
class Predictions:
    """Arrays over all predictions of a list of documents, in order."""

    response: np.ndarray
    """Index of the response."""
    offset: np.ndarray
    """Position in the response, 0 = first response token."""
    rank: np.ndarray
    """k of the pair (response, k)."""
    slice: np.ndarray
    """Number of the slice over all documents: the tokens of one collapsed step of one block share it."""
    weight: np.ndarray
    """The trace method's own factor on the loss."""

    def __len__(self) -> int:
        return len(self.response)

    def select(self, keep: np.ndarray) -> Predictions:
        return Predictions(*(getattr(self, f.name)[keep] for f in fields(self)))


def build_document(index: int, response: Response, trace: Trace, block_size: int) -> Document | None:
    """The document of one response, slices in block order, numbered as if alone; None where nothing of it is trained."""
    if not len(trace.block):
        return None
    order = np.lexsort((trace.rank, trace.block))
    ids = np.concatenate([response.prompt_ids, response.response_ids]).astype(np.int64)
    return Document(index, ids, len(response.prompt_ids), block_size, trace.select(order), np.arange(trace.predicted.sum()))


def number(documents: list[Document]) -> Predictions:
    """Number the predictions of a batch in order (sets `Document.numbers`) and say what each of them is."""
    columns: dict[str, list[np.ndarray]] = {f.name: [] for f in fields(Predictions)}
    first_prediction = first_slice = 0
    for document in documents:
        trace, size = document.trace, document.block_size
        row, column = trace.predicted.nonzero()
        columns["response"].append(np.full(len(row), document.response))
        columns["offset"].append(trace.block[row] * size + column - document.prompt_length)
        columns["rank"].append(trace.rank[row])
        columns["slice"].append(row + first_slice)
        columns["weight"].append(trace.weight[row])
        document.numbers = first_prediction + np.arange(len(row))
        first_prediction += len(row)
        first_slice += len(trace.block)
    return Predictions(*(np.concatenate(c) if c else np.zeros(0, np.int64) for c in columns.values()))


def split_rows(documents: list[Document], num_parts: int, generator: np.random.Generator) -> list[list[Document]]:
    """Cut the rows, the pairs (response, k), of a batch into parts of nearly equal size, one for each update.

    Responses come in random order and rows of one response stay together where the cuts allow, for its clean copy is paid once
    in every part that holds a row of it.
    """
    if num_parts <= 1:
        return [documents]
    order = generator.permutation(len(documents))
    ranks = [np.unique(documents[i].trace.rank) for i in order]
    num_rows = sum(len(r) for r in ranks)
    num_parts = min(num_parts, num_rows)
    bounds = np.linspace(0, num_rows, num_parts + 1).round().astype(int)
    parts: list[list[Document]] = [[] for _ in range(num_parts)]
    row = 0
    for i, own in zip(order, ranks, strict=True):
        part_of_row = np.searchsorted(bounds, np.arange(row, row + len(own)), side="right") - 1
        for part in np.unique(part_of_row):
            parts[part].append(documents[i].select(np.isin(documents[i].trace.rank, own[part_of_row == part])))
        row += len(own)
    return parts


def draw_rows(
    documents: list[Document], max_rows: int | None, generator: Callable[[Document], np.random.Generator]
) -> tuple[list[Document], list[float]]:
    """At most `max_rows` of every document's rows, the pairs (response, k), and every document's factor rows/drawn on its weights.

    Every row is drawn with the same probability drawn/rows (without replacement), so with the factor a sum over the drawn rows has
    the sum over all of them as its expectation, as long as the weights are those of all rows (normalisers counted before drawing).
    generator: of each document, for no other draw may depend on how many there are.
    """
    drawn, factors = [], []
    for document in documents:
        ranks = np.unique(document.trace.rank)
        factor = 1.0
        if max_rows is not None and len(ranks) > max_rows:
            kept = generator(document).choice(ranks, max_rows, replace=False)
            factor = len(ranks) / max_rows
            document = document.select(np.isin(document.trace.rank, kept))
        drawn.append(document)
        factors.append(factor)
    return drawn, factors


def rows_of_any(documents: list[Document], parts: list[list[Document]]) -> list[Document]:
    """Of `documents` the rows that some of `parts`, drawn or split from them, holds."""
    ranks: dict[int, list[np.ndarray]] = {}
    for document in (document for part in parts for document in part):
        ranks.setdefault(document.response, []).append(document.trace.rank)
    kept = [(d, np.isin(d.trace.rank, np.concatenate(ranks[d.response]))) for d in documents if d.response in ranks]
    return [d if keep.all() else d.select(keep) for d, keep in kept]


def split_long(document: Document, max_tokens: int) -> list[Document]:
    """Parts of at most `max_tokens` tokens: each carries the clean prefix that its slices see, so the sum of losses is the same.

    A part always holds one slice, though it alone be longer than the budget. Without slices there is nothing to leave out.
    """
    if document.num_tokens <= max_tokens or document.trace.reads_clean:
        return [document]
    block, size = document.trace.block, document.block_size
    parts, start = [], 0
    while start < len(block):
        # Slices are in block order, so the clean prefix of slices start..end is that of the last one.
        tokens = block[start:] * size + np.arange(1, len(block) - start + 1) * size
        end = start + max(1, int(np.searchsorted(tokens, max_tokens, side="right")))
        parts.append(document.select(np.arange(start, end)))
        start = end
    return parts


def prefix_length(prefix: bytes | None) -> int:
    """Tokens of a `Document.prefix`."""
    return 0 if prefix is None else len(prefix) // np.dtype(np.int64).itemsize

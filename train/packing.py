"""Packing: documents -> micro-batches of packed rows, for every rank (DESIGN, "Packed traces").

Documents (train/documents.py) share a row of `max_tokens` tokens and do not see each other, but those whose prompts are the same
may share one clean copy of its whole blocks (`share_prompts`). Where the slices see no clean text (full attention: a slice is a
whole canvas) each of them is packed as a document of its own; plain next-token predictions need no slices.

Shapes: S slices, B block size, N tokens of a pack, M predictions of a pack.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import TILE, TokenIds, WholeDocuments
from train.documents import Document, prefix_length, split_long

GAIN = 0.03
"""The share of its time that an update has to gain by cutting documents for the ranks' sake."""
NUM_CUTS = 5
"""Lengths of parts that are tried."""


def assign(documents: list[Document], max_tokens: int, num_ranks: int, share_prompts: bool = False) -> list[list[list[Document]]]:
    """Documents -> for every rank a list of micro-batches, the same number on each: [rank][micro-batch][document].

    As few micro-batches per rank as hold the tokens, and these filled evenly: parts go, longest first, to the one with the fewest
    tokens. Of few long documents the ranks that have none would wait for the others: they are cut further where that makes up for
    the clean text that every part repeats. With fewer parts than ranks a rank is left with an empty micro-batch. share_prompts: as
    `build_pack` is going to.
    """
    parts = [part for document in documents for part in split_long(document, max_tokens)]
    bins = fill(parts, max_tokens, num_ranks, share_prompts)
    best, even = slowest(bins, num_ranks, share_prompts), sum(num_tokens(b, share_prompts) for b in bins) / num_ranks
    longest, share = max((part.num_tokens for part in parts), default=0), even * num_ranks / max(1, len(bins))
    if num_ranks == 1 or longest <= share or best * (1 - GAIN) <= even:
        return [bins[rank::num_ranks] for rank in range(num_ranks)]
    best *= 1 - GAIN
    for limit in np.geomspace(share, longest, NUM_CUTS + 1)[:-1]:  # rounded: processors differ in its last digit, ranks may not
        cut = [part for d in documents for part in split_long(d, min(max_tokens, shortest_cut(d, round(limit), num_ranks)))]
        others = fill(cut, max_tokens, num_ranks, share_prompts)
        if (least := slowest(others, num_ranks, share_prompts)) < best:
            bins, best = others, least
    return [bins[rank::num_ranks] for rank in range(num_ranks)]


def shortest_cut(document: Document, limit: int, num_ranks: int) -> int:
    """`limit`, or as much more as leaves about as many parts as there are ranks: a part takes whole slices."""
    return max(limit, document.num_clean + -(-document.num_slice_tokens // num_ranks))


def num_tokens(documents: list[Document], share_prompts: bool) -> int:
    """Of their pack."""
    return sum(d.num_tokens for d in documents) - saved_by_sharing([d.prefix if share_prompts else None for d in documents])


def slowest(bins: list[list[Document]], num_ranks: int, share_prompts: bool) -> int:
    """Tokens that a step takes as long as: of every micro-batch those of the rank that has most, as ranks wait for each other."""
    loads = [num_tokens(documents, share_prompts) for documents in bins]
    return sum(max(loads[first : first + num_ranks]) for first in range(0, len(loads), num_ranks))


def fill(parts: list[Document], max_tokens: int, num_ranks: int, share_prompts: bool) -> list[list[Document]]:
    """Parts of at most `max_tokens` -> micro-batches, of every rank the first, then of every rank the second, ..."""
    parts = sorted(parts, key=lambda d: -d.num_tokens)  # stable: equal ones stay in order
    prefixes = [part.prefix if share_prompts else None for part in parts]
    total = num_tokens(parts, share_prompts)
    per_rank = -(-total // (max_tokens * num_ranks))
    while (bins := deal(parts, prefixes, max_tokens, per_rank * num_ranks, total)) is None:
        per_rank += 1
    return bins


def saved_by_sharing(prefixes: list[bytes | None]) -> int:
    """Tokens that documents with these prefixes save by sharing them."""
    return sum(map(prefix_length, prefixes)) - sum(map(prefix_length, set(prefixes)))


def deal(
    parts: list[Document], prefixes: list[bytes | None], max_tokens: int, num_bins: int, num_tokens: int
) -> list[list[Document]] | None:
    """Parts, longest first, each into the bin with the fewest tokens; None where one does not fit.

    A part with a prefix goes to a bin that holds it already, as long as that one stays below its share of `num_tokens`: there it
    costs less, and no bin becomes fuller than another by it. A part that alone is longer than `max_tokens` (one slice with its
    clean text) fits into an empty bin.
    """
    bins: list[list[Document]] = [[] for _ in range(num_bins)]
    loads = [0] * num_bins
    emptiest = [(0, i) for i in range(num_bins)]  # a heap; entries of bins that have grown since are passed over
    holders: dict[bytes, list[int]] = {}
    share = min(max_tokens, -(-num_tokens // max(1, num_bins)))
    for part, prefix in zip(parts, prefixes, strict=True):
        holding = holders.setdefault(prefix, []) if prefix is not None else []
        cost = part.num_tokens - prefix_length(prefix)
        i = min(holding, key=lambda n: loads[n], default=None)
        if i is None or loads[i] + cost > share:
            while emptiest[0][0] != loads[emptiest[0][1]]:
                heapq.heappop(emptiest)
            least = emptiest[0][1]
            if not loads[least] or loads[least] + part.num_tokens <= max_tokens:
                i = least
            elif i is None or loads[i] + cost > max_tokens:
                return None
        if prefix is None or i not in holding:
            holding.append(i)
            cost = part.num_tokens
        bins[i].append(part)
        loads[i] += cost
        heapq.heappush(emptiest, (loads[i], i))
    return bins


@dataclass
class Pack:
    """One micro-batch on the device."""

    input_ids: Tensor
    """[N]"""
    positions: Tensor
    """[N]"""
    token_ids: TokenIds
    """Who sees whom."""
    rows: Tensor
    """[M] the token whose hidden state predicts."""
    targets: Tensor
    """[M] the id that it predicts."""
    prediction: Tensor
    """[M] number of the prediction in the batch; -1: a filler that must not count (an empty micro-batch)."""
    num_filler: int = 0
    """Tokens that only round the pack up."""
    num_shared: int = 0
    """Tokens that it would have more if its documents did not share their prompts."""

    def to(self, device: torch.device | str) -> Pack:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved |= {name: x.to(device, non_blocking=True) for name, x in moved.items() if isinstance(x, Tensor)}
        return Pack(**{**moved, "token_ids": self.token_ids.to(device)})


def by_prefix(documents: list[Document], share_prompts: bool) -> list[tuple[bytes | None, list[Document]]]:
    """(prefix, its documents) in order of first appearance; those that share with no other are alone, under None."""
    groups: dict[Any, list[Document]] = {}
    for index, document in enumerate(documents):
        prefix = document.prefix if share_prompts else None
        groups.setdefault(index if prefix is None else prefix, []).append(document)
    return [(key if len(group) > 1 else None, group) for key, group in groups.items()]


class Columns:
    """The tokens of a pack as they are laid down, column by column."""

    def __init__(self) -> None:
        self.columns: dict[str, list[np.ndarray]] = {}
        self.num_tokens = self.num_documents = 0

    def tokens(self, document: np.ndarray, prefix: np.ndarray | None = None, **columns: np.ndarray) -> int:
        """Lay tokens [n] down behind the others; returns the place of the first.

        document: their documents [n], counted from 0: of new ones; prefix: the documents that these share, if any.
        """
        start, first = self.num_tokens, self.num_documents
        document = first + document
        columns = {**columns, "document": document, "prefix": document if prefix is None else prefix}
        self.num_tokens += len(document)
        self.num_documents = int(document[-1]) + 1 if len(document) else first
        self.add(**columns)
        return start

    def add(self, **columns: np.ndarray) -> None:
        for name, values in columns.items():
            self.columns.setdefault(name, []).append(values)

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(np.concatenate(self.columns[name]).astype(np.int64))


def build_pack(
    documents: list[Document],
    mask_id: int,
    round_to: int = 1,
    logit_shift: int = 0,
    share_prompts: bool = False,
    attended_length: int = 0,
) -> Pack:
    """Lay documents into one row. `round_to`: the row is filled up to a multiple of it, so that compiled kernels see few sizes;
    `attended_length`: as in models/attention.py.

    logit_shift: a token is predicted by the row so many positions before its own: of its slice, or of the clean text before it. At
    position 0 there is none, and its own row predicts it, as Dream aligns its logits (sampling refuses an empty prompt).
    share_prompts: documents with the same `prefix` have one clean copy of it, a document of its own before theirs.

    An empty list makes a row of filler with one prediction that counts nothing: a rank without data still joins every collective.
    """
    out, num_shared = Columns(), 0
    for prefix, group in by_prefix(documents, share_prompts):
        shared_start, num_prefix, shared_id = 0, prefix_length(prefix), None
        if prefix is not None:
            position = np.arange(num_prefix)
            text, shared_id = group[0].ids[:num_prefix], out.num_documents
            zeros = np.zeros(num_prefix, np.int64)
            shared_start = out.tokens(zeros, input=text, position=position, block=position // group[0].block_size, slice=zeros)
            num_shared += num_prefix * (len(group) - 1)
        for document in group:
            lay_document(out, document, mask_id, logit_shift, num_prefix, shared_start, shared_id)
    filler = -out.num_tokens % round_to if documents else max(round_to, 1)
    if filler:
        # Nobody sees it. Documents of a tile each: few for a varlen backend, and no tile of a mask beside those on its diagonal.
        tile = (out.num_tokens + np.arange(filler)) // TILE
        zeros = np.zeros(filler, np.int64)
        out.tokens(tile - tile[0], input=np.full(filler, mask_id), position=zeros, block=zeros, slice=zeros + 1)
    if not documents:  # predict any id but the mask: a forbidden one has no finite log-prob
        out.add(row=np.zeros(1, np.int64), target=np.full(1, int(mask_id == 0)), prediction=np.full(1, -1))
    token_ids = TokenIds(out.tensor("document"), out.tensor("block"), out.tensor("slice"), attended_length=attended_length)
    if num_shared:
        token_ids.prefix = out.tensor("prefix")
    if not any(document.num_clean for document in documents):
        _, lengths = torch.unique_consecutive(token_ids.document, return_counts=True)
        starts = F.pad(lengths.cumsum(0), (1, 0)).int()
        token_ids.whole = WholeDocuments(starts, int(lengths.max()))
    return Pack(
        input_ids=out.tensor("input"),
        positions=out.tensor("position"),
        token_ids=token_ids,
        rows=out.tensor("row"),
        targets=out.tensor("target"),
        prediction=out.tensor("prediction"),
        num_filler=filler,
        num_shared=num_shared,
    )


def lay_document(
    out: Columns,
    document: Document,
    mask_id: int,
    logit_shift: int,
    num_prefix: int,
    shared_start: int,
    shared_id: int | None,
) -> None:
    """Lay one document down: its clean text from position `num_prefix` on, then its slices in block order (the other order, block
    by block, takes FlexAttention twice as long); and its predictions. What is before stands at `shared_start`, in document
    `shared_id`."""
    trace, size, num_clean = document.trace, document.block_size, document.num_clean
    num_slices = 0 if trace.reads_clean else len(trace.block)
    slice_positions = trace.block[:, None] * size + np.arange(size)  # [S, B]
    clean = document.ids[slice_positions]
    noisy = np.where(trace.hidden, mask_id, clean)
    own = np.arange(num_prefix, num_clean)
    num_tokens = len(own) + num_slices * size
    # Slices that see no clean text see nothing but themselves: as documents of their own a dense mask holds [B, B] for each.
    start = out.tokens(
        np.zeros(num_tokens, np.int64) if num_clean else np.repeat(np.arange(num_slices), size),
        None if shared_id is None else np.full(num_tokens, shared_id),
        input=np.concatenate([document.ids[own], noisy[:num_slices].ravel()]),
        position=np.concatenate([own, slice_positions[:num_slices].ravel()]),
        block=np.concatenate([own // size, np.repeat(trace.block[:num_slices], size)]),
        slice=np.concatenate([np.zeros(len(own), np.int64), np.repeat(np.arange(1, num_slices + 1), size)]),
    )
    row, column = trace.predicted.nonzero()
    position = slice_positions[row, column] - logit_shift
    in_text = np.where(position < num_prefix, shared_start + position, start + position - num_prefix)
    in_slice = start + len(own) + row * size + np.maximum(column - logit_shift, 0)
    reads_clean = (column < logit_shift) & (position >= 0)
    out.add(row=np.where(reads_clean, in_text, in_slice), target=clean[row, column], prediction=document.numbers)

"""Step maps of given text for full-attention models: in which order would the engine (sample/canvas.py) have unmasked the canvas?

As sample/steps_of_text.py, but a position sees the whole canvas, what is masked behind its block included: the blocks of a text
come one after another, and several texts are one packed row of documents. Exact: nothing is kept from one forward to the next.

Shapes: S texts of a row, B block size, N tokens of the row, M masked rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Callable

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from models.attention import TokenIds, attention_backend
from models.decoder import Decoder
from models.family import Family
from sample import noise
from sample.canvas_schedule import blocks_of, count_at, counts_of
from sample.engine import SamplingSettings
from sample.registry import UNMASKING
from sample.steps_of_text import Text, score_given
from sample.unmask import Candidates


class _Canvas:
    """One text while it is unmasked. Its response is the whole canvas."""

    def __init__(self, text: Text, settings: SamplingSettings, family: Family) -> None:
        if family.logit_shift and not text.prompt_ids:
            raise UserError(f"text {text.id} has an empty prompt, and {family.name} predicts a token from the one before it")
        self.ids = np.asarray([*text.prompt_ids, *text.response_ids], dtype=np.int64)
        self.prompt = self.start = len(text.prompt_ids)
        length, size = len(text.response_ids), settings.block_size
        self.blocks = blocks_of(length, size)
        self.counts = counts_of(family.canvas_schedule, length, size, settings.steps or length)
        self.opens_with_first = family.first_token_from_refresh
        self.block = self.step = self.forwards = 0
        self.steps = np.zeros(len(self.ids), dtype=np.int64)
        self.key = noise.sequence_key(settings.seed, text.id, 0)

    @property
    def is_done(self) -> bool:
        return self.block == len(self.blocks)

    def candidates(self, block_size: int) -> np.ndarray:
        """bool [B]: positions of the block that this forward may reveal."""
        size = self.blocks[self.block]
        masked = np.zeros(block_size, bool)
        masked[:size] = self.steps[self.start : self.start + size] == 0
        if self.opens_with_first and self.step == 0:
            masked[1:] = False
        return masked

    @property
    def count(self) -> int:
        return count_at(self.counts[self.block], self.step)

    def visible(self, mask_id: int) -> np.ndarray:
        """The canvas as the model sees it [P + L]."""
        is_hidden = (self.steps == 0) & (np.arange(len(self.ids)) >= self.prompt)
        return np.where(is_hidden, mask_id, self.ids)

    def reveal(self, revealed: np.ndarray) -> None:
        """revealed bool [B]."""
        size = self.blocks[self.block]
        self.step += 1
        own = self.steps[self.start : self.start + size]
        own[revealed[:size]] = self.forwards
        if (own > 0).all():
            self.block, self.step, self.start = self.block + 1, 0, self.start + size


@torch.no_grad()
def steps_of_canvases(
    decoder: Decoder,
    family: Family,
    texts: list[Text],
    settings: SamplingSettings,
    max_tokens: int = 16_384,
    backend: str = "dense",
    progress: Callable[[int], None] = lambda num_texts: None,
) -> list[list[int]]:
    """The step map of every text's response, which is a whole canvas: 1-based numbers of denoising forwards.

    settings: strategy, target, threshold, block size, steps of the canvas (None: a token per forward) and temperature as in
    sampling. max_tokens: of one forward (one text is never cut). progress: called with the number of finished texts. Raises
    UserError for a text without a prompt where logits are shifted.
    """
    settings = replace(settings, scores_unscaled=family.scores_unscaled)
    canvases = [_Canvas(text, settings, family) for text in texts]
    start = 0
    while start < len(canvases):
        end, tokens = start + 1, len(canvases[start].ids)
        while end < len(canvases) and tokens + len(canvases[end].ids) <= max_tokens:
            tokens += len(canvases[end].ids)
            end += 1
        while live := [canvas for canvas in canvases[start:end] if not canvas.is_done]:
            _forward(decoder, family, live, settings, backend)
        progress(end)
        start = end
    return [canvas.steps[canvas.prompt :].tolist() for canvas in canvases]


def _forward(decoder: Decoder, family: Family, live: list[_Canvas], settings: SamplingSettings, backend: str) -> None:
    """One forward over all of `live`, which reveals something of each."""
    device, lengths = decoder.device, np.array([len(canvas.ids) for canvas in live])
    first = lengths.cumsum() - lengths
    masked = np.stack([canvas.candidates(settings.block_size) for canvas in live])  # [S, B]
    of, offset = masked.nonzero()
    position = np.array([canvas.start for canvas in live])[of] + offset  # [M]
    for canvas in live:
        canvas.forwards += 1

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    document = tensor(np.repeat(np.arange(len(live)), lengths))
    ids = TokenIds(document, torch.zeros_like(document), torch.zeros_like(document))  # one block: all see all
    visible = np.concatenate([canvas.visible(settings.mask_id) for canvas in live])
    hidden = decoder(tensor(visible), tensor(np.concatenate([np.arange(n) for n in lengths])), attention_backend(backend, ids))
    keys = noise.row_keys(
        torch.tensor([live[n].key for n in of], dtype=torch.int32),
        torch.from_numpy(position),
        torch.tensor([live[n].forwards for n in of]),
    )
    targets = np.concatenate([canvas.ids for canvas in live])[first[of] + position]
    rows = hidden[tensor(first[of] + position - family.logit_shift)]
    score, entropy = score_given(decoder, rows, tensor(targets), keys.to(device), settings)

    at, grid = torch.from_numpy(masked), torch.zeros(2, *masked.shape)
    grid[:, at] = torch.stack([score, entropy]).cpu()
    counts = torch.tensor([canvas.count for canvas in live])
    reveal = UNMASKING.get(settings.strategy, "strategy")
    revealed = reveal(Candidates(at, *grid, counts, least=1), settings).numpy()
    assert revealed.any(axis=1).all(), "a strategy that reveals nothing never ends"
    for canvas, own in zip(live, revealed, strict=True):
        canvas.reveal(own)

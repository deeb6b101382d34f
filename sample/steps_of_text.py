"""Step maps of given text for block models: in which order would the engine have unmasked it? Full attention: steps_of_canvas.py.

The engine's denoising loop with the text's own tokens: at every forward the masked positions of a block are ranked by what the
model thinks of the *given* tokens there (`confidence`: their probability), the strategy says which to reveal, and the given tokens
are written. A block sees the clean text before it, as in sampling, so the blocks of a text do not depend on one another's order
and are all unmasked at once: one forward of a packed row (models/attention.py) per step, at most as many as a block has tokens.

Shapes: W blocks of one text, B block size, N tokens of a row, M masked rows, S blocks of all texts that are still masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from models.attention import TokenIds, attention_backend
from models.decoder import Decoder
from models.logits import scaled_logits
from sample import noise
from sample.engine import SamplingSettings
from sample.registry import TARGETS, UNMASKING
from sample.sampling import LOGITS_AT_A_TIME, Distribution, entropy_of
from sample.unmask import Candidates, schedule


@dataclass(frozen=True)
class Text:
    """A prompt and a given response, which end together at the end of a block."""

    id: str
    """Keys the random numbers (target `random`)."""
    prompt_ids: list[int]
    response_ids: list[int]


class _Unmasking:
    """One text on the block grid of absolute positions."""

    def __init__(self, text: Text, settings: SamplingSettings) -> None:
        size = settings.block_size
        self.ids = np.asarray([*text.prompt_ids, *text.response_ids], dtype=np.int64)
        if len(self.ids) % size:
            raise UserError(f"text {text.id} ends inside a block ({len(self.ids)} tokens, block size {size}): fill it up")
        self.prompt_length = len(text.prompt_ids)
        self.first_block = self.prompt_length // size
        self.positions = np.arange(self.first_block * size, len(self.ids)).reshape(-1, size)  # [W, B]
        self.masked = self.positions >= self.prompt_length
        self.step = np.zeros_like(self.positions)  # within the block, from 1
        self.key = noise.sequence_key(settings.seed, text.id, 0)

    @property
    def live(self) -> np.ndarray:
        """Blocks that are not done."""
        return np.flatnonzero(self.masked.any(axis=1))

    def step_map(self) -> list[int]:
        """Numbered over the whole text, as the engine counts the denoising forwards of a sequence."""
        steps = self.step.max(axis=1)
        whole = self.step + (steps.cumsum() - steps)[:, None]
        return whole[self.positions >= self.prompt_length].tolist()


@torch.no_grad()
def steps_of_texts(
    decoder: Decoder,
    texts: list[Text],
    settings: SamplingSettings,
    max_tokens: int = 16_384,
    backend: str = "dense",
    progress: Callable[[int], None] = lambda num_texts: None,
) -> list[list[int]]:
    """The step map of every text's response: 1-based numbers of denoising forwards.

    settings: strategy, target, threshold, block size, steps per block and temperature as in sampling; confidences are those before
    top-k and top-p. max_tokens: of one forward, two per token of text (one text is never cut). backend: rows have another size at
    every step, so FlexAttention would compile for each. progress: called with the number
    of finished texts. Raises UserError for a text that does not end at the end of a block.
    """
    states = [_Unmasking(text, settings) for text in texts]
    start = 0
    while start < len(states):
        end, tokens = start + 1, 2 * len(states[start].ids)
        while end < len(states) and tokens + 2 * len(states[end].ids) <= max_tokens:
            tokens += 2 * len(states[end].ids)
            end += 1
        _unmask(decoder, states[start:end], settings, backend)
        progress(end)
        start = end
    return [state.step_map() for state in states]


def _unmask(decoder: Decoder, states: list[_Unmasking], settings: SamplingSettings, backend: str) -> None:
    """Denoise all blocks of `states` together, in place."""
    device, size = decoder.device, settings.block_size
    counts = schedule(size, settings.num_steps)
    reveal = UNMASKING.get(settings.strategy, "strategy")
    step = 0
    while live := [state for state in states if state.masked.any()]:
        step += 1
        row = _row(live, settings)
        ids = TokenIds(*(x.to(device) for x in (row.document, row.block, row.slice)))
        hidden = decoder(row.input_ids.to(device), row.positions.to(device), attention_backend(backend, ids))
        keys = noise.row_keys(row.keys, row.positions[row.rows], torch.full((len(row.rows),), step)).to(device)
        score, entropy = score_given(decoder, hidden[row.rows.to(device)], row.targets.to(device), keys, settings)
        grid = torch.zeros(2, row.masked.numel())
        grid[:, row.masked.flatten()] = torch.stack([score, entropy]).cpu()
        score, entropy = grid.unflatten(1, row.masked.shape)  # [S, B]
        count = counts[min(step, len(counts)) - 1].expand(len(row.masked))
        revealed = reveal(Candidates(row.masked, score, entropy, count), settings).numpy()
        assert revealed.any(axis=1).all(), "a strategy that reveals nothing never ends"
        first = 0
        for state in live:
            blocks = state.live
            own = revealed[first : first + len(blocks)]
            first += len(blocks)
            state.step[blocks] = np.where(own, step, state.step[blocks])
            state.masked[blocks] &= ~own


@dataclass
class _Row:
    """Documents of clean text and one slice per live block, packed into one row; host tensors."""

    input_ids: Tensor
    positions: Tensor
    document: Tensor
    block: Tensor
    slice: Tensor
    rows: Tensor
    """[M] tokens that are masked."""
    targets: Tensor
    """[M] what stands there."""
    masked: Tensor
    """bool [S, B]"""
    keys: Tensor
    """int32 [M, 2], of the sequences."""


def _row(live: list[_Unmasking], settings: SamplingSettings) -> _Row:
    size, start = settings.block_size, 0
    columns: dict[str, list[Any]] = {name: [] for name in _Row.__annotations__}
    for number, state in enumerate(live):
        blocks = state.live
        # Nobody reads the clean copy of the last live block.
        num_clean = (state.first_block + int(blocks[-1])) * size
        positions, masked = state.positions[blocks], state.masked[blocks]
        noisy = np.where(masked, settings.mask_id, state.ids[positions])
        at = masked.ravel().nonzero()[0]
        columns["input_ids"] += [state.ids[:num_clean], noisy.ravel()]
        columns["positions"] += [np.arange(num_clean), positions.ravel()]
        columns["document"].append(np.full(num_clean + noisy.size, number))
        columns["block"] += [np.arange(num_clean) // size, np.repeat(state.first_block + blocks, size)]
        columns["slice"] += [np.zeros(num_clean, np.int64), np.repeat(np.arange(1, len(blocks) + 1), size)]
        columns["rows"].append(start + num_clean + at)
        columns["targets"].append(state.ids[positions.ravel()[at]])
        columns["masked"].append(masked)
        columns["keys"].append(np.tile(np.asarray(state.key, np.int32), (len(at), 1)))
        start += num_clean + noisy.size
    return _Row(**{name: torch.from_numpy(np.concatenate(parts)) for name, parts in columns.items()})


def score_given(
    decoder: Decoder, hidden: Tensor, targets: Tensor, keys: Tensor, settings: SamplingSettings
) -> tuple[Tensor, Tensor]:
    """The target [M] of the given tokens and the entropy [M] at masked rows, some rows at a time."""
    forbidden = torch.tensor(settings.forbidden_ids, device=hidden.device) if settings.forbidden_ids else None
    target = TARGETS.get(settings.target, "target")
    at_a_time = max(1, LOGITS_AT_A_TIME // decoder.config.vocab_size)
    scores, entropies = [], []
    for rows, tokens, row_keys in zip(hidden.split(at_a_time), targets.split(at_a_time), keys.split(at_a_time), strict=True):
        logits = decoder.lm_head(rows, lambda h, w: scaled_logits(h, w, settings.score_temperature, forbidden))
        logprobs = logits.log_softmax(-1)
        entropies.append(entropy_of(logprobs))
        scores.append(target(Distribution(logprobs, tokens, entropies[-1], row_keys)))
    return torch.cat(scores), torch.cat(entropies)

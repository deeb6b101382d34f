"""The update as the reference implementation does it, written plainly: what benchmarks/train_step.py compares with.

One response becomes R rows of P + 2L tokens: the prompt, the response, and a noisy copy of the response. R is the largest number
of steps in any of its blocks; row k masks in every block the tokens of the k-th step and later. Rows are padded to the longest
of their batch, attend through a dense mask, and logits of the whole vocabulary are computed at every position.

Blocks are cut on absolute positions (P is a multiple of the block size here), so that both ways compute the same numbers.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.decoder import Decoder
from train.traces import Response, dense_rank


@dataclass
class Row:
    response: int
    ids: np.ndarray
    """[T] prompt, response, noisy response."""
    predicted: np.ndarray
    """bool [L]"""
    prompt_length: int


def build_rows(responses: list[Response], block_size: int, mask_id: int) -> list[Row]:
    rows = []
    for index, r in enumerate(responses):
        assert len(r.prompt_ids) % block_size == 0
        rank = dense_rank(r.step_map.reshape(-1, block_size)).ravel()
        for k in range(int(rank.max()) + 1):
            noisy = np.where(rank >= k, mask_id, r.response_ids)
            predicted = (rank == k) & (np.arange(len(rank)) < r.num_trained)
            rows.append(Row(index, np.concatenate([r.prompt_ids, r.response_ids, noisy]), predicted, len(r.prompt_ids)))
    return rows


class Batch:
    """Rows padded to the longest, with their dense mask."""

    def __init__(self, rows: list[Row], block_size: int) -> None:
        self.rows = rows
        longest = max(len(r.ids) for r in rows)
        self.ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        self.positions = torch.zeros_like(self.ids)
        self.mask = torch.zeros(len(rows), 1, longest, longest, dtype=torch.bool)
        for n, row in enumerate(rows):
            length, prompt = len(row.ids), row.prompt_length
            response = (length - prompt) // 2
            self.ids[n, :length] = torch.from_numpy(row.ids)
            position = torch.cat([torch.arange(prompt + response), torch.arange(prompt, prompt + response)])
            self.positions[n, :length] = position
            block, noisy = position // block_size, torch.arange(length) >= prompt + response
            clean_keys = ~noisy[None, :] & torch.where(
                noisy[:, None], block[None, :] < block[:, None], block[None, :] <= block[:, None]
            )
            noisy_keys = noisy[None, :] & noisy[:, None] & (block[None, :] == block[:, None])
            self.mask[n, 0, :length, :length] = clean_keys | noisy_keys
            self.mask[n, 0, length:] = True  # padding sees everything: a softmax over nothing would be NaN

    def to(self, device: torch.device | str) -> Batch:
        moved = copy(self)
        moved.ids, moved.positions, moved.mask = (x.to(device, non_blocking=True) for x in (self.ids, self.positions, self.mask))
        return moved


def row_logprobs(decoder: Decoder, batch: Batch) -> list[Tensor]:
    """Log-probability of every response token [L], row by row, read from the noisy copy; logits are made at every position."""
    num_rows, longest = batch.ids.shape

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        q, k, v = (
            x.unflatten(0, (num_rows, longest)).transpose(1, 2)
            for x in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
        )
        return F.scaled_dot_product_attention(q, k, v, attn_mask=batch.mask).transpose(1, 2).flatten(0, 1)

    hidden = decoder(batch.ids.flatten(), batch.positions.flatten(), attend)
    logits = decoder.lm_head(hidden).unflatten(0, (num_rows, longest))  # [R, T, V]
    out = []
    for n, row in enumerate(batch.rows):
        length, prompt = len(row.ids), row.prompt_length
        response = (length - prompt) // 2
        targets = batch.ids[n, prompt : prompt + response]
        log_p = logits[n, prompt + response : length].float().log_softmax(-1)
        out.append(log_p.gather(1, targets[:, None])[:, 0])
    return out

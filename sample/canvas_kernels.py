"""The canvas engine on Triton kernels: what lies between the products of a layer is fused, and tokens are drawn from one pass over
the logits. Attention stays SDPA: a canvas is a rectangle of queries and keys without a mask, which it is best at.

Where the tensors are on the CPU the kernels' torch references run.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from models.decoder import Attend
from sample.canvas import CanvasEngine, CanvasGeneration
from sample.fused_forward import fused_forward
from sample.kernels.matmul import head_logits
from sample.kernels.rotary_store import rotary_table
from sample.kernels.sampler import draw_rows
from sample.sampling import Draws, in_parts


class KernelCanvasGeneration(CanvasGeneration):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        c, device, dtype = self.decoder.config, self.decoder.device, self.decoder.dtype
        self.rotary = rotary_table(self.length, c.head_dim, c.rope_theta, dtype, device)
        self.is_forbidden = torch.zeros(c.vocab_size, dtype=torch.bool, device=device)
        if self.forbidden is not None:
            self.is_forbidden[self.forbidden] = True
        if self.cache is None:  # nothing is stored
            stores = torch.empty(2, c.num_layers, 1, c.num_kv_heads, c.head_dim, dtype=dtype, device=device)
        else:
            stores = self.cache.k.flatten(1, 2), self.cache.v.flatten(1, 2)
        self.k_store, self.v_store = stores  # [layers, S*T, G, K]

    def forward(self, tokens: Tensor, positions: Tensor, entries: Tensor, attend: Attend) -> Tensor:
        entries = entries.int() if self.cache is not None else torch.full_like(entries, -1, dtype=torch.int32)
        return fused_forward(
            self.decoder, tokens, positions.int(), entries, self.k_store, self.v_store, self.rotary, attend, keep_kv=True
        )

    def draw(self, hidden: Tensor, keys: Tensor) -> Draws:
        def draw_some(rows: Tensor, keys: Tensor) -> Draws:
            return draw_rows(self.decoder.lm_head(rows, head_logits), keys, self.settings, self.is_forbidden)

        draws = in_parts(draw_some, hidden, keys, self.decoder.config.vocab_size)
        return dataclasses.replace(draws, tokens=draws.tokens.long())  # the kernel's are int32


class KernelCanvasEngine(CanvasEngine):
    """As CanvasEngine, faster on a GPU."""

    generation = KernelCanvasGeneration

"""From hidden states to the logits that engine and trainer share: one precision, one temperature, one set of forbidden ids."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 16_384
"""Of a product that is added to a large total."""


def matmul_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with a float32 result: on CUDA a bf16 product accumulated and written in float32 (log-probs 2e-5 off, not 7e-3)."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_matmul_float32(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, the product as `matmul_float32` makes it; total float32 [M, N], contiguous.

    A few rows at a time: beside a total of the size of the vocabulary's weights there is no room for a product of that size.
    """
    for start in range(0, len(total), ROWS):
        rows = slice(start, start + ROWS)
        total[rows] += matmul_float32(a[rows], b)


def scaled_logits(hidden: Tensor, weight: Tensor, temperature: float, forbidden: Tensor | None) -> Tensor:
    """float32 logits [M, V] of hidden [M, D], head weight [V, D], under the temperature; forbidden ids carry no probability."""
    logits = matmul_float32(hidden, weight.t())
    if temperature != 1.0:
        logits /= temperature
    if forbidden is not None:
        logits.index_fill_(1, forbidden, float("-inf"))
    return logits

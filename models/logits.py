"""From hidden states to the logits that engine and trainer share: one precision, one temperature, one set of forbidden ids."""

from __future__ import annotations

import torch
from torch import Tensor


def matmul_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with a float32 result: on CUDA a bf16 product accumulated and written in float32 (log-probs 2e-5 off, not 7e-3)."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def scaled_logits(hidden: Tensor, weight: Tensor, temperature: float, forbidden: Tensor | None) -> Tensor:
    """float32 logits [M, V] of hidden [M, D], head weight [V, D], under the temperature; forbidden ids carry no probability."""
    logits = matmul_float32(hidden, weight.t())
    if temperature != 1.0:
        logits /= temperature
    if forbidden is not None:
        logits.index_fill_(1, forbidden, float("-inf"))
    return logits

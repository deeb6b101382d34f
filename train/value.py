"""The value model's part of training: its loss."""

from __future__ import annotations

import torch
from torch import Tensor


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, eps: float) -> Tensor:
    """Clipped squared error of every token [M]: 0.5 max((v - R)^2, (v_old + clamp(v - v_old, -eps, eps) - R)^2)."""
    bounded = old_values + (values - old_values).clamp(-eps, eps)
    return 0.5 * torch.maximum((values - returns).square(), (bounded - returns).square())

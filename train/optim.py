"""Optimizer and learning rate.

bfloat16 weights always train under DeepSpeed, which keeps their float32 master copies (common/dist.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


def build_optimizer(module: nn.Module, config: Any, rate: float) -> torch.optim.Optimizer:
    """The optimizer of `config.optimizer` over the parameters that train. Matrices decay, vectors (norms, biases) do not."""
    settings = config.optimizer.params
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer.name == "sgd":
        return torch.optim.SGD(groups, lr=rate)
    return torch.optim.AdamW(groups, lr=rate, betas=(settings.beta1, settings.beta2), eps=settings.epsilon)


def learning_rate(peak: float, schedule: Any, progress: float, num_steps: int) -> float:
    """The rate of one optimizer step under the config's `lr_scheduler` section: linear warm-up, then decay over the whole run.

    progress: share of the run that is done, 0..1; num_steps: optimizer steps taken before this one.
    """
    warmup = min(1.0, (num_steps + 1) / max(1, schedule.params.warmup_steps))
    return peak * warmup * schedule_factor(schedule.scheduler, progress, schedule.params.min_lr_scale)


def schedule_factor(scheduler: str, progress: float, min_scale: float = 0.0) -> float:
    """Factor on the learning rate after a share `progress` of the whole run, 0..1. It ends at `min_scale`."""
    if scheduler == "constant":
        return 1.0
    left = {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[scheduler]
    return min_scale + (1 - min_scale) * left

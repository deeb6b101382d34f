"""What the tests of the update share: rollouts of tiny models, real configs, and one optimizer step with its gradient kept."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Iterator

import numpy as np
import torch
from torch import Tensor

from common import dist
from common.records import Rollout, ScoredRollout
from models.checkpoint import Pretrained
from models.registry import FAMILIES
from models.tiny import build_tiny
from sample.engine import Request, SamplingSettings, build_engine

STOP_IDS = (3, 17)
"""Common characters: responses of a random model stop early, and inside blocks."""


FULL_ATTENTION = ("llada", "dream")
"""Families whose slices are whole canvases: without a shift of logits and with one (and with biases)."""


def tiny_model(seed: int = 0, family: str = "sdar", **changes: Any) -> Pretrained:
    """A random model; the rows of its vocabulary beyond the tokenizer are forbidden, as the mask is."""
    model = build_tiny(FAMILIES.get(family), seed=seed, **{"vocab_size": 32, **changes})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            if name.endswith("bias"):  # zeros would hide that one is left out
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def requests_of_every_remainder(block_size: int, seed: int, num_samples: int = 1) -> list[Request]:
    """Prompts of block_size consecutive lengths, so of every remainder, and one that is shorter than a block."""
    generator = np.random.default_rng([seed, block_size])
    shortest = int(generator.integers(1, block_size + 2))
    lengths = [1, *range(shortest, shortest + block_size)]
    return [Request(f"task {n}", generator.integers(0, 25, length).tolist(), num_samples) for n, length in enumerate(lengths)]


def sample(model: Pretrained, requests: list[Request], max_active: int = 64, **settings: Any) -> list[Rollout]:
    """Rollouts of the family's engine."""
    facts = dict(mask_id=model.mask_id, stop_ids=STOP_IDS, forbidden_ids=tuple(model.forbidden_ids))
    return build_engine(model.decoder, model.family, max_active).generate(requests, SamplingSettings(**{**facts, **settings}))


def scored(rollouts: list[Rollout], seed: int = 0) -> list[ScoredRollout]:
    """With random advantages."""
    advantages = np.random.default_rng(seed).normal(size=len(rollouts))
    return [ScoredRollout(**vars(r), advantage=float(a)) for r, a in zip(rollouts, advantages, strict=True)]


def rl_config(*overrides: str, family: str = "sdar") -> Any:
    """configs/rl_tiny.yaml with `section.key=value` overrides; plain SGD at a rate that moves every weight visibly. A canvas is
    sampled without a cache, whose log-probs would not be the trainer's."""
    from configs.load import load_config

    if family != "sdar":
        overrides = (f"model.model_base={family}", "rollout.use_cache=false", *overrides)
    sgd = ["optimizer.name=sgd", "optimizer.params.learning_rate=0.5", "lr_scheduler.scheduler=constant"]
    paths = ["config=configs/rl_tiny.yaml", "experiment.project=runs/unused", "training.max_grad_norm=null"]
    return load_config("rl", [*paths, *sgd, *overrides])


def forget_accelerator() -> None:
    from tests.distributed.probe import forget_accelerator

    forget_accelerator()


@contextmanager
def kept_gradients() -> Iterator[list[dict[str, Tensor]]]:
    """Inside, the whole gradients of every optimizer step of any trainer are appended to the list before the step is taken."""
    steps: list[dict[str, Tensor]] = []
    original = dist.optimizer_step

    def keep_then_step(accelerator: Any, model: Any, optimizer: Any, max_grad_norm: float | None) -> float:
        gradients = dist.full_gradients(accelerator, model)
        steps.append({name.removeprefix("decoder."): g.detach().float().cpu().clone() for name, g in gradients})
        return original(accelerator, model, optimizer, max_grad_norm)

    dist.optimizer_step = keep_then_step
    try:
        yield steps
    finally:
        dist.optimizer_step = original


def error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest difference over all tensors, each in units of the largest entry of `theirs`."""
    assert ours.keys() == theirs.keys()
    gaps = ((float((ours[name] - right).abs().max()), float(right.abs().max())) for name, right in theirs.items())
    return max(gap / scale if scale else float(gap > 0) for gap, scale in gaps)


def weights(model: Pretrained) -> dict[str, Tensor]:
    return {name: p.detach().float().cpu().clone() for name, p in model.decoder.named_parameters()}

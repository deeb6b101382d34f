"""Between logits and what the loss needs of them, each in one pass over the logits: log-probability of the target, entropy, and the
gradient of both. Shapes: C rows of a chunk, V vocabulary.

With p = softmax(logits), m the highest logit, S = log sum exp(logits - m), l the target's log-probability, H the entropy:
    l = logits[target] - m - S      H = S - sum p (logits - m)      dl/dlogits = onehot - p      dH/dlogits = -p (log p + H)

m and S stay apart: m + S would be rounded at the size of the logits, and log-probabilities near 0 with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.kernels.launch import jit, tl, triton, use_fused

TILE = 4096


def row_statistics(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probability of the target [C], entropy [C], m and S [C, 2]), float32, of float32 logits [C, V]; -inf: no probability."""
    return row_statistics_kernel(logits, targets) if use_fused(logits) else row_statistics_reference(logits, targets)


def logits_gradient(
    logits: Tensor,
    targets: Tensor,
    total: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """`scale` times the gradient of the logits [C, V], in `dtype`: of log-probabilities, weighted by grad_logprob [C], and of
    entropies, if grad_entropy [C] is given. total [C, 2], entropy [C]: `row_statistics`. The logits may be overwritten."""
    how = logits_gradient_kernel if use_fused(logits) else logits_gradient_reference
    return how(logits, targets, total, entropy, grad_logprob, grad_entropy, scale, dtype)


def row_statistics_kernel(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    assert logits.is_contiguous() and logits.dtype == torch.float32 and targets.is_contiguous()
    shapes = ((len(logits),), (len(logits),), (len(logits), 2))
    logprob, entropy, total = (torch.empty(shape, dtype=torch.float32, device=logits.device) for shape in shapes)
    if len(logits):
        _row_statistics[(len(logits),)](logits, targets, logprob, entropy, total, logits.shape[1], TILE=TILE, num_warps=8)
    return logprob, entropy, total


def logits_gradient_kernel(
    logits: Tensor,
    targets: Tensor,
    total: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    assert logits.is_contiguous() and logits.dtype == torch.float32 and targets.is_contiguous() and total.is_contiguous()
    grad = torch.empty_like(logits, dtype=dtype)
    grad_logprob = grad_logprob.float().contiguous()
    with_entropy = grad_entropy is not None
    if len(logits):
        _logits_gradient[(len(logits), triton.cdiv(logits.shape[1], TILE))](
            logits, targets, total, entropy, grad_logprob, grad_entropy.float().contiguous() if with_entropy else grad_logprob,
            grad, logits.shape[1], scale, ENTROPY=with_entropy, TILE=TILE, num_warps=8,
        )  # fmt: skip
    return grad


@jit
def _row_statistics(logits, targets, logprob, entropy, total, width, TILE: tl.constexpr):
    """One program per row: the highest logit so far, the sum of exponentials of what lies below it, and that sum weighted by the
    distance."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * width
    highest = -3.0e38  # not -inf: the difference of two would be no number
    size, weighted = 0.0, 0.0
    for tile in range(0, width, TILE):
        column = tile + tl.arange(0, TILE)
        value = tl.load(start + column, mask=column < width, other=float("-inf"))
        new = tl.maximum(highest, tl.max(value, axis=0))
        p = tl.exp(value - new)
        shrunk = tl.exp(highest - new)
        weighted = (weighted + size * (highest - new)) * shrunk + tl.sum(p * tl.where(p > 0, value - new, 0.0), axis=0)
        size = size * shrunk + tl.sum(p, axis=0)
        highest = new
    log_size = tl.log(size)
    tl.store(logprob + row, tl.load(start + tl.load(targets + row)) - highest - log_size)
    tl.store(entropy + row, log_size - weighted / size)
    tl.store(total + 2 * row, highest)
    tl.store(total + 2 * row + 1, log_size)


@jit
def _logits_gradient(
    logits, targets, total, entropy, grad_logprob, grad_entropy, grad, width, scale, ENTROPY: tl.constexpr, TILE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < width
    value = tl.load(logits + row * width + column, mask=inside, other=float("-inf"))
    log_p = value - tl.load(total + 2 * row) - tl.load(total + 2 * row + 1)
    p = tl.exp(log_p)
    g = tl.load(grad_logprob + row)
    value = tl.where(column == tl.load(targets + row), 1.0 - p, -p) * g
    if ENTROPY:
        value -= p * tl.where(p > 0, log_p + tl.load(entropy + row), 0.0) * tl.load(grad_entropy + row)
    tl.store(grad + row * width + column, (value * scale).to(grad.dtype.element_ty), mask=inside)


# -- references


def row_statistics_reference(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    highest = logits.amax(-1, keepdim=True)
    log_p = logits - highest
    log_size = log_p.exp().sum(-1, keepdim=True).log()
    log_p -= log_size
    logprob = log_p.gather(1, targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p.clamp_(min=torch.finfo(torch.float32).min)).sum(-1)
    return logprob, entropy, torch.cat([highest, log_size], dim=1)


def logits_gradient_reference(
    logits: Tensor,
    targets: Tensor,
    total: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    log_p = logits.sub_(total[:, :1]).sub_(total[:, 1:])
    p = log_p.exp()
    grad = -p * grad_logprob[:, None]
    grad.scatter_add_(1, targets[:, None], grad_logprob[:, None].float())
    if grad_entropy is not None:
        log_p = log_p.clamp_(min=torch.finfo(torch.float32).min)
        grad -= p * (log_p + entropy[:, None]) * grad_entropy[:, None]
    if scale != 1.0:
        grad *= scale
    return grad.to(dtype)

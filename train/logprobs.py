"""Log-probabilities of chosen tokens without ever holding tokens x vocabulary: the head in chunks of rows.

Shapes: M predicted tokens, D hidden, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.logits import matmul_float32, scaled_logits


class ChunkedLogProbs(torch.autograd.Function):
    """forward: hidden [M, D], weight [V, D], targets [M] -> log-probabilities [M] and entropies [M], float32.

    Logits of `chunk` rows at a time, recomputed in the backward; with p = softmax(logits / T), l the log-prob, H the entropy:
        dl/dlogits = (onehot - p) / T            dH/dlogits = -p (log p + H) / T
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, forbidden, chunk):
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            log_p = scaled_logits(hidden[rows], weight, temperature, forbidden).log_softmax(-1)
            logprobs[rows] = log_p.gather(1, targets[rows, None])[:, 0]
            p = log_p.exp()
            entropy[rows] = -(p * log_p.clamp_(min=torch.finfo(torch.float32).min)).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, forbidden)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)  # no gradient of the entropy, the usual case, costs nothing
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, targets, forbidden = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = torch.zeros(len(targets), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if ctx.needs_input_grad[1] else None
        for start in range(0, len(targets), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            log_p = scaled_logits(hidden[rows], weight, ctx.temperature, forbidden).log_softmax(-1)
            p = log_p.exp()
            # [C, V], the gradient of the logits.
            grad = -p * grad_logprobs[rows, None]
            grad.scatter_add_(1, targets[rows, None], grad_logprobs[rows, None].float())
            if grad_entropy is not None:
                log_p.clamp_(min=torch.finfo(torch.float32).min)
                entropy = -(p * log_p).sum(-1, keepdim=True)
                grad -= p * (log_p + entropy) * grad_entropy[rows, None]
            if ctx.temperature != 1.0:
                grad /= ctx.temperature
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                grad_weight += matmul_float32(grad.t(), hidden[rows])
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def chunked_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, forbidden: Tensor | None = None, chunk: int = 2048
) -> tuple[Tensor, Tensor]:
    """Log-probability of `targets` [M] and entropy [M] (nats) of softmax(hidden @ weight.T / temperature), both float32.

    temperature: 0 (greedy sampling) means 1. forbidden: ids that carry no probability, int64, or None. A target may not be
    forbidden: its log-probability would be -inf.
    """
    return ChunkedLogProbs.apply(hidden, weight, targets, temperature or 1.0, forbidden, chunk)

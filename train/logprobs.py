"""Log-probabilities of chosen tokens without ever holding tokens x vocabulary: the head in chunks of rows.

Shapes: M predicted tokens, D hidden, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.kernels.vocabulary import logits_gradient, row_statistics
from models.logits import add_matmul_float32, scaled_logits


class ChunkedLogProbs(torch.autograd.Function):
    """forward: hidden [M, D], weight [V, D], targets [M] -> log-probabilities [M] and entropies [M], float32.

    Logits of `chunk` rows at a time, recomputed in the backward (models/kernels/vocabulary.py).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, forbidden, chunk):
        shapes = ((len(targets),), (len(targets),), (len(targets), 2))
        logprobs, entropy, totals = (torch.empty(shape, dtype=torch.float32, device=hidden.device) for shape in shapes)
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            logits = scaled_logits(hidden[rows], weight, temperature, forbidden)
            logprobs[rows], entropy[rows], totals[rows] = row_statistics(logits, targets[rows])
            del logits  # before the next chunk's are made
        ctx.save_for_backward(hidden, weight, targets, forbidden, totals, entropy)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)  # no gradient of the entropy, the usual case, costs nothing
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, targets, forbidden, totals, entropy = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = torch.zeros(len(targets), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if ctx.needs_input_grad[1] else None
        for start in range(0, len(targets), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logits = scaled_logits(hidden[rows], weight, ctx.temperature, forbidden)
            of_entropy = None if grad_entropy is None else grad_entropy[rows]
            own = (targets[rows], totals[rows], entropy[rows], grad_logprobs[rows], of_entropy)
            grad = logits_gradient(logits, *own, scale=1 / ctx.temperature, dtype=weight.dtype)  # [C, V]
            del logits
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                add_matmul_float32(grad_weight, grad.t(), hidden[rows])
            del grad  # before the next chunk's logits are made
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

"""The kernels between logits and loss, against autograd through log_softmax."""

from __future__ import annotations

import pytest
import torch

from models.kernels.vocabulary import (
    logits_gradient_kernel,
    logits_gradient_reference,
    row_statistics_kernel,
    row_statistics_reference,
)
from tests.sample.kernels.compare import assert_near, poisoned


@pytest.fixture(params=["kernel", "reference"])
def functions(request):
    if request.param == "kernel":
        return row_statistics_kernel, logits_gradient_kernel
    return row_statistics_reference, logits_gradient_reference


@pytest.mark.parametrize("forbidden", [[], [0, 3, 4]])
@pytest.mark.parametrize("num_rows, width, shift", [(1, 5, 0), (3, 700, 300), (2, 9000, -40)])
def test_statistics_and_gradient(device, functions, num_rows, width, shift, forbidden):
    """Wherever the logits lie: a shift of all of them costs no digits of the results."""
    statistics, gradient = functions
    generator = torch.Generator().manual_seed(width)
    drawn = 4 * torch.randn(num_rows, width, generator=generator) + shift
    drawn[:, forbidden] = -torch.inf
    targets = torch.full((num_rows,), width - 1)
    targets[0] = 1
    grad_logprob, grad_entropy = torch.randn(2, num_rows, generator=generator)
    exact = drawn.double().requires_grad_()
    log_p = exact.log_softmax(-1)
    logprob = log_p.gather(1, targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)
    logits, on_device = drawn.to(device), targets.to(device)
    with poisoned():
        found = statistics(logits.clone(), on_device)
    total = found[2].sum(1)
    for got, want in zip([*found[:2], total], [logprob, entropy, exact.logsumexp(-1)], strict=True):
        assert_near(got, want.detach())
    for of_entropy in (None, grad_entropy):
        loss = (logprob * grad_logprob).sum() + (0 if of_entropy is None else (entropy * of_entropy).sum())
        (want,) = torch.autograd.grad(loss, exact, retain_graph=True)
        given = [None if g is None else g.to(device) for g in (grad_logprob, of_entropy)]
        with poisoned():
            got = gradient(logits.clone(), on_device, found[2], found[1], *given, 0.5, torch.float32)
        assert_near(got, 0.5 * want.nan_to_num())
        assert not got[:, forbidden].any()

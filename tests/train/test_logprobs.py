"""The chunked head against plain log-softmax, forward and backward."""

from __future__ import annotations

import pytest
import torch

from train.logprobs import chunked_logprobs


def plain(hidden, weight, targets, temperature, forbidden):
    logits = hidden @ weight.t() / (temperature or 1.0)
    if forbidden is not None:
        logits = logits.index_fill(1, forbidden, -torch.inf)
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
    return log_p.gather(1, targets[:, None])[:, 0], entropy


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("forbidden", [None, torch.tensor([7, 11])])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_values_and_gradients_equal_plain_log_softmax(temperature, forbidden, chunk):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 6, generator=generator, requires_grad=True)
    weight = torch.randn(12, 6, generator=generator, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 3, 4, 5, 6, 8, 9])
    a, b = torch.randn(9, generator=generator), torch.randn(9, generator=generator)
    results = []
    for function in (lambda *x: chunked_logprobs(*x, chunk=chunk), plain):
        logprobs, entropy = function(hidden, weight, targets, temperature, forbidden)
        gradients = torch.autograd.grad((logprobs * a + entropy * b).sum(), [hidden, weight])
        results.append((logprobs.detach(), entropy.detach(), *gradients))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5), (ours - theirs).abs().max()


def test_the_gradient_of_one_output_alone():
    hidden = torch.randn(3, 4, requires_grad=True)
    weight, targets = torch.randn(5, 4), torch.tensor([0, 1, 2])
    for pick in (0, 1):
        ours = torch.autograd.grad(chunked_logprobs(hidden, weight, targets, chunk=2)[pick].sum(), hidden)[0]
        theirs = torch.autograd.grad(plain(hidden, weight, targets, 1.0, None)[pick].sum(), hidden)[0]
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_no_tensor_of_all_rows_times_vocabulary_is_made():
    """The largest tensor allocated is a chunk's."""
    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out

    with Watch():
        logprobs, entropy = chunked_logprobs(hidden, weight, torch.zeros(64, dtype=torch.int64), chunk=8)
        (logprobs.sum() + entropy.sum()).backward()
    assert largest == 8 * 1000

"""The layers' fused kernels against plain torch: values and gradients, at odd sizes and strides."""

from __future__ import annotations

import pytest
import torch

from models.decoder import rope_cos_sin
from models.kernels.norms import FusedRMSNorm, rms_norm_reference
from models.kernels.rotary import FusedNormRotate, rotate
from models.kernels.swiglu import FusedSiluMul, silu_mul_reference
from tests.sample.kernels.compare import assert_near, poisoned


def drawn(device, dtype, *shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype).requires_grad_()


def check(ours, theirs, inputs, order=None):
    """Values, and the gradients under random ones, whose layout `order` may change."""
    with poisoned():
        out = ours(*inputs)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
        if order is not None:
            grad = grad.transpose(*order).contiguous().transpose(*order)
        gradients = torch.autograd.grad(out, inputs, grad)
    wide = [x.detach().float().requires_grad_() for x in inputs]
    exact = theirs(*wide)
    for got, want in zip([out, *gradients], [exact, *torch.autograd.grad(exact, wide, grad.float())], strict=True):
        assert got.dtype == inputs[0].dtype
        assert_near(got, want)


@pytest.mark.parametrize("num_rows, width", [(1, 8), (5, 24), (7, 64)])
def test_rms_norm(device, dtype, num_rows, width):
    x, weight = drawn(device, dtype, num_rows, width), drawn(device, dtype, width, seed=1)
    check(lambda x, w: FusedRMSNorm.apply(x, w, 1e-6), lambda x, w: rms_norm_reference(x, w, 1e-6), [x, weight])


def test_rms_norm_of_a_slice_of_columns(device, dtype):
    x, weight = drawn(device, dtype, 6, 40), drawn(device, dtype, 24, seed=1)
    check(lambda x, w: FusedRMSNorm.apply(x[:, 3:27], w, 1e-3), lambda x, w: rms_norm_reference(x[:, 3:27], w, 1e-3), [x, weight])


@pytest.mark.parametrize("num_rows, width", [(1, 3), (4, 24), (3, 1030)])
def test_silu_mul(device, dtype, num_rows, width):
    check(FusedSiluMul.apply, silu_mul_reference, [drawn(device, dtype, num_rows, 2 * width)])


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("num_heads, head_dim, has_norm", [(1, 8, True), (3, 16, True), (4, 12, True), (3, 16, False)])
def test_norm_and_rotation(device, dtype, num_heads, head_dim, has_norm, heads_first):
    """Of heads in the middle of a fused product; attention may give back a gradient with the heads before the rows."""
    num_rows = 5
    product = drawn(device, dtype, num_rows, (num_heads + 2) * head_dim)
    weight = drawn(device, dtype, head_dim, seed=1)
    positions = torch.tensor([0, 1, 2, 900, 31], device=device)
    cos, sin = rope_cos_sin(positions, head_dim, 10_000.0, dtype)

    def heads(product):
        return product.unflatten(-1, (-1, head_dim))[:, 1 : 1 + num_heads]

    def ours(product, *weight):
        return FusedNormRotate.apply(heads(product), *(weight or [None]), 1e-6, cos, sin)

    def theirs(product, *weight):
        x = heads(product)
        return rotate(rms_norm_reference(x, *weight, 1e-6) if weight else x, cos.float(), sin.float())

    check(ours, theirs, [product, weight] if has_norm else [product], order=(0, 1) if heads_first else None)


def test_no_rows(device, dtype):
    x, weight = drawn(device, dtype, 0, 8), drawn(device, dtype, 8)
    out = FusedSiluMul.apply(FusedRMSNorm.apply(x, weight, 1e-6))
    assert out.shape == (0, 4)
    out.sum().backward()
    assert x.grad.shape == (0, 8) and not weight.grad.any()

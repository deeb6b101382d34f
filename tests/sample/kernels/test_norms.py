"""RMSNorm kernels against the decoder's module."""

from __future__ import annotations

import pytest
import torch

from models.decoder import RMSNorm
from models.kernels.norms import rms_norm_reference
from sample.kernels.norms import add_rms_norm, add_rms_norm_reference, rms_norm
from tests.sample.kernels.compare import assert_near, poisoned

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("num_rows, width", [(1, 8), (5, 48), (3, 640)])
def test_equals_the_reference(device: torch.device, dtype: torch.dtype, num_rows: int, width: int) -> None:
    torch.manual_seed(num_rows)
    x, residual = (2 * torch.randn(2, num_rows, width, dtype=dtype, device=device)).unbind(0)
    weight = 1 + torch.randn(width, dtype=dtype, device=device) / 4
    with poisoned():
        assert_near(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))
        normed, total = add_rms_norm(x, residual, weight, 1e-6)
    want, want_total = add_rms_norm_reference(x, residual, weight, 1e-6)
    assert torch.equal(total, want_total)
    assert_near(normed, want)


def test_adds_up_the_parts_of_a_product(device: torch.device, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parts = torch.randn(3, 4, 40, device=device)
    residual, weight = torch.randn(4, 40, dtype=dtype, device=device), torch.randn(40, dtype=dtype, device=device)
    with poisoned():
        normed, total = add_rms_norm(parts, residual, weight, 1e-6)
    want, want_total = add_rms_norm_reference(parts, residual, weight, 1e-6)
    assert_near(total, want_total)
    assert_near(normed, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_is_the_decoders_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(2, 6, 24, dtype=dtype).unbind(0)
    norm = RMSNorm(24, 1e-3).to(dtype)
    norm.weight.data.normal_()
    assert torch.equal(rms_norm_reference(x, norm.weight, 1e-3), norm(x))
    normed, total = add_rms_norm_reference(x, residual, norm.weight, 1e-3)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, norm(x + residual))

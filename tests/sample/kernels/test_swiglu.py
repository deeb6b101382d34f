"""silu(gate) * up against torch."""

from __future__ import annotations

import pytest
import torch

from models.kernels.swiglu import silu_mul_reference
from sample.kernels.swiglu import silu_mul
from tests.sample.kernels.compare import assert_near, poisoned


@pytest.mark.parametrize("num_rows, width", [(1, 3), (4, 48), (2, 1500)])
def test_equals_the_reference(device: torch.device, dtype: torch.dtype, num_rows: int, width: int) -> None:
    torch.manual_seed(width)
    gate_up = 3 * torch.randn(num_rows, 2 * width, dtype=dtype, device=device)
    with poisoned():
        assert_near(silu_mul(gate_up), silu_mul_reference(gate_up))


def test_the_reference_by_hand() -> None:
    gate_up = torch.tensor([[0.0, 2.0, 5.0, 3.0]])  # gates 0 and 2, ups 5 and 3
    assert torch.allclose(silu_mul_reference(gate_up), torch.tensor([[0.0, 2 / (1 + torch.tensor(-2.0).exp()) * 3]]))

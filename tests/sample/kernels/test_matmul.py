"""The product of few rows against torch, and when it is taken."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.kernels.swiglu import silu_mul_reference
from models.lora import LoRA, LoRALinear
from sample.kernels import matmul
from sample.kernels.matmul import Tiles, gate_up_silu, head_logits, product, skinny_gate_up, skinny_product
from tests.sample.kernels.compare import assert_near, poisoned

CASES = [  # (rows, outputs, inputs, tiles)
    (1, 40, 32, Tiles(32, 16)),
    (4, 130, 96, Tiles(64, 32, 2)),
    (16, 64, 100, Tiles(16, 32, 3)),
    (7, 33, 20, Tiles(64, 32, 2)),  # more parts than loads
    (20, 96, 64, Tiles(64, 64, 1)),
]


@pytest.mark.parametrize("num_rows, num_outputs, num_inputs, tiles", CASES)
def test_equals_the_product(
    device: torch.device, dtype: torch.dtype, num_rows: int, num_outputs: int, num_inputs: int, tiles: Tiles
) -> None:
    torch.manual_seed(num_outputs)
    x, weight = (torch.randn(n, num_inputs, dtype=dtype, device=device) for n in (num_rows, num_outputs))
    want = x.double() @ weight.double().t()
    with poisoned():
        out = skinny_product(x, weight, tiles)
    if tiles.parts > 1:
        assert out.shape == (tiles.parts, num_rows, num_outputs) and out.dtype == torch.float32
        assert_near(out.sum(0), want)
        assert_near(out, matmul.skinny_product_reference(x, weight, tiles))
    else:
        assert out.dtype == dtype
        assert_near(out, want)
        assert_near(skinny_product(x, weight, tiles, torch.float32), want)


@pytest.mark.parametrize("tiles", [Tiles(16, 32), Tiles(64, 32)])
def test_gate_up_equals_the_product_and_silu(device: torch.device, dtype: torch.dtype, tiles: Tiles) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 48, dtype=dtype, device=device), torch.randn(2 * 72, 48, dtype=dtype, device=device) / 4
    with poisoned():
        got = skinny_gate_up(x, weight, tiles)
    assert_near(got, silu_mul_reference(x @ weight.t()), roundings=6)


def test_only_plain_layers_and_few_rows(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Adapters, biases, other types and more rows go through the module."""
    monkeypatch.setattr(matmul, "SKINNY_DTYPES", [torch.float32])
    torch.manual_seed(0)
    plain = nn.Linear(32, 64, bias=False, device=device)
    x = torch.randn(matmul.MAX_ROWS, 32, device=device)
    taken = []
    monkeypatch.setattr(matmul, "_launch", lambda *arguments, **options: taken.append(1))
    product(plain, x)
    gate_up_silu(plain, x)
    head_logits(x, plain.weight)
    assert len(taken) == 3
    adapted = LoRALinear(plain, [], LoRA("", 2, 2.0, ()))
    for module, rows in [
        (plain, torch.randn(matmul.MAX_ROWS + 1, 32, device=device)),
        (nn.Linear(32, 64, device=device), x),
        (adapted, x),
    ]:
        assert torch.equal(product(module, rows), module(rows))
    assert len(taken) == 3

"""silu(gate) * up of the fused gate/up product, forward and backward each in one pass. Shapes: N rows, F intermediate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.launch import jit, tl, triton, use_fused

TILE = 1024


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [N, 2F] -> silu(gate) * up [N, F]; silu is rounded before it is multiplied."""
    return FusedSiluMul.apply(gate_up) if use_fused(gate_up) else silu_mul_reference(gate_up)


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class FusedSiluMul(torch.autograd.Function):
    """With s = sigmoid(gate):    dup = dy gate s    dgate = dy up s (1 + gate (1 - s))."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        num_rows, width = len(gate_up), gate_up.shape[1] // 2
        assert gate_up.ndim == 2 and gate_up.shape[1] == 2 * width, gate_up.shape
        out = gate_up.new_empty(num_rows, width)
        if num_rows:
            _forward[(num_rows, triton.cdiv(width, TILE))](gate_up, out, width, TILE=TILE, num_warps=4)
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        grad, out = grad.contiguous(), torch.empty_like(gate_up)
        num_rows, width = grad.shape
        if num_rows:
            _backward[(num_rows, triton.cdiv(width, TILE))](grad, gate_up, out, width, TILE=TILE, num_warps=4)
        return out


@jit
def _forward(gate_up, out, width, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < width
    dtype = out.dtype.element_ty
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + row * width + column, (silu * up).to(dtype), mask=inside)


@jit
def _backward(grad, gate_up, out, width, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < width
    dtype = out.dtype.element_ty
    dy = tl.load(grad + row * width + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-gate))
    dgate = dy * up * s * (1.0 + gate * (1.0 - s))
    tl.store(out + row * 2 * width + column, dgate.to(dtype), mask=inside)
    tl.store(out + row * 2 * width + width + column, (dy * (gate * s).to(dtype).to(tl.float32)).to(dtype), mask=inside)

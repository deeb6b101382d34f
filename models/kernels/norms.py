"""RMSNorm over many rows, forward and backward each in one pass. For one step of the engine, with what stands around it:
sample/kernels/norms.py.

Rounding is that of the plain formula: float32 inside, cast, then times the weight. Shapes: N rows, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.launch import jit, tl, triton, use_fused


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight [D] * x [..., D] / rms(x), in x's dtype."""
    if use_fused(x):
        return FusedRMSNorm.apply(x.flatten(0, -2), weight, eps).view(x.shape)
    return rms_norm_reference(x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight * x32.to(x.dtype)


def num_programs(num_rows: int, device: torch.device) -> int:
    """Of a backward: each goes through many rows, so that gradients of a weight are few partial sums."""
    if device.type != "cuda":
        return min(num_rows, 3)
    return min(num_rows, 4 * torch.cuda.get_device_properties(device).multi_processor_count)


class FusedRMSNorm(torch.autograd.Function):
    """With r = 1/rms(x), z = x r, g = w dy:    dx = r (g - z mean(g z))    dw = sum over rows of z dy."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        assert x.ndim == 2 and x.stride(1) == 1 and weight.shape == x.shape[1:], (x.shape, x.stride(), weight.shape)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
        size = triton.next_power_of_2(x.shape[1])
        warps = min(16, max(1, size // 512))
        if len(x):
            _forward[(len(x),)](x, weight, out, scale, x.stride(0), x.shape[1], eps, SIZE=size, num_warps=warps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        grad = grad.contiguous()
        num_rows, width = x.shape
        programs = num_programs(num_rows, x.device)
        dx = torch.empty_like(grad)
        parts = torch.zeros(programs, width, dtype=torch.float32, device=x.device)
        size = triton.next_power_of_2(width)
        if num_rows:
            _backward[(programs,)](
                grad, x, weight, scale, dx, parts, x.stride(0), num_rows, width, SIZE=size, num_warps=min(16, max(1, size // 512))
            )
        return dx, parts.sum(0).to(weight.dtype), None


@jit
def _forward(x, weight, out, scale, stride, width, eps, SIZE: tl.constexpr):
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE)
    inside = column < width
    dtype = out.dtype.element_ty
    value = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    tl.store(scale + row, r)
    tl.store(out + row * width + column, ((value * r).to(dtype).to(tl.float32) * w).to(dtype), mask=inside)


@jit
def _backward(grad, x, weight, scale, dx, parts, stride, num_rows, width, SIZE: tl.constexpr):
    """Program p: rows p, p + programs, ..."""
    program = tl.program_id(0)
    zero = program.to(tl.int64) * 0  # rows times their stride may pass 2^31
    column = tl.arange(0, SIZE)
    inside = column < width
    dtype = dx.dtype.element_ty
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros([SIZE], tl.float32)
    for index in range(program, num_rows, tl.num_programs(0)):
        row = zero + index
        r = tl.load(scale + row)
        z = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32) * r
        dy = tl.load(grad + row * width + column, mask=inside, other=0.0).to(tl.float32)
        dw += dy * z.to(dtype).to(tl.float32)
        g = dy * w
        mean = tl.sum(g * z, axis=0) / width
        tl.store(dx + row * width + column, (r * (g - z * mean)).to(dtype), mask=inside)
    tl.store(parts + program * width + column, dw, mask=inside)

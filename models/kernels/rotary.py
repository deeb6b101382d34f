"""Norm and rotation of query or key heads, forward and backward each in one pass. For one step of the engine, with the cache:
sample/kernels/rotary_store.py.

Every product is rounded as plain torch does. Shapes: N rows, H heads, K head_dim, the rotation in halves of K/2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.launch import jit, tl, triton, use_fused
from models.kernels.norms import num_programs, rms_norm_reference


def norm_rotate(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [N, H, K], under cos and sin [N, 1, K], behind an RMSNorm over K if `weight` [K] is given."""
    if use_fused(x):
        return FusedNormRotate.apply(x, weight, eps, cos, sin)
    return rotate(x if weight is None else rms_norm_reference(x, weight, eps), cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [N, heads, K]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class FusedNormRotate(torch.autograd.Function):
    """The rotation's backward is the rotation back; the norm's as in models/kernels/norms.py."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
        num_rows, num_heads, head_dim = x.shape
        assert x.stride(2) == 1 and x.stride(1) == head_dim and cos.is_contiguous() and sin.is_contiguous(), x.stride()
        assert cos.shape == sin.shape == (num_rows, 1, head_dim), cos.shape
        out = x.new_empty(x.shape)
        if num_rows:
            _forward[(num_rows,)](
                x, x if weight is None else weight, cos, sin, out, x.stride(0), num_heads, head_dim, eps,
                NORM=weight is not None, HEADS=triton.next_power_of_2(num_heads), HALF=_half(head_dim), num_warps=4,
            )  # fmt: skip
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cos, sin = ctx.saved_tensors
        num_rows, num_heads, head_dim = x.shape
        grad = grad if grad.stride(2) == 1 else grad.contiguous()  # attention's may have heads before rows
        programs = num_programs(num_rows, x.device)
        dx = torch.empty_like(grad, memory_format=torch.contiguous_format)
        parts = torch.zeros(programs, head_dim, dtype=torch.float32, device=x.device)
        if num_rows:
            _backward[(programs,)](
                grad, x, x if weight is None else weight, cos, sin, dx, parts,
                x.stride(0), grad.stride(0), grad.stride(1), num_rows, num_heads, head_dim, ctx.eps,
                NORM=weight is not None, HEADS=triton.next_power_of_2(num_heads), HALF=_half(head_dim), num_warps=4,
            )  # fmt: skip
        return dx, None if weight is None else parts.sum(0).to(weight.dtype), None, None, None


def _half(head_dim: int) -> int:
    assert head_dim % 2 == 0, head_dim
    return triton.next_power_of_2(head_dim // 2)


@jit
def _forward(
    x, weight, cos, sin, out, stride, num_heads, head_dim, eps, NORM: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr
):
    """One program per row: all of its heads."""
    row = tl.program_id(0).to(tl.int64)
    half_dim = head_dim // 2
    head, half = tl.arange(0, HEADS), tl.arange(0, HALF)
    inside = (head < num_heads)[:, None] & (half < half_dim)[None, :]
    at = head[:, None] * head_dim + half[None, :]
    dtype = out.dtype.element_ty
    a = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + row * stride + half_dim + at, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + row * head_dim + half, mask=half < half_dim, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + row * head_dim + half, mask=half < half_dim, other=0.0).to(tl.float32)[None, :]
    if NORM:
        r = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / head_dim + eps)[:, None]
        wa = tl.load(weight + half, mask=half < half_dim, other=0.0).to(tl.float32)[None, :]
        wb = tl.load(weight + half_dim + half, mask=half < half_dim, other=0.0).to(tl.float32)[None, :]
        a = ((a * r).to(dtype).to(tl.float32) * wa).to(dtype).to(tl.float32)
        b = ((b * r).to(dtype).to(tl.float32) * wb).to(dtype).to(tl.float32)
    first = (a * c).to(dtype).to(tl.float32) - (b * s).to(dtype).to(tl.float32)
    second = (b * c).to(dtype).to(tl.float32) + (a * s).to(dtype).to(tl.float32)
    start = out + row * num_heads * head_dim
    tl.store(start + at, first.to(dtype), mask=inside)
    tl.store(start + half_dim + at, second.to(dtype), mask=inside)


@jit
def _backward(
    grad, x, weight, cos, sin, dx, parts, stride, grad_stride, head_stride, num_rows, num_heads, head_dim, eps,
    NORM: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Program p: rows p, p + programs, ..."""
    program = tl.program_id(0)
    zero = program.to(tl.int64) * 0  # rows times their stride may pass 2^31
    half_dim = head_dim // 2
    head, half = tl.arange(0, HEADS), tl.arange(0, HALF)
    inside = (head < num_heads)[:, None] & (half < half_dim)[None, :]
    at = head[:, None] * head_dim + half[None, :]
    dtype = dx.dtype.element_ty
    dwa, dwb = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
    if NORM:
        wa = tl.load(weight + half, mask=half < half_dim, other=0.0).to(tl.float32)[None, :]
        wb = tl.load(weight + half_dim + half, mask=half < half_dim, other=0.0).to(tl.float32)[None, :]
    for index in range(program, num_rows, tl.num_programs(0)):
        row = zero + index
        start = row * num_heads * head_dim
        grad_at = grad + row * grad_stride + head.to(tl.int64)[:, None] * head_stride + half[None, :]
        d1 = tl.load(grad_at, mask=inside, other=0.0).to(tl.float32)
        d2 = tl.load(grad_at + half_dim, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(cos + row * head_dim + half, mask=half < half_dim, other=0.0).to(tl.float32)[None, :]
        s = tl.load(sin + row * head_dim + half, mask=half < half_dim, other=0.0).to(tl.float32)[None, :]
        da = d1 * c + d2 * s
        db = d2 * c - d1 * s
        if NORM:
            a = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(x + row * stride + half_dim + at, mask=inside, other=0.0).to(tl.float32)
            r = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / head_dim + eps)[:, None]
            a, b = a * r, b * r
            dwa += tl.sum(da * a.to(dtype).to(tl.float32), axis=0)
            dwb += tl.sum(db * b.to(dtype).to(tl.float32), axis=0)
            da, db = da * wa, db * wb
            mean = ((tl.sum(da * a, axis=1) + tl.sum(db * b, axis=1)) / head_dim)[:, None]
            da, db = r * (da - a * mean), r * (db - b * mean)
        tl.store(dx + start + at, da.to(dtype), mask=inside)
        tl.store(dx + start + half_dim + at, db.to(dtype), mask=inside)
    if NORM:
        tl.store(parts + program * head_dim + half, dwa, mask=half < half_dim)
        tl.store(parts + program * head_dim + half_dim + half, dwb, mask=half < half_dim)

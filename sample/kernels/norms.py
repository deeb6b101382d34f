"""RMSNorm, alone and with the residual sum in front of it, each in one pass over the rows.

Rounding is that of models/decoder.py: float32 inside, cast, then times the weight. Shapes: N rows, D hidden, S parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.kernels.launch import jit, tl, triton, use_kernel
from models.kernels.norms import rms_norm_reference
from sample.kernels.overlap import begin, finish, launch_options


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight [D] * x [N, D] / rms(x), in x's dtype."""
    assert x.ndim == 2 and x.stride(1) == 1 and weight.shape == x.shape[1:] and weight.is_contiguous(), (x.shape, weight.shape)
    if not use_kernel(x):
        return rms_norm_reference(x, weight, eps)
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    size = max(16, triton.next_power_of_2(x.shape[1]))
    _rms_norm_kernel[(len(x),)](
        x, x, weight, normed, normed, x.stride(0), 0, 0, x.shape[1], eps,
        PARTS=0, SIZE=size, num_warps=_num_warps(size), **launch_options(x, len(x)),
    )  # fmt: skip
    return normed


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(RMSNorm of the sum, the sum x + residual), each [N, D] in the residual's dtype.

    x [N, D], or float32 [S, N, D]: the parts of a product (sample/kernels/matmul.py), added up and rounded first.
    """
    assert x.is_contiguous() and residual.is_contiguous() and weight.is_contiguous(), (x.stride(), residual.stride())
    assert x.shape[-2:] == residual.shape and weight.shape == residual.shape[1:], (x.shape, residual.shape, weight.shape)
    if not use_kernel(x):
        return add_rms_norm_reference(x, residual, weight, eps)
    normed, total = torch.empty_like(residual), torch.empty_like(residual)
    num_rows, width = residual.shape
    size = max(16, triton.next_power_of_2(width))
    parts = len(x) if x.ndim == 3 else 1
    _rms_norm_kernel[(num_rows,)](
        x, residual, weight, normed, total, width, width, num_rows * width, width, eps,
        PARTS=parts, SIZE=size, num_warps=_num_warps(size), **launch_options(x, num_rows),
    )  # fmt: skip
    return normed, total


def _num_warps(size: int) -> int:
    """16 bytes per thread and load, about twice."""
    return min(8, max(1, size // 512))


@jit
def _rms_norm_kernel(
    x, residual, weight, normed, total, x_stride, residual_stride, part_stride, width, eps,
    PARTS: tl.constexpr, SIZE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per row. PARTS 0: no residual."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE)
    inside = column < width
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    begin(OVERLAP)
    dtype = normed.dtype.element_ty
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        for part in tl.static_range(1, PARTS):
            at = x + part * part_stride + row * x_stride + column
            value += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        before = tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        value = (value.to(dtype).to(tl.float32) + before).to(dtype)
        tl.store(total + row * width + column, value, mask=inside)
        value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    finish(OVERLAP)
    value = (value * scale).to(dtype).to(tl.float32) * w
    tl.store(normed + row * width + column, value.to(dtype), mask=inside)


# -- reference


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x.ndim == 3:
        x = x.sum(0).to(residual.dtype)
    total = residual + x
    return rms_norm_reference(total, weight, eps), total

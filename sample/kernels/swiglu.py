"""silu(gate) * up of the fused gate/up product, in one pass; its torch reference is models/kernels/swiglu.py's.

Shapes: N rows, F intermediate.
"""

from __future__ import annotations

from torch import Tensor

from models.kernels.launch import jit, tl, triton, use_kernel
from models.kernels.swiglu import silu_mul_reference
from sample.kernels.overlap import begin, finish, launch_options

TILE = 1024


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [N, 2F] -> silu(gate) * up [N, F], with the decoder's rounding: silu is rounded before it is multiplied."""
    assert gate_up.ndim == 2 and gate_up.is_contiguous() and gate_up.shape[1] % 2 == 0, (gate_up.shape, gate_up.stride())
    if not use_kernel(gate_up):
        return silu_mul_reference(gate_up)
    num_rows, width = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(num_rows, width)
    grid = (num_rows, triton.cdiv(width, TILE))
    _silu_mul_kernel[grid](gate_up, out, width, TILE=TILE, num_warps=4, **launch_options(gate_up, num_rows))
    return out


@jit
def _silu_mul_kernel(gate_up, out, width, TILE: tl.constexpr, OVERLAP: tl.constexpr):
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < width
    dtype = out.dtype.element_ty
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    finish(OVERLAP)
    tl.store(out + row * width + column, (gate * up).to(dtype), mask=inside)

"""Products of few rows, which take the time of reading the weight: y = x W', with W streamed once, by as many programs as it takes.

A weight of few outputs is also split along its inputs. The parts' sums are left apart, [S, N, M] in float32, for the next kernel
to add up in their order: no atomics, so a result does not change from run to run, and no kernel only to add.

Shapes: N rows, D inputs, M outputs, F intermediate, S parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.logits import matmul_float32
from sample.kernels.launch import jit, tl, triton, use_kernel
from sample.kernels.overlap import begin, launch_options
from sample.kernels.swiglu import silu_mul

MAX_ROWS = 16
"""Rows up to which the kernel is used: one tile of the tensor cores. Beyond, the library's are as fast."""

AHEAD_BYTES = 2**16
"""Of its weights, what a program has brought to the cache before the kernel before is done (sample/kernels/overlap.py)."""
SKINNY_DTYPES = [torch.bfloat16]
"""Float32 products are the library's: that mode is for tests."""


@dataclass(frozen=True)
class Tiles:
    """How a product is cut."""

    outputs: int
    """Of a program."""
    inputs: int
    """Of one load."""
    parts: int = 1
    """S."""
    num_warps: int = 4
    num_stages: int = 3
    x_first: bool = True
    """x W' with the rows padded to 16, or W x' with 64 and more outputs (other instructions of the tensor cores)."""


def tiles_of(num_outputs: int, num_inputs: int, gated: bool = False) -> Tiles:
    """The cut that was fastest."""
    return Tiles(64, 128)


def product(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) of x [N, D]: [N, M], or float32 parts [S, N, M] whose sum it is."""
    if not _is_skinny(module, x):
        return module(x)
    tiles = tiles_of(*module.weight.shape)
    return skinny_product(x, module.weight, tiles)


def gate_up_silu(module: nn.Module, x: Tensor) -> Tensor:
    """silu(gate) * up [N, F] of the fused gate/up product of x [N, D]."""
    if not _is_skinny(module, x):
        return silu_mul(module(x))
    return skinny_gate_up(x, module.weight, tiles_of(*module.weight.shape, gated=True))


def head_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """float32 logits [N, V] of hidden [N, D], head weight [V, D]: models/logits.matmul_float32, faster for few rows."""
    if not _fits(hidden, weight):
        return matmul_float32(hidden, weight.t())
    return skinny_product(hidden, weight, tiles_of(*weight.shape), torch.float32)


def _is_skinny(module: nn.Module, x: Tensor) -> bool:
    """Whether the kernel may read the module's weight: adapters, biases and subclasses have their own forward."""
    return type(module) is nn.Linear and module.bias is None and _fits(x, module.weight)


def _fits(x: Tensor, weight: Tensor) -> bool:
    return len(x) <= MAX_ROWS and x.dtype in SKINNY_DTYPES and weight.is_contiguous() and use_kernel(x)


def skinny_product(x: Tensor, weight: Tensor, tiles: Tiles, dtype: torch.dtype | None = None) -> Tensor:
    """x W' of x [N, D], weight [M, D]: [N, M] in `dtype` (x's), or, of more than one part, float32 [S, N, M]."""
    num_rows, num_outputs = _check(x, weight)
    if not use_kernel(x):
        return skinny_product_reference(x, weight, tiles, dtype)
    if tiles.parts == 1:
        out = x.new_empty(num_rows, num_outputs, dtype=dtype or x.dtype)
    else:
        out = x.new_empty(tiles.parts, num_rows, num_outputs, dtype=torch.float32)
    _launch(x, weight, out, num_outputs, tiles, gated=False)
    return out


def skinny_gate_up(x: Tensor, weight: Tensor, tiles: Tiles) -> Tensor:
    """silu(x G') * (x U') [N, F] of x [N, D], weight [2F, D] = G over U, in one kernel of one part; rounded like `silu_mul`."""
    num_rows, num_outputs = _check(x, weight)
    assert num_outputs % 2 == 0 and tiles.parts == 1, (num_outputs, tiles)
    if not use_kernel(x):
        return silu_mul(x @ weight.t())
    out = x.new_empty(num_rows, num_outputs // 2)
    _launch(x, weight, out, num_outputs // 2, tiles, gated=True)
    return out


def _check(x: Tensor, weight: Tensor) -> tuple[int, int]:
    """(N, M)."""
    assert x.ndim == 2 and x.is_contiguous() and weight.is_contiguous() and x.shape[1] == weight.shape[1], (x.shape, weight.shape)
    assert x.dtype == weight.dtype, (x.dtype, weight.dtype)
    return len(x), len(weight)


def _share(num_inputs: int, tiles: Tiles) -> int:
    """Inputs of a part: whole loads, as evenly as they go."""
    num_loads = -(-num_inputs // tiles.inputs)
    return -(-num_loads // tiles.parts) * tiles.inputs


def _launch(x: Tensor, weight: Tensor, out: Tensor, num_outputs: int, tiles: Tiles, gated: bool) -> None:
    num_rows, num_inputs = x.shape
    _skinny_kernel[(triton.cdiv(num_outputs, tiles.outputs), tiles.parts)](
        x, weight, out, num_rows, num_outputs, num_inputs, _share(num_inputs, tiles),
        ROWS=max(16, triton.next_power_of_2(num_rows)), TILE=tiles.outputs, DEPTH=tiles.inputs, GATED=gated,
        EVEN=num_inputs % tiles.inputs == 0, X_FIRST=tiles.x_first,
        AHEAD=AHEAD_BYTES // (tiles.outputs * tiles.inputs * x.element_size() * (2 if gated else 1)) * tiles.inputs,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, **launch_options(x),
    )  # fmt: skip


@jit
def _prefetch(pointers):
    """Have the 128 bytes at each pointer brought to the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@jit
def _skinny_kernel(
    x, weight, out, num_rows, num_outputs, num_inputs, share,
    ROWS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, X_FIRST: tl.constexpr,
    AHEAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (tile of outputs, part of the inputs)."""
    part = tl.program_id(1)
    output = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.arange(0, ROWS)
    step = tl.arange(0, DEPTH)
    # Outputs behind the last are computed from the last's weight and not stored: loads need no mask.
    weight_at = weight + tl.minimum(output, num_outputs - 1).to(tl.int64)[:, None] * num_inputs
    x_at = x + row[:, None] * num_inputs
    row_mask = (row < num_rows)[:, None]
    low = part * share
    high = tl.minimum(low + share, num_inputs)
    if OVERLAP and EVEN:
        for first in range(low, tl.minimum(high, low + AHEAD), DEPTH):
            line = weight_at + (first + tl.arange(0, DEPTH // 64) * 64)[None, :]
            _prefetch(line)
            if GATED:
                _prefetch(line + num_outputs.to(tl.int64) * num_inputs)
    begin(OVERLAP)
    if X_FIRST:
        acc = tl.zeros([ROWS, TILE], tl.float32)
        acc_up = tl.zeros([ROWS, TILE], tl.float32)
    else:
        acc = tl.zeros([TILE, ROWS], tl.float32)
        acc_up = tl.zeros([TILE, ROWS], tl.float32)
    for first in range(low, high, DEPTH):
        at = (first + step)[None, :]
        # Weights are read once: they need not push the activations out of the cache.
        if EVEN:
            w = tl.load(weight_at + at, eviction_policy="evict_first")
            rows = tl.load(x_at + at, mask=row_mask, other=0.0)
        else:
            w = tl.load(weight_at + at, mask=at < high, other=0.0)
            rows = tl.load(x_at + at, mask=row_mask & (at < high), other=0.0)
        if X_FIRST:
            acc += tl.dot(rows, tl.trans(w), input_precision="ieee")
        else:
            acc += tl.dot(w, tl.trans(rows), input_precision="ieee")
        if GATED:
            up_at = weight_at + num_outputs.to(tl.int64) * num_inputs
            if EVEN:
                w_up = tl.load(up_at + at, eviction_policy="evict_first")
            else:
                w_up = tl.load(up_at + at, mask=at < high, other=0.0)
            if X_FIRST:
                acc_up += tl.dot(rows, tl.trans(w_up), input_precision="ieee")
            else:
                acc_up += tl.dot(w_up, tl.trans(rows), input_precision="ieee")
    if GATED:
        dtype = out.dtype.element_ty
        gate = acc.to(dtype).to(tl.float32)
        gate = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        acc = gate * acc_up.to(dtype).to(tl.float32)
    if X_FIRST == 0:
        acc = tl.trans(acc)
    to = (part * num_rows + row).to(tl.int64)[:, None] * num_outputs + output[None, :]
    tl.store(out + to, acc.to(out.dtype.element_ty), mask=row_mask & (output < num_outputs)[None, :])


# -- references


def skinny_product_reference(x: Tensor, weight: Tensor, tiles: Tiles, dtype: torch.dtype | None = None) -> Tensor:
    if tiles.parts == 1:
        return (x.float() @ weight.float().t()).to(dtype or x.dtype)
    share = _share(x.shape[1], tiles)
    out = x.new_zeros(tiles.parts, len(x), len(weight), dtype=torch.float32)
    for part, rows, columns in zip(out, x.float().split(share, 1), weight.float().split(share, 1)):
        part.copy_(rows @ columns.t())
    return out

"""Products of few rows, which take the time of reading the weight: y = x W', with W streamed once, by as many programs as it takes.

A weight of few outputs is also split along its inputs. The parts' sums are left apart, [S, N, M] in float32, for the next kernel
to add up in their order: no atomics, so a result does not change from run to run, and no kernel only to add.

Shapes: N rows, D inputs, M outputs, F intermediate, S parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.kernels.launch import jit, tl, triton, use_kernel
from models.logits import matmul_float32
from sample.kernels.device import shared_memory
from sample.kernels.overlap import begin, finish, launch_options
from sample.kernels.swiglu import silu_mul

MAX_ROWS = 32
"""Rows up to which the kernel is used. From some 40 on the library is as fast."""
MULTIPROCESSORS, MIN_PROGRAMS = 132, 120
"""Of an H100 or H200; and programs that a product has at least."""
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


def tiles_of(num_outputs: int, num_inputs: int, gated: bool = False) -> Tiles:
    """The cut: enough parts that most multiprocessors have a program, and more loads in flight where each has one only.

    Measured on an H200 with `python -m benchmarks.kernels --shape sdar-4b --sweep` and sdar-8b, 8 rows: for each of their products
    the fastest of the cuts tried, or within 2% of it.
    """
    tiles = -(-num_outputs // 64)
    parts = 1 if gated else max(1, min(-(-MIN_PROGRAMS // tiles), num_inputs // 512))
    return Tiles(64, 128, parts, num_stages=3 if tiles * parts > MULTIPROCESSORS else 6)


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
    """Whether the kernel may read the module's weight: adapters, biases and subclasses have their own forward, and a sharded
    weight (ZeRO-3) is whole within the module's forward only."""
    plain = type(module) is nn.Linear and module.bias is None and module.weight.shape == (module.out_features, module.in_features)
    return plain and _fits(x, module.weight)


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
    rows = max(16, triton.next_power_of_2(num_rows))
    fitting = shared_memory(x.device) // ((tiles.outputs + rows) * tiles.inputs * x.element_size())
    _skinny_kernel[(triton.cdiv(num_outputs, tiles.outputs // (2 if gated else 1)), tiles.parts)](
        x, weight, out, num_rows, num_outputs, num_inputs, _share(num_inputs, tiles),
        ROWS=rows, TILE=tiles.outputs, DEPTH=tiles.inputs, GATED=gated,
        EVEN=num_inputs % tiles.inputs == 0,
        num_warps=tiles.num_warps, num_stages=min(tiles.num_stages, fitting), **launch_options(x, num_rows, large=True),
    )  # fmt: skip


@jit
def _skinny_kernel(
    x, weight, out, num_rows, num_outputs, num_inputs, share,
    ROWS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (tile of outputs, part of the inputs). GATED: a tile is gates and ups by turns, of TILE / 2 outputs."""
    part = tl.program_id(1)
    place = tl.arange(0, TILE)
    # Outputs behind the last are computed from the last's weight and not stored: loads need no mask.
    if GATED:
        output = tl.minimum(tl.program_id(0) * (TILE // 2) + place // 2, num_outputs - 1) + place % 2 * num_outputs
    else:
        output = tl.minimum(tl.program_id(0) * TILE + place, num_outputs - 1)
    row = tl.arange(0, ROWS)
    step = tl.arange(0, DEPTH)
    weight_at = weight + output.to(tl.int64)[:, None] * num_inputs
    x_at = x + row[:, None] * num_inputs
    row_mask = (row < num_rows)[:, None]
    low = part * share
    high = tl.minimum(low + share, num_inputs)
    begin(OVERLAP)
    acc = tl.zeros([TILE, ROWS], tl.float32)
    for first in range(low, high, DEPTH):
        at = (first + step)[None, :]
        # Weights are read once: they need not push the activations out of the cache.
        if EVEN:
            w = tl.load(weight_at + at, eviction_policy="evict_first")
            rows = tl.load(x_at + at, mask=row_mask, other=0.0)
        else:
            w = tl.load(weight_at + at, mask=at < high, other=0.0)
            rows = tl.load(x_at + at, mask=row_mask & (at < high), other=0.0)
        # The weight comes first: its 64 outputs are what the tensor cores want at least, the few rows would be padded to that.
        acc += tl.dot(w, tl.trans(rows), input_precision="ieee")
    finish(OVERLAP)
    dtype = out.dtype.element_ty
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [TILE // 2, 2, ROWS]), [0, 2, 1]))  # [TILE / 2, ROWS] each
        gate = gate.to(dtype).to(tl.float32)
        gate = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        result = tl.trans((gate * up.to(dtype).to(tl.float32)).to(dtype))
        to_output = tl.program_id(0) * (TILE // 2) + tl.arange(0, TILE // 2)
    else:
        result = tl.trans(acc.to(dtype))
        to_output = tl.program_id(0) * TILE + place
    to = (part * num_rows + row).to(tl.int64)[:, None] * num_outputs + to_output[None, :]
    tl.store(out + to, result, mask=row_mask & (to_output < num_outputs)[None, :])


# -- references


def skinny_product_reference(x: Tensor, weight: Tensor, tiles: Tiles, dtype: torch.dtype | None = None) -> Tensor:
    if tiles.parts == 1:
        return (x.float() @ weight.float().t()).to(dtype or x.dtype)
    share = _share(x.shape[1], tiles)
    out = x.new_zeros(tiles.parts, len(x), len(weight), dtype=torch.float32)
    for part, rows, columns in zip(out, x.float().split(share, 1), weight.float().split(share, 1)):
        part.copy_(rows @ columns.t())
    return out

"""Between the qkv product and attention, in one pass: q/k norm, rotary embedding, and k and v into the paged cache.

Shapes: N rows, H query heads, G key/value heads, K head_dim, E cache entries, S parts. Rounding is that of models/decoder.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.decoder import rope_cos_sin
from models.kernels.launch import jit, tl, triton, use_kernel
from models.kernels.norms import rms_norm_reference
from models.kernels.rotary import rotate
from sample.kernels.overlap import begin, finish, launch_options

HEADS_AT_A_TIME = 8
"""Query heads of one program: enough programs for few rows, enough work in each for many."""


def rotary_table(num_positions: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """[num_positions, 2, K/2]: cos and sin of the rotary angles, rounded to the model's dtype just as the decoder rounds them."""
    cos, sin = rope_cos_sin(torch.arange(num_positions, device=device), head_dim, theta, dtype)  # [P, 1, K]
    return torch.cat([cos, sin], dim=1)[..., : head_dim // 2].contiguous()


def rotary_store(
    qkv: Tensor,
    positions: Tensor,
    entries: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    num_heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    keep_kv: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """q [N, H, K], normed and rotated; k and v go to the cache at `entries`, and are returned [N, G, K] if `keep_kv` (prefill).

    qkv [N, (H + 2G)*K], or float32 [S, N, (H + 2G)*K]: the parts of a product, added up and rounded first;
    positions int32 [N], below the table's length; entries int32 [N], -1: written nowhere; k_cache, v_cache [E, G, K] of one layer;
    table: `rotary_table`; q_weight, k_weight [K]: of the norms, None where the model has none.
    """
    num_entries, num_kv_heads, head_dim = k_cache.shape
    num_rows = len(positions)
    assert qkv.shape[-2:] == (num_rows, (num_heads + 2 * num_kv_heads) * head_dim) and qkv.is_contiguous(), qkv.shape
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and v_cache.shape == k_cache.shape, (k_cache.shape, v_cache.shape)
    assert table.is_contiguous() and table.shape[1:] == (2, head_dim // 2) and table.dtype == k_cache.dtype, table.shape
    assert positions.dtype == entries.dtype == torch.int32 and entries.shape == (num_rows,), (positions.dtype, entries.dtype)
    assert positions.is_contiguous() and entries.is_contiguous(), "positions and entries must be contiguous"
    assert (q_weight is None) == (k_weight is None), "both norms or none"
    if not use_kernel(qkv):
        return rotary_store_reference(qkv, positions, entries, k_cache, v_cache, table, num_heads, q_weight, k_weight, eps, keep_kv)
    q = k_cache.new_empty(num_rows, num_heads, head_dim)
    k, v = (k_cache.new_empty(num_rows, num_kv_heads, head_dim) for _ in range(2)) if keep_kv else (None, None)
    heads = min(HEADS_AT_A_TIME, triton.next_power_of_2(num_heads))
    _rotary_store_kernel[(num_rows, triton.cdiv(num_heads, heads) + 1)](
        qkv, positions, entries, k_cache, v_cache, table,
        q_weight if q_weight is not None else table, k_weight if k_weight is not None else table,
        q, k if keep_kv else q, v if keep_kv else q,
        num_rows * qkv.shape[-1], num_heads, num_kv_heads, head_dim, eps,
        PARTS=len(qkv) if qkv.ndim == 3 else 1, NORM=q_weight is not None, KEEP=keep_kv,
        HEADS=heads, KV_HEADS=triton.next_power_of_2(num_kv_heads), HALF=triton.next_power_of_2(head_dim // 2),
        num_warps=4, **launch_options(qkv, num_rows),
    )  # fmt: skip
    return q, k, v


@jit
def _half(qkv, at, inside, part_stride, DTYPE: tl.constexpr, PARTS: tl.constexpr):
    """One half of some heads, parts added up, rounded to the model's dtype, as float32."""
    value = tl.load(qkv + at, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        value += tl.load(qkv + part * part_stride + at, mask=inside, other=0.0).to(tl.float32)
    return value.to(DTYPE).to(tl.float32)


@jit
def _norm_rotate(first, second, weight, cos, sin, half, head_dim, eps, DTYPE: tl.constexpr, NORM: tl.constexpr):
    """Norm and rotation of heads [heads, HALF] x 2, every product rounded as torch does."""
    if NORM:
        scale = tl.rsqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / head_dim + eps)[:, None]
        w1 = tl.load(weight + half, mask=half < head_dim // 2, other=0.0).to(tl.float32)[None, :]
        w2 = tl.load(weight + head_dim // 2 + half, mask=half < head_dim // 2, other=0.0).to(tl.float32)[None, :]
        first = ((first * scale).to(DTYPE).to(tl.float32) * w1).to(DTYPE).to(tl.float32)
        second = ((second * scale).to(DTYPE).to(tl.float32) * w2).to(DTYPE).to(tl.float32)
    turned = (first * cos).to(DTYPE).to(tl.float32) - (second * sin).to(DTYPE).to(tl.float32)
    other = (second * cos).to(DTYPE).to(tl.float32) + (first * sin).to(DTYPE).to(tl.float32)
    return turned.to(DTYPE), other.to(DTYPE)


@jit
def _rotary_store_kernel(
    qkv, positions, entries, k_cache, v_cache, table, q_weight, k_weight, q, k, v,
    part_stride, num_heads, num_kv_heads, head_dim, eps,
    PARTS: tl.constexpr, NORM: tl.constexpr, KEEP: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (row, chunk): chunk 0 is the row's k and v, chunk c the query heads from (c - 1) * HEADS on."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    dtype = q.dtype.element_ty
    half = tl.arange(0, HALF)
    half_dim = head_dim // 2
    position = tl.load(positions + row).to(tl.int64)
    angle = table + position * head_dim + half
    cos = tl.load(angle, mask=half < half_dim, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(angle + half_dim, mask=half < half_dim, other=0.0).to(tl.float32)[None, :]
    entry = tl.load(entries + row).to(tl.int64)  # times G*K it passes 2^31
    begin(OVERLAP)
    start = row * (num_heads + 2 * num_kv_heads) * head_dim
    if chunk > 0:
        # Names of their own: a variable may not have one shape in one branch and another in the other.
        q_head = (chunk - 1) * HEADS + tl.arange(0, HEADS)
        q_inside = (q_head < num_heads)[:, None] & (half < half_dim)[None, :]
        q_at = q_head[:, None] * head_dim + half[None, :]
        q_first = _half(qkv, start + q_at, q_inside, part_stride, dtype, PARTS)
        q_second = _half(qkv, start + q_at + half_dim, q_inside, part_stride, dtype, PARTS)
        q_first, q_second = _norm_rotate(q_first, q_second, q_weight, cos, sin, half, head_dim, eps, dtype, NORM)
        q_row = q + row * num_heads * head_dim
        tl.store(q_row + q_at, q_first, mask=q_inside)
        tl.store(q_row + q_at + half_dim, q_second, mask=q_inside)
    else:
        head = tl.arange(0, KV_HEADS)
        inside = (head < num_kv_heads)[:, None] & (half < half_dim)[None, :]
        at = head[:, None] * head_dim + half[None, :]
        k_start = start + num_heads * head_dim
        first = _half(qkv, k_start + at, inside, part_stride, dtype, PARTS)
        second = _half(qkv, k_start + at + half_dim, inside, part_stride, dtype, PARTS)
        first_out, second_out = _norm_rotate(first, second, k_weight, cos, sin, half, head_dim, eps, dtype, NORM)
        v_start = k_start + num_kv_heads * head_dim
        v_first = _half(qkv, v_start + at, inside, part_stride, dtype, PARTS).to(dtype)
        v_second = _half(qkv, v_start + at + half_dim, inside, part_stride, dtype, PARTS).to(dtype)
        write = (head < tl.where(entry >= 0, num_kv_heads, 0))[:, None] & (half < half_dim)[None, :]
        base = entry * num_kv_heads * head_dim
        tl.store(k_cache + base + at, first_out, mask=write)
        tl.store(k_cache + base + at + half_dim, second_out, mask=write)
        tl.store(v_cache + base + at, v_first, mask=write)
        tl.store(v_cache + base + at + half_dim, v_second, mask=write)
        if KEEP:
            kept = row * num_kv_heads * head_dim
            tl.store(k + kept + at, first_out, mask=inside)
            tl.store(k + kept + at + half_dim, second_out, mask=inside)
            tl.store(v + kept + at, v_first, mask=inside)
            tl.store(v + kept + at + half_dim, v_second, mask=inside)
    finish(OVERLAP)


# -- reference


def rotary_store_reference(
    qkv: Tensor,
    positions: Tensor,
    entries: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    num_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    keep_kv: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if qkv.ndim == 3:
        qkv = qkv.sum(0).to(k_cache.dtype)
    num_kv_heads, head_dim = k_cache.shape[1:]
    q, k, v = qkv.unflatten(-1, (-1, head_dim)).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_weight is not None:
        q, k = rms_norm_reference(q, q_weight, eps), rms_norm_reference(k, k_weight, eps)
    cos, sin = (torch.cat([x, x], dim=-1)[:, None] for x in table[positions].unbind(1))  # [N, 1, K]
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    written = (entries >= 0).nonzero().squeeze(1)
    k_cache[entries[written]] = k[written]
    v_cache[entries[written]] = v[written]
    return q.contiguous(), *((k.contiguous(), v.contiguous()) if keep_kv else (None, None))

"""Attention of items over the paged cache, a slot's two items in one program.

An item is B rows of one slot: the block that is being denoised, which sees the slot's first `num_keys` positions; and, where a
block has just been finished, that block (the commit item), which sees B fewer. The H/G query heads that share a key/value head
are folded into rows: B*H/G rows of an item read each key once. Keys are split over programs where there are few items.

Shapes: n items, N >= n*B rows (commit items behind the n denoising items), H query heads, G key/value heads, K head_dim,
E cache entries, S slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.launch import jit, tl, triton, use_kernel
from sample.kernels.device import shared_memory
from sample.kernels.overlap import begin, finish, launch_options
from sample.pages import PAGE

LOG2_E = 1.4426950408889634
TILES = {16: (32, 2), 32: (64, 4), 64: (32, 4), 128: (64, 8)}
"""{folded rows of an item that a program takes: (keys at a time, warps)}, the fastest on an H200: `python -m benchmarks.kernels
--sweep`, contexts of 1,000, at block size 4 with 128 items, 16 and 32 with 64. That of 16 was chosen in whole rollouts, where the
GPU draws all its power and clocks lower: programs so small that a multiprocessor holds five lose least there."""


def splits_of(num_items: int) -> int:
    """Programs that share the keys of an item: enough to fill the GPU, the fastest by the same command."""
    for items, splits in ((2, 16), (8, 8), (31, 4), (63, 2)):
        if num_items <= items:
            return splits
    return 1


def item_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    order: Tensor,
    num_keys: Tensor,
    commit_of: Tensor,
    block_size: int,
    splits: int | None = None,
    keys_at_a_time: int | None = None,
    num_warps: int | None = None,
    num_stages: int = 3,
    tile: int | None = None,
) -> Tensor:
    """Attention output [N, H, K] of q [N, H, K], normed and rotated.

    k_cache, v_cache [E, G, K] of one layer, the rows' own keys already written; block_table int32 [S, pages of a slot]: page ids;
    order int32 [n]: slot of each item (-1: none); num_keys int32 [n]: what its denoising rows see, 0: it does not run, its rows
    become 0; commit_of int32 [n]: k where rows (n + k)*B .. of the forward are its commit item, -1: it has none. Rows of commit
    places that no item has are undefined.

    The rest is for measurements and tests: splits (a power of two) and tile sizes other than the chosen ones.
    """
    num_items, (num_rows, num_heads, head_dim) = len(order), q.shape
    assert q.is_contiguous() and k_cache.is_contiguous() and v_cache.is_contiguous(), (q.stride(), k_cache.stride())
    assert k_cache.shape == v_cache.shape and k_cache.shape[2] == head_dim and len(k_cache) % PAGE == 0, (k_cache.shape, head_dim)
    assert num_heads % k_cache.shape[1] == 0 and num_rows >= num_items * block_size, (q.shape, k_cache.shape, num_items)
    for x in (block_table, order, num_keys, commit_of):
        assert x.dtype == torch.int32 and x.stride(-1) == 1, (x.dtype, x.stride())
    assert num_keys.shape == commit_of.shape == order.shape and block_table.ndim == 2, (num_keys.shape, commit_of.shape)
    if not use_kernel(q):
        return item_attention_reference(q, k_cache, v_cache, block_table, order, num_keys, commit_of, block_size)

    num_kv_heads = k_cache.shape[1]
    splits = splits or splits_of(num_items)
    size = max(16, triton.next_power_of_2(head_dim))
    rows = block_size * (num_heads // num_kv_heads)
    # Twice as many rows where a block is committed, in registers; float32 takes twice the room and has no tensor cores.
    if q.dtype == torch.float32:
        tile, keys_at_a_time, num_warps = tile or 16, keys_at_a_time or 32, num_warps or 4
    largest = 128 if shared_memory(q.device) > 170_000 else 64
    tile = tile or min(largest, max(16, triton.next_power_of_2(rows)))
    keys_at_a_time, num_warps = keys_at_a_time or TILES[tile][0], num_warps or TILES[tile][1]
    out = torch.empty_like(q)
    partial = out if splits == 1 else q.new_empty(splits, num_rows, num_heads, head_dim, dtype=torch.float32)
    lse = out if splits == 1 else q.new_empty(splits, num_rows, num_heads, dtype=torch.float32)
    # Key/value heads fastest: an item's programs run together and read whole entries; items come in their order, longest first.
    grid = (num_kv_heads, splits * triton.cdiv(rows, tile), num_items)
    _item_attention_kernel[grid](
        q, k_cache, v_cache, block_table, order, num_keys, commit_of, out, partial, lse,
        num_items, num_rows, block_table.stride(0), head_dim**-0.5 * LOG2_E,
        PAGE_SIZE=PAGE, BLOCK=block_size, HEADS=num_heads, KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
        SPLITS=splits, TILE=tile, KEYS=keys_at_a_time, SIZE=size,
        num_warps=num_warps, num_stages=num_stages, **launch_options(q, num_rows, large=True),
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(num_rows, num_heads)](
            partial, lse, out, num_rows * num_heads,
            HEAD_DIM=head_dim, SPLITS=splits, SIZE=size, num_warps=2, **launch_options(q, num_rows),
        )  # fmt: skip
    return out


@jit
def _item_attention_kernel(
    q, k_cache, v_cache, block_table, order, num_keys, commit_of, out, partial, lse,
    num_items, num_rows, table_stride, scale,
    PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (key/value head, split and tile of rows, item)."""
    kv_head = tl.program_id(0)
    split = tl.program_id(1) % SPLITS
    tile = tl.program_id(1) // SPLITS
    item = tl.program_id(2)
    keys = tl.load(num_keys + item)
    commit = tl.load(commit_of + item)
    slot = tl.maximum(tl.load(order + item), 0)
    chunk = tl.cdiv(tl.cdiv(keys, SPLITS), KEYS) * KEYS
    low = split * chunk
    high = tl.minimum(low + chunk, keys)
    pages = block_table + slot.to(tl.int64) * table_stride
    page0 = tl.load(pages + low // PAGE_SIZE, mask=low < high, other=0)
    page1 = tl.load(pages + low // PAGE_SIZE + 1, mask=low + PAGE_SIZE < high, other=0)
    begin(OVERLAP)
    # A branch, not always 2 * TILE rows: 3% faster where few items commit.
    if commit >= 0:
        _attend_rows(
            q, k_cache, v_cache, pages, page0, page1, out, partial, lse, num_rows, kv_head, split, tile, item * BLOCK,
            (num_items + commit) * BLOCK, keys, low, high, scale,
            PAGE_SIZE, BLOCK, HEADS, KV_HEADS, HEAD_DIM, SPLITS, TILE, 2 * TILE, KEYS, SIZE,
        )  # fmt: skip
    else:
        _attend_rows(
            q, k_cache, v_cache, pages, page0, page1, out, partial, lse, num_rows, kv_head, split, tile, item * BLOCK,
            item * BLOCK, keys, low, high, scale,
            PAGE_SIZE, BLOCK, HEADS, KV_HEADS, HEAD_DIM, SPLITS, TILE, TILE, KEYS, SIZE,
        )  # fmt: skip
    finish(OVERLAP)


@jit
def _attend_rows(
    q, k_cache, v_cache, pages, page0, page1, out, partial, lse, num_rows, kv_head, split, tile, first_row, commit_row,
    keys, low, high, scale,
    PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Attention of ROWS folded rows to the keys low .. high: TILE of the denoising item, then, if there are more, of its commit
    item. Softmax runs along the tiles of keys (arXiv 2205.14135), in powers of two."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    place = tl.arange(0, ROWS)
    folded = tile * TILE + place % TILE
    commits = place >= TILE
    row = tl.where(commits, commit_row, first_row) + folded // GROUP
    limit = tl.where(commits, keys - BLOCK, keys)
    head = kv_head * GROUP + folded % GROUP
    exists = folded < BLOCK * GROUP
    dim = tl.arange(0, SIZE)
    at = (row.to(tl.int64) * HEADS + head) * HEAD_DIM
    row_mask = exists[:, None] & (dim < HEAD_DIM)[None, :]
    query = tl.load(q + at[:, None] + dim[None, :], mask=row_mask, other=0.0)  # [ROWS, SIZE]

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, SIZE], tl.float32)
    for first in range(low, high, KEYS):
        key = first + tl.arange(0, KEYS)
        # Page ids are loaded one tile ahead, so that the loads of keys and values depend on no other load.
        if KEYS <= PAGE_SIZE:
            page = tl.zeros_like(key) + page0
            page0 = tl.load(pages + (first + KEYS) // PAGE_SIZE, mask=first + KEYS < high, other=0)
        else:
            page = tl.where(key < first + PAGE_SIZE, page0, page1)
            page0 = tl.load(pages + (first + KEYS) // PAGE_SIZE, mask=first + KEYS < high, other=0)
            page1 = tl.load(pages + (first + KEYS) // PAGE_SIZE + 1, mask=first + KEYS + PAGE_SIZE < high, other=0)
        entry = page.to(tl.int64) * PAGE_SIZE + key % PAGE_SIZE  # times G*K it passes 2^31
        entry_at = (entry * KV_HEADS + kv_head) * HEAD_DIM
        key_mask = (key < high)[:, None] & (dim < HEAD_DIM)[None, :]
        k = tl.load(k_cache + entry_at[:, None] + dim[None, :], mask=key_mask, other=0.0)  # [KEYS, SIZE]
        score = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
        score = tl.where((key[None, :] < limit[:, None]) & (key < high)[None, :], score, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(score, axis=1))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # rows that have seen no key yet
        weight = tl.exp2(score - shift[:, None])
        decay = tl.exp2(maximum - shift)
        total = total * decay + tl.sum(weight, axis=1)
        v = tl.load(v_cache + entry_at[:, None] + dim[None, :], mask=key_mask, other=0.0)
        acc = acc * decay[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        maximum = new_maximum

    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    if SPLITS == 1:
        tl.store(out + at[:, None] + dim[None, :], acc.to(out.dtype.element_ty), mask=row_mask)
    else:
        split_at = (split * num_rows + row).to(tl.int64) * HEADS + head
        tl.store(partial + split_at[:, None] * HEAD_DIM + dim[None, :], acc, mask=row_mask)
        seen = total > 0.0
        tl.store(lse + split_at, tl.where(seen, maximum + tl.log2(tl.where(seen, total, 1.0)), float("-inf")), mask=exists)


@jit
def _combine_kernel(
    partial, lse, out, stride,
    HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, SIZE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (row, head): the splits' outputs weighted by their sums of exponentials."""
    begin(OVERLAP)
    at = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    split = tl.arange(0, SPLITS).to(tl.int64)
    dim = tl.arange(0, SIZE)
    log_sum = tl.load(lse + split * stride + at)  # [SPLITS]
    maximum = tl.max(log_sum, axis=0)
    weight = tl.exp2(log_sum - tl.where(maximum == float("-inf"), 0.0, maximum))
    total = tl.sum(weight, axis=0)
    part = tl.load(partial + (split * stride + at)[:, None] * HEAD_DIM + dim[None, :], mask=(dim < HEAD_DIM)[None, :], other=0.0)
    result = tl.sum(part * weight[:, None], axis=0) / tl.where(total > 0.0, total, 1.0)
    finish(OVERLAP)
    tl.store(out + at * HEAD_DIM + dim, result.to(out.dtype.element_ty), mask=dim < HEAD_DIM)


# -- reference


def item_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    order: Tensor,
    num_keys: Tensor,
    commit_of: Tensor,
    block_size: int,
) -> Tensor:
    n, num_kv_heads = len(order), k_cache.shape[1]
    out = torch.zeros_like(q)
    longest = int(num_keys.max())
    if longest == 0:
        return out
    position = torch.arange(longest, device=q.device)
    pages = block_table[order.clamp(min=0).long()][:, position // PAGE].clamp(min=0)  # [n, T]
    entries = pages.long() * PAGE + position % PAGE
    keys, values = (cache[entries].transpose(1, 2) for cache in (k_cache, v_cache))  # [n, G, T, K]
    first_rows = torch.arange(n, device=q.device) * block_size
    commit_rows = torch.where(commit_of >= 0, (n + commit_of.long()) * block_size, first_rows)
    for first, limit, has in ((first_rows, num_keys, num_keys > 0), (commit_rows, num_keys - block_size, commit_of >= 0)):
        rows = first[:, None] + torch.arange(block_size, device=q.device)  # [n, B]
        fold = q[rows].unflatten(2, (num_kv_heads, -1)).permute(0, 2, 1, 3, 4).flatten(2, 3)  # [n, G, B*H/G, K]
        seen = (position < limit[:, None])[:, None, None]  # [n, 1, 1, T]
        # Rows without a key are not kept; a key keeps them from being NaN.
        folded = F.scaled_dot_product_attention(fold, keys, values, attn_mask=seen | (position == 0))
        result = folded.unflatten(2, (block_size, -1)).permute(0, 2, 1, 3, 4).flatten(2, 3)  # [n, B, H, K]
        kept = rows[has & (num_keys > 0)]
        out[kept.flatten()] = result[has & (num_keys > 0)].flatten(0, 1)
    return out

"""Block-causal attention of packed prompts: a token sees the prompt's tokens up to the end of its own block.

Shapes: N rows of packed prompts, R prompts, H query heads, G key/value heads, K head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.launch import jit, tl, triton, use_kernel
from sample.kernels.item_attention import LOG2_E


def prefill_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor, block_size: int, max_length: int) -> Tensor:
    """Attention output [N, H, K] of q [N, H, K], k and v [N, G, K], normed and rotated, of this forward.

    starts, lengths int32 [R]: prompt r is the rows from starts[r] on, which are its positions 0, 1, ...; max_length: at least the
    longest. Rows of no prompt are undefined.
    """
    assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous(), (q.stride(), k.stride(), v.stride())
    assert k.shape == v.shape and k.shape[::2] == q.shape[::2] and q.shape[1] % k.shape[1] == 0, (q.shape, k.shape, v.shape)
    assert starts.dtype == lengths.dtype == torch.int32 and starts.shape == lengths.shape, (starts.dtype, lengths.dtype)
    if not use_kernel(q):
        return prefill_attention_reference(q, k, v, starts, lengths, block_size)
    _, num_heads, head_dim = q.shape
    out = torch.empty_like(q)
    size = max(16, triton.next_power_of_2(head_dim))
    tile, keys, num_warps = (32, 32, 4) if q.dtype == torch.float32 else (128, 64, 8)
    _prefill_attention_kernel[(triton.cdiv(max_length, tile), num_heads, len(starts))](
        q, k, v, starts, lengths, out, block_size, head_dim**-0.5 * LOG2_E,
        HEADS=num_heads, KV_HEADS=k.shape[1], HEAD_DIM=head_dim, TILE=tile, KEYS=keys, SIZE=size,
        num_warps=num_warps, num_stages=2,
    )  # fmt: skip
    return out


@jit
def _prefill_attention_kernel(
    q, k, v, starts, lengths, out, block_size, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Program (tile of tokens, the last first, query head, prompt)."""
    head = tl.program_id(1)
    prompt = tl.program_id(2)
    start = tl.load(starts + prompt).to(tl.int64)
    length = tl.load(lengths + prompt)
    first_token = (tl.num_programs(0) - 1 - tl.program_id(0)) * TILE
    token = first_token + tl.arange(0, TILE)
    dim = tl.arange(0, SIZE)
    row_mask = (token < length)[:, None] & (dim < HEAD_DIM)[None, :]
    at = ((start + token) * HEADS + head) * HEAD_DIM
    query = tl.load(q + at[:, None] + dim[None, :], mask=row_mask, other=0.0)
    limit = tl.minimum((token // block_size + 1) * block_size, length)
    # No key where the whole tile is behind the prompt.
    high = tl.where(first_token < length, tl.max(limit, axis=0), 0)

    kv_head = head // (HEADS // KV_HEADS)
    maximum = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, SIZE], tl.float32)
    for first in range(0, high, KEYS):
        key = first + tl.arange(0, KEYS)
        key_at = ((start + key) * KV_HEADS + kv_head) * HEAD_DIM
        key_mask = (key < high)[:, None] & (dim < HEAD_DIM)[None, :]
        keys = tl.load(k + key_at[:, None] + dim[None, :], mask=key_mask, other=0.0)
        score = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        score = tl.where(key[None, :] < limit[:, None], score, float("-inf"))
        # Every token sees position 0, which is in the first tile of keys: the maximum is finite.
        new_maximum = tl.maximum(maximum, tl.max(score, axis=1))
        weight = tl.exp2(score - new_maximum[:, None])
        decay = tl.exp2(maximum - new_maximum)
        total = total * decay + tl.sum(weight, axis=1)
        values = tl.load(v + key_at[:, None] + dim[None, :], mask=key_mask, other=0.0)
        acc = acc * decay[:, None] + tl.dot(weight.to(values.dtype), values, input_precision="ieee")
        maximum = new_maximum
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(out + at[:, None] + dim[None, :], acc.to(out.dtype.element_ty), mask=row_mask)


# -- reference


def prefill_attention_reference(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor, block_size: int) -> Tensor:
    out = torch.zeros_like(q)
    per_group = q.shape[1] // k.shape[1]
    for start, length in zip(starts.tolist(), lengths.tolist()):
        rows = slice(start, start + length)
        block = torch.arange(length, device=q.device) // block_size
        keys, values = (x[rows].transpose(0, 1).repeat_interleave(per_group, 0) for x in (k, v))  # [H, T, K]
        seen = block[:, None] >= block
        out[rows] = F.scaled_dot_product_attention(q[rows].transpose(0, 1), keys, values, attn_mask=seen).transpose(0, 1)
    return out

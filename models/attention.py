"""Which token sees which in a packed row, and two backends that compute it.

The mask is one formula over three ids per token, so no backend ever needs to see how a pack was made:

    document   tokens of different documents never see each other
    block      the block of the token's position: position // block size (full attention: 0 everywhere)
    slice      0 for the clean sequence; 1, 2, ... for the slices of its document (one block as the model saw it at one step)

    k clean:       q clean: block(k) <= block(q)      q in a slice: block(k) < block(q)
    k in a slice:  q in the same slice

Shapes as in models/decoder.py: N tokens, H query heads, G key/value heads, K head_dim; D documents, T longest document.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.decoder import Attend


@dataclass
class TokenIds:
    """The ids that the mask is a formula of, each int64 [N]. Tokens of one document are contiguous, documents ascend."""

    document: Tensor
    block: Tensor
    slice: Tensor


def allowed(q_document, q_block, q_slice, k_document, k_block, k_slice):
    """Whether q may attend to k: the formula above, on tensors that broadcast (scalars inside FlexAttention)."""
    sees_clean = (k_slice == 0) & (k_block < q_block + (q_slice == 0).to(q_block.dtype))
    sees_slice = (k_slice != 0) & (k_slice == q_slice)
    return (q_document == k_document) & (sees_clean | sees_slice)


def dense_mask(ids: TokenIds) -> Tensor:
    """bool [N, N], True = visible."""
    q, k = (lambda x: x[:, None]), (lambda x: x[None, :])
    return allowed(q(ids.document), q(ids.block), q(ids.slice), k(ids.document), k(ids.block), k(ids.slice))


def dense_attention(ids: TokenIds) -> Attend:
    """SDPA with a dense mask, document by document: [D, T, T] entries instead of [N, N]. For CPU, tests and small models."""
    document, lengths = torch.unique_consecutive(ids.document, return_counts=True)
    num_documents, longest = len(lengths), int(lengths.max())
    starts = lengths.cumsum(0) - lengths
    offset = torch.arange(longest, device=starts.device)
    real = offset < lengths[:, None]  # [D, T]
    padded_to_flat = torch.where(real, starts[:, None] + offset, 0).flatten()  # [D*T]
    flat_to_padded = real.flatten().nonzero().squeeze(1)  # [N]: documents are contiguous and ascend

    def rows(x: Tensor) -> Tensor:  # [N] -> [D, T]
        return x[padded_to_flat].unflatten(0, (num_documents, longest))

    block, slices = rows(ids.block), rows(ids.slice)
    zero = torch.zeros((), dtype=torch.int64, device=starts.device)
    mask = allowed(zero, block[:, :, None], slices[:, :, None], zero, block[:, None, :], slices[:, None, :])
    # Nobody sees padding, but padding sees everything: a softmax over nothing would be NaN.
    mask = (mask & real[:, None, :]) | ~real[:, :, None]
    mask = mask[:, None]  # [D, 1, T, T]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def batch(x: Tensor) -> Tensor:  # [N, heads, K] -> [D, heads, T, K]
            return x.index_select(0, padded_to_flat).unflatten(0, (num_documents, longest)).transpose(1, 2)

        groups = q.shape[1] // k.shape[1]
        out = F.scaled_dot_product_attention(
            batch(q), batch(k.repeat_interleave(groups, 1)), batch(v.repeat_interleave(groups, 1)), attn_mask=mask
        )
        return out.transpose(1, 2).flatten(0, 1).index_select(0, flat_to_padded)

    return attend


def masked_attention(mask: Tensor) -> Attend:
    """SDPA over one row of N tokens under any bool [N, N] mask (True = visible)."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)

    return attend


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # One compilation for every pack size, with and without gradient. Beyond its limit dynamo would fall back, in silence, to an
    # unfused version that holds all scores; with fullgraph that is an error.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    # Compiled separately, so that a new mask over packs of one size compiles nothing.
    return tuple(torch.compile(f, dynamic=False, fullgraph=True) for f in (flex_attention, create_block_mask))


def flex_attention(ids: TokenIds) -> Attend:
    """FlexAttention: empty tiles of the mask cost nothing, and no [N, N] mask is held. CUDA only (no backward on CPU)."""
    attention, create_block_mask = _compiled_flex()
    document, block, slices = ids.document.int(), ids.block.int(), ids.slice.int()

    def visible(batch, head, q, k):
        return allowed(document[q], block[q], slices[q], document[k], block[k], slices[k])

    n = len(document)
    block_mask = create_block_mask(visible, None, None, n, n, device=document.device)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = attention(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])
        return out[0].transpose(0, 1)

    return attend


BACKENDS = {"dense": dense_attention, "flex": flex_attention}


def attention_backend(name: str, ids: TokenIds) -> Attend:
    """`training.attention_backend`: auto is FlexAttention on CUDA and dense elsewhere."""
    if name == "auto":
        name = "flex" if ids.document.is_cuda else "dense"
    return BACKENDS[name](ids)

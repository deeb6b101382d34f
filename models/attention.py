"""Which token sees which in a packed row, and the backends that compute it.

The mask is one formula over a few ids per token, so no backend ever needs to see how a pack was made:

    document   tokens of different documents never see each other ...
    prefix     ... but for this one, the document of the clean text before theirs that a group of documents shares
    block      the block of the token's position: position // block size (full attention: 0 everywhere)
    slice      0 for the clean sequence; 1, 2, ... for the slices of its document (one block as the model saw it at one step)

    k clean:       q clean: block(k) <= block(q)      q in a slice: block(k) < block(q)
    k in a slice:  q in the same slice

Shapes as in models/decoder.py: N tokens, H query heads, G key/value heads, K head_dim; D documents, T longest document.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, fields
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.decoder import Attend
from models.kernels.launch import fused_is_on, use_kernel
from models.kernels.tiles import count_visible
from models.row_length import TILE, padded_length


@dataclass
class WholeDocuments:
    """Bounds of documents in each of which every token sees every other: no mask is needed then."""

    starts: Tensor
    """int32 [D + 1] of each document's first token, and the end."""
    longest: int


@dataclass
class TokenIds:
    """The ids that the mask is a formula of, each int64 [N]. Tokens of one document are contiguous, documents ascend; the documents
    of a group stand behind their prefix, with no other in between."""

    document: Tensor
    block: Tensor
    slice: Tensor
    prefix: Tensor | None = None
    """The token's own document where its group shares nothing; None: no group does."""
    whole: WholeDocuments | None = None
    """Given where it is known that a document's tokens all see each other, and nothing else."""
    attended_length: int = 0
    """Tokens that FlexAttention fills the row up to, if it is shorter: one size for all rows of a job, which is compiled once."""

    def to(self, device: torch.device | str) -> TokenIds:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved |= {name: x.to(device, non_blocking=True) for name, x in moved.items() if isinstance(x, Tensor)}
        if self.whole is not None:
            moved["whole"] = WholeDocuments(self.whole.starts.to(device, non_blocking=True), self.whole.longest)
        return TokenIds(**moved)


def allowed(q_document, q_prefix, q_block, q_slice, k_document, k_block, k_slice):
    """Whether q may attend to k: the formula above, on tensors that broadcast (scalars inside FlexAttention).

    A prefix holds no slice, so a slice's number in another document is never taken for one of its own.
    """
    sees_clean = (k_slice == 0) & (k_block < q_block + (q_slice == 0).to(q_block.dtype))
    sees_slice = (k_slice != 0) & (k_slice == q_slice)
    return ((q_document == k_document) | (q_prefix == k_document)) & (sees_clean | sees_slice)


def dense_mask(ids: TokenIds) -> Tensor:
    """bool [N, N], True = visible."""
    return _visible_rows(ids, slice(None))


def _visible_rows(ids: TokenIds, rows: slice) -> Tensor:
    """The rows of `dense_mask`."""
    prefix = ids.document if ids.prefix is None else ids.prefix
    q = [x[rows, None] for x in (ids.document, prefix, ids.block, ids.slice)]
    k = [x[None, :] for x in (ids.document, ids.block, ids.slice)]
    return allowed(*q, *k)


def dense_attention(ids: TokenIds) -> Attend:
    """SDPA with a dense mask, group by group of documents that share a prefix (one by one where none does): [D, T, T] entries
    instead of [N, N]. For CPU, tests and small models."""
    prefix = ids.document if ids.prefix is None else ids.prefix
    _, lengths = torch.unique_consecutive(prefix, return_counts=True)
    num_groups, longest = len(lengths), int(lengths.max())
    starts = lengths.cumsum(0) - lengths
    offset = torch.arange(longest, device=starts.device)
    real = offset < lengths[:, None]  # [D, T]
    padded_to_flat = torch.where(real, starts[:, None] + offset, 0).flatten()  # [D*T]
    flat_to_padded = real.flatten().nonzero().squeeze(1)  # [N]: groups are contiguous

    def rows(x: Tensor) -> Tensor:  # [N] -> [D, T]
        return x[padded_to_flat].unflatten(0, (num_groups, longest))

    q = [rows(x)[:, :, None] for x in (ids.document, prefix, ids.block, ids.slice)]
    k = [rows(x)[:, None, :] for x in (ids.document, ids.block, ids.slice)]
    # Nobody sees padding, but padding sees everything: a softmax over nothing would be NaN.
    mask = (allowed(*q, *k) & real[:, None, :]) | ~real[:, :, None]
    mask = mask[:, None]  # [D, 1, T, T]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def batch(x: Tensor) -> Tensor:  # [N, heads, K] -> [D, heads, T, K]
            return x.index_select(0, padded_to_flat).unflatten(0, (num_groups, longest)).transpose(1, 2)

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
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # One compilation for every pack size, with and without gradient. Beyond its limit dynamo would fall back, in silence, to an
    # unfused version that holds all scores; with fullgraph that is an error.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


TUNED = {
    "fwd_BLOCK_M": 128, "fwd_BLOCK_N": 128, "fwd_num_warps": 8, "fwd_num_stages": 2,
    "bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 32, "bwd_num_warps": 4, "bwd_num_stages": 4,
}  # fmt: skip
"""Kernel options that were fastest on an H200 for packs of 16,384 tokens with heads of 128 in bfloat16."""


def kernel_options(q: Tensor) -> dict[str, int] | None:
    """`TUNED` for what it was measured on, q [N, H, K]; None: the library chooses."""
    is_measured = q.is_cuda and q.dtype == torch.bfloat16 and q.shape[-1] == 128 and len(q) >= 1024
    return TUNED if is_measured and torch.cuda.get_device_capability(q.device) == (9, 0) else None


def tile_pairs(ids: TokenIds) -> Tensor:
    """int32 [N/TILE, N/TILE], rounded up: how many pairs of each tile are visible. No [N, N] mask is held: torch takes a few rows
    of tiles at a time."""
    n = len(ids.document)
    if use_kernel(ids.document):
        prefix = ids.document if ids.prefix is None else ids.prefix
        return count_visible(ids.document, prefix, ids.block, ids.slice, TILE)
    num_tiles = -(-n // TILE)
    narrow = TokenIds(*(x.int() for x in (ids.document, ids.block, ids.slice)), None if ids.prefix is None else ids.prefix.int())
    step = max(1, 2**26 // (n * TILE)) * TILE
    counts = []
    for start in range(0, n, step):
        visible = _visible_rows(narrow, slice(start, start + step))
        visible = F.pad(visible, (0, -n % TILE, 0, -len(visible) % TILE))
        counts.append(visible.view(-1, TILE, num_tiles, TILE).sum((1, 3), dtype=torch.int32))
    return torch.cat(counts)


def block_mask(ids: TokenIds, length: int | None = None) -> Any:
    """FlexAttention's mask: which tiles are empty, partly and wholly visible, and the formula for those in between.

    length: of the mask, if it is to be longer than the row: in whole tiles, all of them empty. It is made from the ids directly and
    compiles nothing (torch's compiled create_block_mask takes half a minute the first time).
    """
    from torch.nn.attention.flex_attention import BlockMask

    pairs, n = tile_pairs(ids), len(ids.document)
    length = n if length is None else length
    num_empty = -(-length // TILE) - len(pairs)
    assert num_empty == 0 or n % TILE == 0, f"{n} tokens leave a tile half empty"
    pairs = F.pad(pairs, (0, num_empty, 0, num_empty))
    # -1: no document. A copy of the documents: for two ids that are one tensor another kernel would be compiled.
    document, block, slices = (F.pad(x.int(), (0, length - n), value=-1) for x in (ids.document, ids.block, ids.slice))
    prefix = document.clone() if ids.prefix is None else F.pad(ids.prefix.int(), (0, length - n), value=-1)

    def visible(batch, head, q, k):
        return allowed(document[q], prefix[q], block[q], slices[q], document[k], block[k], slices[k])

    def ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
        """bool [Q, K] -> how many in each row [1, 1, Q], and which: [1, 1, Q, K], those first."""
        order = tiles.int().argsort(dim=1, descending=True, stable=True)
        return tiles.sum(1, dtype=torch.int32)[None, None], order.int()[None, None].contiguous()

    is_full = pairs == TILE**2
    partial, full = ordered((pairs > 0) & ~is_full), ordered(is_full)
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=TILE, mask_mod=visible, seq_lengths=(length, length))


def flex_attention(ids: TokenIds) -> Attend:
    """FlexAttention: empty tiles of the mask cost nothing, and no [N, N] mask is held. CUDA only (no backward on CPU).

    A row of whole tiles is filled up for attention alone, which is compiled anew for each size: to `TokenIds.attended_length`, and
    if it is longer to one of few sizes. To run the other layers on that many tokens would cost more than the copies. The tiles of
    the filling are empty.
    """
    n = len(ids.document)
    length = padded_length(max(n, ids.attended_length)) if n % TILE == 0 else n
    attention, mask = _compiled_flex(), block_mask(ids, length)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if length > n:
            q, k, v = (F.pad(x, (0, 0, 0, 0, 0, length - n)) for x in (q, k, v))
        options = kernel_options(q)  # of the filled row: rows of one size are compiled once
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1], kernel_options=options)
        return out[0].transpose(0, 1)[:n]

    return attend


@functools.cache
def _varlen_function() -> Callable[..., Tensor] | None:
    """f(q, k, v, starts, longest): attention within documents, by flash-attn where it is installed, else torch's; None: neither."""
    try:
        from flash_attn import flash_attn_varlen_func as flash
    except ImportError:
        pass
    else:
        return lambda q, k, v, starts, longest: flash(q, k, v, starts, starts, longest, longest)
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch before 2.10
        return None
    knows_groups = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def run(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        if groups > 1 and not knows_groups:
            k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
        options = {"enable_gqa": True} if groups > 1 else {}
        return varlen_attn(q, k, v, starts, starts, longest, longest, **options)

    return run


def varlen_attention(ids: TokenIds) -> Attend:
    """Flash attention over packed documents whose tokens all see each other: no mask, nothing compiled. CUDA, 16 bits."""
    run, whole = _varlen_function(), ids.whole
    assert whole is not None and run is not None

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return run(q, k, v, whole.starts, whole.longest)

    return attend


BACKENDS = {"dense": dense_attention, "flex": flex_attention, "varlen": varlen_attention}


def attention_backend(name: str, ids: TokenIds, dtype: torch.dtype | None = None) -> Attend:
    """`training.attention_backend`: auto is dense on a CPU, FlexAttention on CUDA; there, with `training.fused_kernels`, varlen for
    documents that need no mask.

    dtype: of the queries, if known.
    """
    if name == "auto":
        name = best_backend(ids, dtype)
    return BACKENDS[name](ids)


def best_backend(ids: TokenIds, dtype: torch.dtype | None) -> str:
    if not ids.document.is_cuda:
        return "dense"
    needs_no_mask = fused_is_on() and ids.whole is not None and dtype in (torch.bfloat16, torch.float16)
    return "varlen" if needs_no_mask and _varlen_function() is not None else "flex"

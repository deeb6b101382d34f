"""How many pairs of each tile of an attention mask are visible, in one pass over the mask that never is in memory.

The mask is the formula of models/attention.py (`allowed`), written once more in triton. Shapes: N tokens, T = N / tile, rounded up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.kernels.launch import jit, tl, triton


def count_visible(document: Tensor, prefix: Tensor, block: Tensor, slices: Tensor, tile: int) -> Tensor:
    """int32 [T, T] of ids [N] (any integers; `prefix` may be `document` itself). tile: a power of two."""
    n = len(document)
    num_tiles = triton.cdiv(n, tile)
    out = torch.empty(num_tiles, num_tiles, dtype=torch.int32, device=document.device)
    ids = [x.contiguous() for x in (document, prefix, block, slices)]
    if n:
        _count[(num_tiles, num_tiles)](*ids, out, n, num_tiles, TILE=tile, num_warps=8)
    return out


@jit
def _count(document, prefix, block, slices, out, n, num_tiles, TILE: tl.constexpr):
    q = tl.program_id(0) * TILE + tl.arange(0, TILE)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    # Behind the end: documents that nothing else is of.
    q_document = tl.load(document + q, mask=q < n, other=-1)[:, None]
    q_prefix = tl.load(prefix + q, mask=q < n, other=-1)[:, None]
    q_block, q_slice = tl.load(block + q, mask=q < n, other=0)[:, None], tl.load(slices + q, mask=q < n, other=0)[:, None]
    k_document = tl.load(document + k, mask=k < n, other=-2)[None, :]
    k_block, k_slice = tl.load(block + k, mask=k < n, other=0)[None, :], tl.load(slices + k, mask=k < n, other=0)[None, :]
    sees_clean = (k_slice == 0) & (k_block < q_block + (q_slice == 0).to(q_block.dtype))
    sees_slice = (k_slice != 0) & (k_slice == q_slice)
    visible = ((q_document == k_document) | (q_prefix == k_document)) & (sees_clean | sees_slice)
    count = tl.sum(tl.sum(visible.to(tl.int32), axis=1), axis=0)
    tl.store(out + tl.program_id(0) * num_tiles + tl.program_id(1), count)

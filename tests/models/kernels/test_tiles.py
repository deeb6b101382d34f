"""Visible pairs of a mask's tiles, counted in one pass, against the whole mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.attention import dense_mask
from models.kernels.tiles import count_visible
from tests.models.test_attention import KINDS, first_tokens, random_ids
from tests.sample.kernels.compare import poisoned


@pytest.mark.parametrize("tile", [32, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_pairs_of_tiles(device, kind, tile):
    ids = random_ids(num_documents=6, seed=3, kind=kind)
    ids = first_tokens(ids, len(ids.document) - 3).to(device)  # the last tile is cut
    n, prefix = len(ids.document), ids.document if ids.prefix is None else ids.prefix
    with poisoned():
        ours = count_visible(ids.document, prefix, ids.block, ids.slice, tile)
    mask = F.pad(dense_mask(ids), (0, -n % tile, 0, -n % tile))
    num_tiles = -(-n // tile)
    assert n % tile and mask.any()
    assert torch.equal(ours, mask.view(num_tiles, tile, num_tiles, tile).sum((1, 3), dtype=torch.int32))

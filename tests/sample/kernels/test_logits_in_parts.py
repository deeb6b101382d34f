"""The whole paged engine, on its kernels, with logits of three rows at a time, against the eager engine."""

from __future__ import annotations

import pytest
import torch

from models.registry import FAMILIES
from sample import paged_block
from sample.block import BlockEngine
from sample.paged_block import PagedBlockEngine
from tests.sample.reference import VOCAB_SIZE, random_decoder, random_requests
from tests.sample.test_block import assert_same, settings


def test_logits_in_parts(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen places of which fewer are masked: parts that are full, one that is not, and then some without a row."""
    monkeypatch.setattr(paged_block, "LOGITS", 3 * VOCAB_SIZE + 1)
    limits = []
    draw_rows = paged_block.draw_rows

    def draw_some(logits, keys, s, forbidden, num_rows):
        limits.append((len(logits), int(num_rows)))
        return draw_rows(logits, keys, s, forbidden, num_rows)

    monkeypatch.setattr(paged_block, "draw_rows", draw_some)
    decoder = random_decoder(num_layers=1).to(device)
    requests, s = random_requests([3, 6, 5]), settings(strategy="low_confidence_dynamic", threshold=0.3, max_tokens=3)
    family = FAMILIES.get("sdar")
    ours = PagedBlockEngine(decoder, family, max_active=4).generate(requests, s)
    for rollout, expected in zip(ours, BlockEngine(decoder, family, 4).generate(requests, s), strict=True):
        assert_same(rollout, expected)
    assert {size for size, _ in limits} >= {3, 1}
    assert min(left for _, left in limits) < 0 and any(0 < left < size for size, left in limits)

"""Kernels that start before the one in front of them is done change nothing, run by run."""

from __future__ import annotations

import pytest
import torch

from models.decoder import Decoder
from models.family import DecoderConfig
from sample.kernels import overlap

SHAPE = DecoderConfig(
    vocab_size=640, hidden_size=512, num_layers=4, num_heads=8, num_kv_heads=2, head_dim=128, intermediate_size=1536, qk_norm=True
)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_same_bits_in_every_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.kernels import Scene

    torch.manual_seed(0)
    decoder = Decoder(SHAPE).to("cuda", torch.bfloat16).requires_grad_(False)
    scene = Scene(decoder, active=3, context=300, block_size=4)
    assert scene.num_rows <= overlap.MAX_ROWS
    for large, small in ((1, 2), (2, 1), (1, 1)):
        monkeypatch.setattr(overlap, "SMALL", 0)
        monkeypatch.setattr(overlap, "LARGE", 0)
        want = scene.forward().clone()
        monkeypatch.setattr(overlap, "SMALL", small)
        monkeypatch.setattr(overlap, "LARGE", large)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            scene.forward()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            got = scene.forward()
        for _ in range(50):
            # New inputs and back: a kernel that read too early would see what the run before left behind.
            scene.tokens.add_(1).remainder_(SHAPE.vocab_size)
            graph.replay()
            scene.tokens.sub_(1).remainder_(SHAPE.vocab_size)
            got.fill_(float("nan"))
            graph.replay()
            assert torch.equal(got, want)

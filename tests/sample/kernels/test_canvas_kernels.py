"""The canvas engine on kernels against the one in torch: equal tokens, step maps and numbers, whatever its forwards' sizes."""

from __future__ import annotations

import pytest
import torch

from sample.engine import build_engine
from tests.sample.kernels.conftest import INTERPRET
from tests.sample.reference import random_requests
from tests.sample.test_canvas import CACHES, DECODINGS, STRATEGIES, THRESHOLD, assert_same, decoder_of, settings


@pytest.mark.parametrize("most_rows", [0, 4096], ids=["packed", "fixed"])
@pytest.mark.parametrize("kind, cache", [("llada", "none"), ("llada", "prefix"), ("dream", "dual"), ("dream", "prefix, horizon 3")])
def test_the_engine_on_kernels_is_the_same(kind: str, cache: str, most_rows: int, any_device: torch.device) -> None:
    """In float32. On a CPU without the interpreter the kernels' references run."""
    if INTERPRET and cache not in (("dual",) if most_rows else ("none", "dual")):
        pytest.skip("slow in the interpreter, and on the same kernels")
    family, decoder = decoder_of(kind, seed=6)
    decoder = decoder.to(any_device)
    requests = random_requests([7, 2] if INTERPRET else [7, 2, 5], num_samples=1 if INTERPRET else 3)
    for n, decoding in enumerate(DECODINGS[:1] if INTERPRET else DECODINGS):
        s = settings(
            max_tokens=5 if INTERPRET else 10, block_size=4, strategy=STRATEGIES[n % 4], target=list(THRESHOLD)[n % 4],
            threshold=0.3, entropy_bound=1.5, alg_temp=0.3 * (n % 2), **CACHES[cache], **decoding,
        )  # fmt: skip
        engine = build_engine(decoder, family, 5, "triton")
        engine.most_rows = most_rows
        ours, theirs = (one.generate(requests, s) for one in (engine, build_engine(decoder, family, 5, "torch")))
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other, tolerance=1e-4 if any_device.type == "cuda" else 1e-5)

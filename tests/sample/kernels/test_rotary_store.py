"""q/k norm, rotation and the write to the cache, against the reference and the decoder's own attention module."""

from __future__ import annotations

import pytest
import torch

from models.decoder import Attention, rope_cos_sin
from models.family import DecoderConfig
from sample.kernels.rotary_store import rotary_store, rotary_store_reference, rotary_table
from tests.sample.kernels.compare import assert_near, poisoned

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(4, 2, 8, True), (3, 1, 16, False), (12, 4, 24, True)]
"""(H, G, K, with norms)."""


def cache(num_kv_heads: int, head_dim: int, like: torch.Tensor) -> torch.Tensor:
    """Full of a value that nobody writes."""
    return like.new_full((128, num_kv_heads, head_dim), 7.0)


@pytest.mark.parametrize("num_parts", [0, 3])
@pytest.mark.parametrize("num_heads, num_kv_heads, head_dim, norms", SHAPES)
def test_equals_the_reference(
    device: torch.device, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, norms: bool, num_parts: int
) -> None:
    torch.manual_seed(num_heads)
    n = 6
    width = (num_heads + 2 * num_kv_heads) * head_dim
    if num_parts:
        qkv = torch.randn(num_parts, n, width, device=device)
    else:
        qkv = torch.randn(n, width, dtype=dtype, device=device)
    positions = torch.tensor([0, 1, 99, 40, 41, 5], dtype=torch.int32, device=device)
    entries = torch.tensor([64, -1, 127, 3, -1, 70], dtype=torch.int32, device=device)
    table = rotary_table(100, head_dim, 1000.0, dtype, device)
    weights = tuple(1 + torch.randn(2, head_dim, dtype=dtype, device=device) / 4) if norms else (None, None)
    results = []
    for function in (rotary_store, rotary_store_reference):
        k_cache, v_cache = (cache(num_kv_heads, head_dim, table) for _ in range(2))
        with poisoned():
            out = function(qkv, positions, entries, k_cache, v_cache, table, num_heads, *weights, 1e-6, True)
        results.append((*out, k_cache, v_cache))
    for got, want in zip(*results):
        assert_near(got, want)
    untouched = [entry for entry in range(128) if entry not in entries.tolist()]
    for x in results[0][3:]:
        assert (x[untouched] == 7.0).all() and (x[[64, 127, 3, 70]] != 7.0).any(-1).all()
    q, k, v = rotary_store(
        qkv, positions, entries, *(cache(num_kv_heads, head_dim, table) for _ in range(2)), table, num_heads, *weights
    )
    assert torch.equal(q, results[0][0]) and k is None and v is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [True, False])
def test_the_reference_is_the_decoders_attention(dtype: torch.dtype, norms: bool) -> None:
    torch.manual_seed(1)
    c = DecoderConfig(32, 24, 1, 4, 2, 8, 16, qk_norm=norms, qkv_bias=True, rope_theta=100.0)
    attention = Attention(c).to(dtype)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, positions = torch.randn(5, 24, dtype=dtype), torch.tensor([3, 0, 11, 1, 9], dtype=torch.int32)
    seen = []

    def attend(layer: int, *qkv: torch.Tensor) -> torch.Tensor:
        seen.extend(qkv)
        return qkv[0]

    with torch.no_grad():
        attention(x, *rope_cos_sin(positions, 8, c.rope_theta, dtype), 0, attend)
        k_cache, v_cache = torch.zeros(2, 64, 2, 8, dtype=dtype).unbind(0)
        weights = (attention.q_norm.weight, attention.k_norm.weight) if norms else (None, None)
        table, entries = rotary_table(12, 8, c.rope_theta, dtype, "cpu"), torch.arange(5, dtype=torch.int32)
        out = rotary_store_reference(
            attention.qkv(x), positions, entries, k_cache, v_cache, table, 4, *weights, c.rms_norm_eps, True
        )
    for got, want in zip(out, seen):
        assert torch.equal(got, want)
    assert torch.equal(k_cache[:5], seen[1]) and torch.equal(v_cache[:5], seen[2])

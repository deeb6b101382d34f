"""Attention of packed prompts against a loop over tokens in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sample.kernels.prefill_attention import prefill_attention, prefill_attention_reference
from tests.sample.kernels.compare import assert_near, poisoned

CASES = [(4, (4, 2, 8), [8, 36, 4]), (1, (2, 1, 16), [7, 1]), (5, (6, 2, 24), [20, 70, 0, 3]), (64, (2, 2, 8), [64, 130])]
"""(block size, (H, G, K), lengths of the prompts)."""


def brute_force(q: Tensor, k: Tensor, v: Tensor, starts: list[int], lengths: list[int], size: int) -> Tensor:
    out = torch.full_like(q, float("nan"), dtype=torch.float64)
    per_group = q.shape[1] // k.shape[1]
    for start, length in zip(starts, lengths):
        for token in range(length):
            seen = slice(start, start + min((token // size + 1) * size, length))
            for head in range(q.shape[1]):
                scores = k[seen, head // per_group].double() @ q[start + token, head].double() / q.shape[2] ** 0.5
                out[start + token, head] = scores.softmax(0) @ v[seen, head // per_group].double()
    return out


def inputs(case: tuple, device: torch.device | str, dtype: torch.dtype) -> tuple:
    size, (num_heads, num_kv_heads, head_dim), lengths = case
    torch.manual_seed(size)
    starts = [2 + sum(lengths[:i]) for i in range(len(lengths))]  # two rows in front belong to nobody
    num_rows = 2 + sum(lengths)
    q = torch.randn(num_rows, num_heads, head_dim, dtype=dtype, device=device)
    k, v = torch.randn(2, num_rows, num_kv_heads, head_dim, dtype=dtype, device=device)
    return q, k, v, starts, lengths, size


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"block size {case[0]}")
def test_the_reference_is_the_brute_force(case: tuple) -> None:
    q, k, v, starts, lengths, size = inputs(case, "cpu", torch.float32)
    got = prefill_attention_reference(q, k, v, torch.tensor(starts), torch.tensor(lengths), size)
    assert torch.allclose(got[2:].double(), brute_force(q, k, v, starts, lengths, size)[2:], atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"block size {case[0]}")
def test_the_kernel_is_the_brute_force(device: torch.device, case: tuple, dtype: torch.dtype) -> None:
    q, k, v, starts, lengths, size = inputs(case, device, dtype)
    numbers = (torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, lengths))
    with poisoned():
        got = prefill_attention(q, k, v, *numbers, size, max(lengths))
    assert_near(got[2:], brute_force(*(x.cpu() for x in (q, k, v)), starts, lengths, size)[2:], roundings=4)

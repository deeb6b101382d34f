"""What a GPU allows at best: its ceilings, measured, and the least time that a forward of the sampler can take under them.

    seconds = max(weight bytes / bandwidth, FLOPs of products / peak) + max(cache bytes / bandwidth, FLOPs of attention / peak)

Weights are read while products are computed, so the longer of the two counts. Attention comes on top: a layer's products wait for
it. It takes the reading of the keys and values of the sequences in flight, unless so many rows share them that its own FLOPs take
longer (only canvases without a cache). Everything else (norms, sampling, gaps) is free.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Callable

import torch

from benchmarks.shapes import matmul_parameters
from models.family import DecoderConfig


@dataclass(frozen=True)
class Ceilings:
    bandwidth: float
    """Bytes/s that a kernel reads."""
    flops: float
    """FLOP/s of a large matrix product in the weights' precision."""


def measure_ceilings(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Ceilings:
    """Of this machine, now: the sum of a large tensor, and a product of 8,192 x 8,192 matrices of random numbers."""
    cuda = device.type == "cuda"
    entries, size = (2**30, 8192) if cuda else (2**20, 256)
    read = _best_seconds(torch.ones(entries, dtype=torch.float32, device=device).sum, device)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = _best_seconds(lambda: a @ b, device)
    return Ceilings(4 * entries / read, 2 * size**3 / product)


def _best_seconds(run: Callable[[], object], device: torch.device, inner: int = 10, repeats: int = 5) -> float:
    """Of one run, in the fastest of `repeats` series."""
    best = float("inf")
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(inner):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - started) / inner)
    return best


@dataclass(frozen=True)
class Work:
    """Of one forward, or of an average one, of all sequences in flight."""

    rows: float
    """Tokens that go through the layers."""
    head_rows: float
    """Tokens that go through the vocabulary's projection."""
    weight_bytes: float
    flops: float
    """Of the products."""
    cache_bytes: float
    """Keys and values that attention reads."""
    attention_flops: float
    tokens: float
    """Revealed."""

    def seconds(self, ceilings: Ceilings) -> float:
        products = max(self.weight_bytes / ceilings.bandwidth, self.flops / ceilings.flops)
        return products + max(self.cache_bytes / ceilings.bandwidth, self.attention_flops / ceilings.flops)

    def tokens_per_second(self, ceilings: Ceilings) -> float:
        return self.tokens / self.seconds(ceilings)


def cache_bytes_per_token(config: DecoderConfig, itemsize: int) -> int:
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize


def forward_work(
    config: DecoderConfig,
    sequences: int,
    rows: float,
    head_rows: float,
    keys: float,
    tokens: float,
    itemsize: int = 2,
    cached: bool = True,
) -> Work:
    """The work of a forward that computes `rows` tokens of each of `sequences` sequences, `head_rows` of them with logits, each of
    which attends to `keys` tokens; `cached`: these are read from a cache. The embedding's rows are too few to count."""
    head = config.vocab_size * config.hidden_size
    return Work(
        rows=sequences * rows,
        head_rows=sequences * head_rows,
        weight_bytes=itemsize * (matmul_parameters(config) + head),
        flops=2 * sequences * (matmul_parameters(config) * rows + head * head_rows),
        cache_bytes=sequences * keys * cache_bytes_per_token(config, itemsize) if cached else 0,
        attention_flops=4 * sequences * rows * keys * config.num_layers * config.num_heads * config.head_dim,
        tokens=sequences * tokens,
    )


def block_work(config: DecoderConfig, active: int, context: float, reveal: int, block_size: int, itemsize: int = 2) -> Work:
    """Block diffusion: `active` sequences that each see `context` tokens and reveal `reveal` tokens a forward.

    A block takes ceil(B / reveal) forwards, the first of which also runs the block before it, with its final tokens (the fused
    commit of sample/block.py); the head runs where a token is still masked.
    """
    num_steps = -(-block_size // reveal)
    masked = sum(block_size - step * reveal for step in range(num_steps))
    return _block_work(config, active, context, num_steps, masked, block_size, itemsize)


def random_block_work(
    config: DecoderConfig, active: int, context: float, chance: float, block_size: int, itemsize: int = 2
) -> Work:
    """`block_work` where a forward reveals each masked token with `chance`, and one in any case."""
    return _block_work(config, active, context, *random_block(block_size, chance), block_size, itemsize)


def random_block(block_size: int, chance: float) -> tuple[float, float]:
    """(forwards that a block takes, masked tokens summed over them), on average.

    With m masked tokens, k of them are revealed with P(k) = C(m, k) p^k (1-p)^(m-k), and one where that is none:
    F(m) = 1 + P(0) F(m-1) + sum_k P(k) F(m-k), and likewise the masked tokens, with m in place of 1.
    """
    forwards, masked = [0.0], [0.0]
    for m in range(1, block_size + 1):
        share = [math.comb(m, k) * chance**k * (1 - chance) ** (m - k) for k in range(m + 1)]
        share[1] += share[0]
        forwards.append(1 + sum(share[k] * forwards[m - k] for k in range(1, m + 1)))
        masked.append(m + sum(share[k] * masked[m - k] for k in range(1, m + 1)))
    return forwards[-1], masked[-1]


def chance_of(block_size: int, reveal: float) -> float:
    """The chance with which a forward reveals so many tokens on average, by halving: more the larger it is."""
    low, high = 0.0, 1.0
    for _ in range(50):
        chance = (low + high) / 2
        low, high = (chance, high) if block_size / random_block(block_size, chance)[0] < reveal else (low, chance)
    return (low + high) / 2


def _block_work(
    config: DecoderConfig, active: int, context: float, forwards: float, masked: float, block_size: int, itemsize: int
) -> Work:
    """Of a forward, blocks taking `forwards` of them, with `masked` masked tokens in all."""
    rows, tokens = block_size * (1 + 1 / forwards), block_size / forwards
    return forward_work(config, active, rows, masked / forwards, context, tokens, itemsize)

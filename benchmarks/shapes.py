"""Shapes of published models, for benchmarks with random weights."""

from __future__ import annotations

import dataclasses

import torch

from models.decoder import Decoder
from models.family import DecoderConfig, Family
from models.registry import FAMILIES

QWEN3 = dict(vocab_size=151_936, num_kv_heads=8, head_dim=128, rope_theta=1_000_000.0, qk_norm=True)
SHAPES = {
    "sdar-1.7b": DecoderConfig(
        hidden_size=2048, num_layers=28, num_heads=16, intermediate_size=6144, tie_word_embeddings=True, **QWEN3
    ),
    "sdar-4b": DecoderConfig(
        hidden_size=2560, num_layers=36, num_heads=32, intermediate_size=9728, tie_word_embeddings=True, **QWEN3
    ),
    "sdar-8b": DecoderConfig(hidden_size=4096, num_layers=36, num_heads=32, intermediate_size=12_288, **QWEN3),
    "llada-8b": DecoderConfig(
        vocab_size=126_464,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        intermediate_size=12_288,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
    ),
    "dream-7b": DecoderConfig(
        vocab_size=152_064,
        hidden_size=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        intermediate_size=18_944,
        rope_theta=1_000_000.0,
        qkv_bias=True,
    ),
    # Small enough to check a benchmark itself on a CPU.
    "tiny": DecoderConfig(
        vocab_size=160, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=192, qk_norm=True
    ),
    "tiny-full": DecoderConfig(
        vocab_size=160, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=16, intermediate_size=192
    ),
}
FAMILY_OF = {"llada-8b": "llada", "dream-7b": "dream", "tiny-full": "llada"}
"""The others are sdar's."""
MASK_IDS = {"tiny": 159, "tiny-full": 159, "llada-8b": 126_336, "dream-7b": 151_666}
MASK_ID = 151_669
"""Of the shapes that MASK_IDS does not name."""


def random_decoder(shape: str, num_layers: int | None, dtype: torch.dtype, device: str, seed: int = 0) -> Decoder:
    """A decoder of that shape, with `num_layers` layers if given, and weights of standard deviation 0.02."""
    config = SHAPES[shape]
    if num_layers is not None:
        config = dataclasses.replace(config, num_layers=num_layers)
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder = decoder.to(dtype).to_empty(device=device)
    if config.tie_word_embeddings:
        decoder.lm_head.weight = decoder.embed.weight
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return decoder


def family_of(shape: str) -> Family:
    return FAMILIES.get(FAMILY_OF.get(shape, "sdar"))


def mask_id_of(shape: str) -> int:
    return MASK_IDS.get(shape, MASK_ID)


def matmul_parameters(config: DecoderConfig) -> int:
    """Weights of the matrix products of all layers, the vocabulary's projection not counted."""
    attention = config.hidden_size * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    return config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)

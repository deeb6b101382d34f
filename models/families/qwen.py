"""Config keys and tensor names shared by the families built on Qwen2 and Qwen3 (not a family itself)."""

from __future__ import annotations

from typing import Any

from common.errors import UserError
from models.family import DecoderConfig, Piece


def qwen_config(config: dict[str, Any], qk_norm: bool, qkv_bias: bool) -> DecoderConfig:
    """config.json -> shape. Raises UserError for what the decoder does not have."""
    if config.get("rope_scaling"):
        raise UserError(f"config.json: rope_scaling {config['rope_scaling']!r} is not supported: set it to null")
    if config.get("use_mrope"):
        raise UserError("config.json: use_mrope is not supported: set it to false")
    if config.get("use_sliding_window"):
        raise UserError("config.json: use_sliding_window is not supported: set it to false")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"config.json: hidden_act {config['hidden_act']!r} is not supported: only silu is")
    return DecoderConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config.get("num_key_value_heads", config["num_attention_heads"]),
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        intermediate_size=config["intermediate_size"],
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        # transformers 5 writes rope_theta inside rope_parameters.
        rope_theta=config.get("rope_theta") or config.get("rope_parameters", {}).get("rope_theta", 10_000.0),
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def qwen_pieces(c: DecoderConfig) -> list[Piece]:
    """Qwen's published names -> rows of the decoder's fused parameters."""
    query, key_value = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    pieces = [Piece("model.embed_tokens.weight", "embed.weight", 0, c.vocab_size)]
    for n in range(c.num_layers):
        theirs, ours = f"model.layers.{n}", f"layers.{n}"
        for suffix in ["weight", "bias"] if c.qkv_bias else ["weight"]:
            start = 0
            for name, rows in [("q", query), ("k", key_value), ("v", key_value)]:
                pieces.append(Piece(f"{theirs}.self_attn.{name}_proj.{suffix}", f"{ours}.attention.qkv.{suffix}", start, rows))
                start += rows
        pieces.append(Piece(f"{theirs}.self_attn.o_proj.weight", f"{ours}.attention.out.weight", 0, c.hidden_size))
        if c.qk_norm:
            for name in "qk":
                pieces.append(
                    Piece(f"{theirs}.self_attn.{name}_norm.weight", f"{ours}.attention.{name}_norm.weight", 0, c.head_dim)
                )
        for row, name in enumerate(["gate", "up"]):
            pieces.append(
                Piece(
                    f"{theirs}.mlp.{name}_proj.weight", f"{ours}.mlp.gate_up.weight", row * c.intermediate_size, c.intermediate_size
                )
            )
        pieces.append(Piece(f"{theirs}.mlp.down_proj.weight", f"{ours}.mlp.down.weight", 0, c.hidden_size))
        pieces.append(Piece(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight", 0, c.hidden_size))
        pieces.append(Piece(f"{theirs}.post_attention_layernorm.weight", f"{ours}.mlp_norm.weight", 0, c.hidden_size))
    pieces.append(Piece("model.norm.weight", "norm.weight", 0, c.hidden_size))
    if not c.tie_word_embeddings:
        pieces.append(Piece("lm_head.weight", "lm_head.weight", 0, c.vocab_size))
    return pieces

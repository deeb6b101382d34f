"""SDAR and TraDo: block diffusion on the Qwen3 architecture (arXiv 2510.06303, 2509.06949).

Tensor names are those of JetLM/SDAR-*-Chat and Gen-Verse/TraDo-*: Qwen3's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from common.errors import UserError
from models.families.qwen import qwen_pieces
from models.family import FAMILIES, DecoderConfig, Family


def decoder_config(config: dict[str, Any]) -> DecoderConfig:
    if config.get("num_experts"):
        raise UserError("config.json: num_experts is set: mixture-of-experts SDAR checkpoints are not supported yet")
    if config.get("rope_scaling"):
        raise UserError(f"config.json: rope_scaling {config['rope_scaling']!r} is not supported: set it to null")
    if config.get("use_sliding_window"):
        raise UserError("config.json: use_sliding_window is not supported: set it to false")
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
        qk_norm=True,
        qkv_bias=bool(config.get("attention_bias", False)),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


SDAR = Family(
    name="sdar",
    attention="block",
    logit_shift=0,
    model_types=("sdar",),
    decoder_config=decoder_config,
    pieces=qwen_pieces,
    mask_token="<|MASK|>",
    mask_token_id=151669,
    chat_style="chatml",
)

FAMILIES.register("sdar", SDAR)
FAMILIES.register("trado", dataclasses.replace(SDAR, name="trado"))

"""SDAR and TraDo: block diffusion on the Qwen3 architecture (arXiv 2510.06303, 2509.06949).

Tensor names are those of JetLM/SDAR-*-Chat and Gen-Verse/TraDo-*: Qwen3's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from common.errors import UserError
from models.families.qwen import qwen_config, qwen_pieces
from models.family import FAMILIES, DecoderConfig, Family, usual_keys


def decoder_config(config: dict[str, Any]) -> DecoderConfig:
    if config.get("num_experts"):
        raise UserError("config.json: num_experts is set: mixture-of-experts SDAR checkpoints are not supported yet")
    return qwen_config(config, qk_norm=True, qkv_bias=bool(config.get("attention_bias", False)))


def config_json(c: DecoderConfig) -> dict[str, Any]:
    return {"architectures": ["SDARForCausalLM"], **usual_keys(c)}


SDAR = Family(
    name="sdar",
    attention="block",
    logit_shift=0,
    model_types=("sdar",),
    decoder_config=decoder_config,
    config_json=config_json,
    pieces=qwen_pieces,
    mask_token="<|MASK|>",
    mask_token_id=151669,
    chat_style="chatml",
)

FAMILIES.register("sdar", SDAR)
FAMILIES.register("trado", dataclasses.replace(SDAR, name="trado"))

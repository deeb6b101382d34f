"""Dream and DiffuCoder: full attention on the Qwen2 architecture, logits shifted by one (arXiv 2508.15487, 2506.20639).

Tensor names are those of Dream-org/Dream-v0-Instruct-7B and apple/DiffuCoder-7B-*: Qwen2's, with biases on q, k and v.
"""

from __future__ import annotations

from typing import Any

from models.families.qwen import qwen_config, qwen_pieces
from models.family import FAMILIES, DecoderConfig, Family, usual_keys


def decoder_config(config: dict[str, Any]) -> DecoderConfig:
    return qwen_config(config, qk_norm=False, qkv_bias=True)


def config_json(c: DecoderConfig) -> dict[str, Any]:
    keys = {"architectures": ["DreamModel"], **usual_keys(c), "use_sliding_window": False}
    return {key: value for key, value in keys.items() if key not in ("attention_bias", "head_dim")}  # which it does not know


DREAM = Family(
    name="dream",
    attention="full",
    logit_shift=1,
    model_types=("Dream",),
    decoder_config=decoder_config,
    config_json=config_json,
    pieces=qwen_pieces,
    mask_token="<|mask|>",
    mask_token_id=151666,
    chat_style="chatml-system",
    config_block_size=lambda config: None,
    stop_tokens=("<|im_end|>",),
    canvas_schedule="dream",
    first_token_from_refresh=True,
    top_p_first=True,
)

FAMILIES.register("dream", DREAM)

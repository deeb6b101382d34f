"""LLaDA: full attention, LLaMA's architecture under names of its own (arXiv 2502.09992).

Tensor names and config keys are those of GSAI-ML/LLaDA-8B-Instruct and LLaDA-1.5.
"""

from __future__ import annotations

from typing import Any

from common.errors import UserError
from models.family import FAMILIES, DecoderConfig, Family, Piece

ONLY: dict[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "layer_norm_type": ("rms",),
    "activation_type": ("silu",),
    "rope": (True,),
    "alibi": (False,),
    "layer_norm_with_affine": (True,),
    "bias_for_layer_norm": (False, None),
    "include_bias": (False,),
    "include_qkv_bias": (False,),
    "attention_layer_norm": (False,),
    "input_emb_norm": (False,),
    "scale_logits": (False,),
    "block_group_size": (1,),
    "clip_qkv": (None,),
}
"""Keys of config.json that choose an architecture, with the values that the decoder has: those of the published checkpoints. Others
are not read: dropouts, what says how weights were made, and `rope_full_precision` (docs/full_attention.md says what it does)."""


def decoder_config(config: dict[str, Any]) -> DecoderConfig:
    for key, values in ONLY.items():
        if config.get(key, values[0]) not in values:
            raise UserError(f"config.json: {key} {config[key]!r} is not supported: only {values[0]!r}, as in the published LLaDA")
    heads = config["n_heads"]
    one = 1 if config.get("multi_query_attention") else heads
    return DecoderConfig(
        # Rows of the embedding, where it is padded beyond the vocabulary.
        vocab_size=config.get("embedding_size") or config["vocab_size"],
        hidden_size=config["d_model"],
        num_layers=config["n_layers"],
        num_heads=heads,
        num_kv_heads=config.get("n_kv_heads") or one,
        head_dim=config["d_model"] // heads,
        intermediate_size=config.get("mlp_hidden_size") or config["mlp_ratio"] * config["d_model"],
        rms_norm_eps=config.get("rms_norm_eps", 1e-5),
        rope_theta=config.get("rope_theta", 10_000.0),
        tie_word_embeddings=bool(config.get("weight_tying", False)),
    )


def config_json(c: DecoderConfig) -> dict[str, Any]:
    if c.head_dim * c.num_heads != c.hidden_size:
        raise UserError(f"LLaDA: n_heads * head_dim must be d_model, got {c.num_heads} * {c.head_dim} and {c.hidden_size}")
    return {
        "architectures": ["LLaDAModelLM"],
        "vocab_size": c.vocab_size,
        "embedding_size": c.vocab_size,
        "d_model": c.hidden_size,
        "n_layers": c.num_layers,
        "n_heads": c.num_heads,
        "n_kv_heads": c.num_kv_heads,
        "mlp_hidden_size": c.intermediate_size,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "weight_tying": c.tie_word_embeddings,
        "max_sequence_length": 512,
        **{key: values[0] for key, values in ONLY.items() if key != "clip_qkv"},
    }


def pieces(c: DecoderConfig) -> list[Piece]:
    """LLaDA's published names -> rows of the decoder's fused parameters."""
    query, key_value, width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.intermediate_size
    model = "model.transformer"
    found = [Piece(f"{model}.wte.weight", "embed.weight", 0, c.vocab_size)]
    for n in range(c.num_layers):
        for theirs, ours, start, rows in [
            ("q_proj", "attention.qkv", 0, query),
            ("k_proj", "attention.qkv", query, key_value),
            ("v_proj", "attention.qkv", query + key_value, key_value),
            ("attn_out", "attention.out", 0, c.hidden_size),
            ("ff_proj", "mlp.gate_up", 0, width),
            ("up_proj", "mlp.gate_up", width, width),
            ("ff_out", "mlp.down", 0, c.hidden_size),
            ("attn_norm", "attention_norm", 0, c.hidden_size),
            ("ff_norm", "mlp_norm", 0, c.hidden_size),
        ]:
            found.append(Piece(f"{model}.blocks.{n}.{theirs}.weight", f"layers.{n}.{ours}.weight", start, rows))
    found.append(Piece(f"{model}.ln_f.weight", "norm.weight", 0, c.hidden_size))
    if not c.tie_word_embeddings:
        found.append(Piece(f"{model}.ff_out.weight", "lm_head.weight", 0, c.vocab_size))
    return found


LLADA = Family(
    name="llada",
    attention="full",
    logit_shift=0,
    model_types=("llada",),
    decoder_config=decoder_config,
    config_json=config_json,
    pieces=pieces,
    mask_token="<|mdm_mask|>",
    mask_token_id=126336,
    chat_style="llama3",
    config_block_size=lambda config: None,
    stop_tokens=("<|eot_id|>",),
    scores_unscaled=True,  # its sampler takes softmax(logits) for them, and scales the Gumbel noise of the draw
)

FAMILIES.register("llada", LLADA)

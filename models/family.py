"""What a family of models is: facts only, no tensor. Nothing here imports torch, so a config can be checked against it.

A new family is one file in models/families that ends in `FAMILIES.register(...)`, or a user's file named in
`experiment.plugins` that does the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Literal

from common.registry import Registry

TINY_RANDOM = "tiny-random"
"""The name of a model that is made, not read: models/tiny.py."""


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of the one decoder (models/decoder.py)."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    qk_norm: bool = False
    qkv_bias: bool = False
    tie_word_embeddings: bool = False


SMALLEST = DecoderConfig(1, 1, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=1, intermediate_size=1)
"""A shape to ask a family's names with, where the sizes do not matter."""


@dataclass(frozen=True)
class Piece:
    """One published tensor as rows of a (possibly fused) parameter of the decoder."""

    published: str
    """Name in the checkpoint, e.g. model.layers.3.self_attn.k_proj.weight."""
    parameter: str
    """Name in the decoder, e.g. layers.3.attention.qkv.weight."""
    start: int
    """First row of the parameter that it fills."""
    rows: int


def usual_keys(c: DecoderConfig) -> dict[str, Any]:
    """Shape -> config.json under the keys that most architectures use."""
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.intermediate_size,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "max_position_embeddings": 512,
        "hidden_act": "silu",
        "attention_bias": c.qkv_bias,
        "tie_word_embeddings": c.tie_word_embeddings,
    }


@dataclass(frozen=True)
class Family:
    """Facts about one family of diffusion language models."""

    name: str
    attention: Literal["block", "full"]
    """block: block-causal attention with an exact KV cache; full: the whole canvas sees itself."""
    logit_shift: Literal[0, 1]
    """Where position i is predicted: at i (0), or at i-1 (1)."""
    model_types: tuple[str, ...]
    """Values of `model_type` in config.json that are this family."""
    decoder_config: Callable[[dict[str, Any]], DecoderConfig]
    """config.json -> shape. Raises UserError for a feature that the decoder does not have."""
    pieces: Callable[[DecoderConfig], list[Piece]]
    """Every tensor of a published checkpoint, and where it lives in the decoder."""
    mask_token: str
    """Text of the mask token, where config.json does not name its id."""
    mask_token_id: int
    """Its id in the published vocabulary, where neither config.json nor the tokenizer says it."""
    chat_style: Literal["chatml", "chatml-system", "llama3", "llama3-mmada"]
    """Fallback prompt format where the tokenizer has no chat template (data/prompts.py)."""
    config_block_size: Callable[[dict[str, Any]], int | None] = lambda config: config.get("block_size")
    """The block size that a checkpoint was trained for, where its config.json says so."""
    config_json: Callable[[DecoderConfig], dict[str, Any]] = usual_keys
    """Shape -> keys of config.json, for a model that is made and not read (models/tiny.py): undoes `decoder_config`."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end a turn besides the end token that config.json and the tokenizer name."""
    canvas_schedule: Literal["even", "dream"] = "even"
    """Full attention, static: how many tokens the forwards of a block reveal (sample/canvas_schedule.py)."""
    first_token_from_refresh: bool = False
    """Full attention: a block's first forward reveals its first position alone, whatever the strategy."""
    top_p_first: bool = False
    """Full attention: top-p is taken before top-k, and not of what top-k leaves."""
    scores_unscaled: bool = False
    """Full attention: positions are ranked by the distribution at temperature 1; the temperature is in the draw of tokens alone."""
    num_tiny_codes: int = 0
    """Ids of the embedded tiny model (models/tiny.py) behind those of its tokenizer: where published ones have image codes."""

    @property
    def head_name(self) -> str:
        """Published name of the vocabulary head's weight."""
        return next(piece.published for piece in self.pieces(SMALLEST) if piece.parameter == "lm_head.weight")


FAMILIES: Registry[Family] = Registry("model family")

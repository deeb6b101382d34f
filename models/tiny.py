"""The embedded tiny model: an SDAR-type decoder of about 100,000 parameters and a tokenizer of one id per character.

It learns the tasks of data/tiny_tasks.py on two CPU cores in a minute: what `make demo`, rl_tiny and most tests run on.
"""

from __future__ import annotations

from typing import Any

import torch

from data.tiny_tasks import ALPHABET, TINY_SPECIAL_TOKENS
from models.checkpoint import Pretrained, empty_decoder
from models.decoder import Decoder
from models.family import Family

EMBEDDING_STD = 0.5
"""Wide: with 28 ids and 64 dimensions the usual 0.02 takes minutes to grow out of."""


def tiny_tokenizer() -> Any:
    """A Hugging Face fast tokenizer: one id per character of ALPHABET, then the special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*ALPHABET, *TINY_SPECIAL_TOKENS.values()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=TINY_SPECIAL_TOKENS["pad_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **TINY_SPECIAL_TOKENS)


def tiny_config(tokenizer: Any, **changes: Any) -> dict[str, Any]:
    """config.json of the tiny model, under SDAR's keys."""
    return {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000.0,
        "max_position_embeddings": 512,
        "attention_bias": False,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "block_size": 4,
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **changes,
    }


@torch.no_grad()
def init_weights(decoder: Decoder, seed: int) -> None:
    """Embedding of standard deviation 0.5, linear layers of 1/sqrt(fan_in), norms of one; a function of `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in decoder.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        std = EMBEDDING_STD if name == "embed.weight" else parameter.shape[1] ** -0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def build_tiny(
    family: Family, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", **changes: Any
) -> Pretrained:
    """A tiny model with random weights. `changes` override keys of its config.json (hidden_size=..., block_size=...)."""
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer, **changes)
    decoder = empty_decoder(family, config, dtype, device)
    init_weights(decoder, seed)
    return Pretrained(decoder, family, tokenizer, config, None, config["mask_token_id"])

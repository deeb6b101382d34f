"""The embedded tiny model of every family: a decoder of about 100,000 parameters and a tokenizer of one id per character.

It learns the tasks of data/tiny_tasks.py on two CPU cores in a minute: what `make demo`, rl_tiny and most tests run on. A larger
relative of it, for a GPU, is written to disk as a checkpoint (configs/sft_small.yaml):

    python -m models.tiny --out runs/small/random hidden_size=512 num_layers=8 num_heads=8 head_dim=64 intermediate_size=1536
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError, entry_point
from data.tiny_tasks import ALPHABET, TINY_SPECIAL_TOKENS
from models.checkpoint import Pretrained, empty_decoder, save_pretrained
from models.decoder import Decoder
from models.family import DecoderConfig, Family

TINY_SHAPE = DecoderConfig(
    vocab_size=0,  # the tokenizer's and Family.num_tiny_codes
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=192,
    rope_theta=1000.0,
)
SHAPE_FIELDS = {field.name for field in dataclasses.fields(DecoderConfig)}
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


def tiny_config(family: Family, tokenizer: Any, **changes: Any) -> dict[str, Any]:
    """config.json of a family's tiny model, under the family's own keys.

    `changes` by fields of `DecoderConfig` (hidden_size, num_layers, ...) change the shape, others are keys of config.json.
    """
    of_shape = {name: changes.pop(name) for name in SHAPE_FIELDS & changes.keys()}
    shape = dataclasses.replace(TINY_SHAPE, **{"vocab_size": len(tokenizer) + family.num_tiny_codes, **of_shape})
    return {
        **family.config_json(shape),
        "model_type": family.model_types[0],
        **({"block_size": 4} if family.attention == "block" else {}),
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
    """A tiny model with random weights. `changes` as of `tiny_config`."""
    tokenizer = tiny_tokenizer()
    config = tiny_config(family, tokenizer, **changes)
    decoder = empty_decoder(family, config, dtype, device)
    init_weights(decoder, seed)
    return Pretrained(decoder, family, tokenizer, config, None, config["mask_token_id"])


@entry_point
def main(argv: list[str] | None = None) -> None:
    from models.registry import FAMILIES

    parser = argparse.ArgumentParser(prog="python -m models.tiny", description="Write a model of random weights as a checkpoint.")
    parser.add_argument("--family", default="sdar")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="directory to write; one that is there is replaced")
    parser.add_argument("changes", nargs="*", metavar="FIELD=VALUE", help="of models.family.DecoderConfig: hidden_size=512 ...")
    options = parser.parse_args(argv)
    changes = {}
    for argument in options.changes:
        name, _, value = argument.partition("=")
        if name not in SHAPE_FIELDS - {"vocab_size"} or not value:
            raise UserError(f"{argument}: FIELD=VALUE is meant, with one of {', '.join(sorted(SHAPE_FIELDS - {'vocab_size'}))}")
        changes[name] = json.loads(value)
    model = build_tiny(FAMILIES.get(options.family, "--family"), options.seed, **changes)
    save_pretrained(model, model.decoder.state_dict(), options.out)
    print(f"{options.out}: {sum(p.numel() for p in model.decoder.parameters()):,} parameters")


if __name__ == "__main__":
    main()

"""MMaDA: LLaDA with the codes of an image tokenizer appended to the vocabulary (arXiv 2505.15809). Text only here.

The codes lie beyond the text tokenizer's ids, so they are never sampled in text and carry no probability there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from models.families import llada
from models.family import FAMILIES, DecoderConfig


def config_json(c: DecoderConfig) -> dict[str, Any]:
    return {**llada.config_json(c), "architectures": ["MMadaModelLM"], "new_vocab_size": c.vocab_size}


MMADA = dataclasses.replace(
    llada.LLADA,
    name="mmada",
    model_types=("mmada",),
    config_json=config_json,
    chat_style="llama3-mmada",
    num_tiny_codes=8,  # of 8,192
)

FAMILIES.register("mmada", MMADA)

"""Which published tensors a LoRA adapter may stand beside. Torch-free, so that a config is checked against it.

The decoder's linear layers are fused, the names of adapters are the published ones: a *target* is a name such as q_proj, and its
places are the row ranges (models/family.py: Piece) of the fused weights that are published under it.
"""

from __future__ import annotations

from common.errors import UserError
from common.registry import did_you_mean
from models.family import SMALLEST, DecoderConfig, Family, Piece

LINEAR_WEIGHTS = ("attention.qkv.weight", "attention.out.weight", "mlp.gate_up.weight", "mlp.down.weight")
"""The decoder's linear layers (models/decoder.py). Embedding and head take no adapter."""
ALL_LINEAR = "all-linear"
"""peft's word for every linear layer."""


def module_of(piece: Piece) -> str:
    """The published module that a weight belongs to: model.layers.3.self_attn.k_proj."""
    return piece.published.removesuffix(".weight")


def short_name(piece: Piece) -> str:
    """What a target list calls it: k_proj."""
    return module_of(piece).rpartition(".")[2]


def linear_pieces(family: Family, c: DecoderConfig) -> list[Piece]:
    """The published tensors that can have an adapter, in the family's order."""
    return [piece for piece in family.pieces(c) if piece.parameter.endswith(LINEAR_WEIGHTS)]


def target_names(family: Family) -> list[str]:
    """The names that `training.lora.target_modules` may hold for a family."""
    return list(dict.fromkeys(short_name(piece) for piece in linear_pieces(family, SMALLEST)))


def resolve_targets(family: Family, targets: list[str], key: str = "training.lora.target_modules") -> tuple[str, ...]:
    """The targets in the family's order, each once, `all-linear` as what it stands for. Raises UserError for unknown ones."""
    known = target_names(family)
    wanted, choices = known if ALL_LINEAR in targets else targets, ", ".join([*known, ALL_LINEAR])
    for name in targets:
        if name not in known and name != ALL_LINEAR:
            hint = did_you_mean(name, known)
            raise UserError(f"{key}: {name!r} is no linear layer of {family.name}{hint}: choose from {choices}")
    if not targets:
        raise UserError(f"{key}: got an empty list: choose from {choices}")
    return tuple(name for name in known if name in wanted)


def target_pieces(family: Family, c: DecoderConfig, targets: tuple[str, ...]) -> list[Piece]:
    """The pieces that `targets` (resolved) name, in the family's order."""
    return [piece for piece in linear_pieces(family, c) if short_name(piece) in targets]

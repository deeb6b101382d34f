"""LoRA (arXiv 2106.09685): a frozen weight W, and beside it a trained product of two thin matrices: y = x W' + (alpha / r) x A' B'.

The decoder's linear layers are fused (q, k, v in one; gate and up in one), adapters are published per unfused layer. So a fused
layer holds one pair (A, B) for each of its published parts that is a target, and adds each product to that part's rows: the same
function as peft's on the unfused model. On disk an adapter is peft's: adapter_config.json and adapter_model.safetensors.

Engine and trainer run the same modules, so both see the adapter. Weights keep their names (`layers.0.attention.qkv.weight`); the
pairs stand beside them (`layers.0.attention.qkv.adapters.q_proj.A`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.errors import UserError
from common.files import replace_directory
from models.config_json import read_object
from models.decoder import Decoder
from models.family import DecoderConfig, Family, Piece
from models.lora_targets import module_of, resolve_targets, short_name, target_pieces

if TYPE_CHECKING:
    from models.checkpoint import Pretrained

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""In front of every published name in peft's files."""
OTHER_KINDS = {
    **dict.fromkeys(["use_dora", "use_rslora", "fan_in_fan_out"], False),
    **{"alpha_pattern": {}, "rank_pattern": {}, "bias": "none"},
}
"""What makes an adapter of peft's another function than ours, with the values that do not."""
TOKENIZER_FILES = ("token", "vocab", "merges", "special_tokens", "added_tokens", "chat_template")
"""Beginnings of the names of a tokenizer's files."""


@dataclass(frozen=True)
class LoRA:
    """What an adapter is, besides its weights."""

    base: str
    """Directory or hub name of the model that it belongs to."""
    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Published names, as `resolve_targets` gives them."""
    save_merged: bool = False
    """Checkpoints also hold the merged weights."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Pair(nn.Module):
    """The adapter of one published layer. A module of its own, so that sharded weights (ZeRO-3) are gathered around its use."""

    def __init__(self, num_in: int, num_out: int, lora: LoRA, like: Tensor) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(lora.rank, num_in, dtype=like.dtype, device=like.device))
        self.B = nn.Parameter(torch.empty(num_out, lora.rank, dtype=like.dtype, device=like.device))
        self.scale = lora.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.A) * self.scale, self.B)

    def product(self) -> Tensor:
        """scale B A, what merging adds to the weight; float32."""
        return product(self.A, self.B, self.scale)


def product(A: Tensor, B: Tensor, scale: float) -> Tensor:
    return scale * (B.detach().float() @ A.detach().float())


class LoRALinear(nn.Module):
    """A (fused) linear layer, frozen, with the adapters of its published parts."""

    def __init__(self, base: nn.Linear, pieces: list[Piece], lora: LoRA) -> None:
        """pieces: the targets among the published parts of `base`."""
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.rows = {short_name(piece): (piece.start, piece.start + piece.rows) for piece in pieces}
        self.adapters = nn.ModuleDict(
            {name: Pair(base.in_features, stop - start, lora, base.weight) for name, (start, stop) in self.rows.items()}
        )
        self.dropout = 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        # Not by train()/eval(): the trainer's modules are the engine's, and what is sampled knows no dropout.
        if self.dropout and torch.is_grad_enabled():
            x = F.dropout(x, self.dropout)
        for name, (start, stop) in self.rows.items():
            y[..., start:stop] += self.adapters[name](x)
        return y


# -- in the decoder


def attach(decoder: Decoder, family: Family, lora: LoRA) -> None:
    """Put adapters of uninitialised weights beside the targets' rows. Nothing but them trains from here on."""
    decoder.requires_grad_(False)
    pieces = target_pieces(family, decoder.config, lora.targets)
    for parameter in dict.fromkeys(piece.parameter for piece in pieces):
        own = [piece for piece in pieces if piece.parameter == parameter]
        parent, name = parent_and_name(decoder, parameter.removesuffix(".weight"))
        setattr(parent, name, LoRALinear(getattr(parent, name), own, lora))


def parent_and_name(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return module.get_submodule(parent), name


def lora_layers(decoder: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in decoder.named_modules() if isinstance(module, LoRALinear)}


@torch.no_grad()
def add_adapter(model: Pretrained, lora: LoRA, seed: int) -> None:
    """A new adapter: A uniform as peft's (Kaiming, a = sqrt 5), a function of `seed` alone; B zero: nothing changes at first."""
    attach(model.decoder, model.family, lora)
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model.decoder).values():
        for pair in layer.adapters.values():
            bound = 1 / math.sqrt(pair.A.shape[1])
            pair.A.copy_((2 * torch.rand(pair.A.shape, generator=generator) - 1) * bound)
            pair.B.zero_()
    model.adapter = lora


@torch.no_grad()
def merge(model: Pretrained) -> None:
    """Add the adapter to the weights, which all train from here on."""
    for path, layer in lora_layers(model.decoder).items():
        for name, (start, stop) in layer.rows.items():
            layer.weight[start:stop] = layer.weight[start:stop].float() + layer.adapters[name].product()
        num_out, num_in = layer.weight.shape
        linear = nn.Linear(num_in, num_out, bias=layer.bias is not None, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias
        parent, name = parent_and_name(model.decoder, path)
        setattr(parent, name, linear)
    model.decoder.requires_grad_(True)
    model.adapter = None


def prepare_for_training(model: Pretrained, settings: Any, name: str, seed: int) -> None:
    """What `training.lora` (settings) asks of a model that is to be trained; name: what it was read from.

    An adapter that it was read with goes on; without a rank it is merged, and everything trains. Raises UserError.
    """
    adapter = model.adapter
    if not settings.rank:
        if adapter is not None:
            merge(model)
        return
    targets = resolve_targets(model.family, settings.target_modules)
    if adapter is None:
        base = str(Path(name).expanduser().absolute()) if model.path is not None and Path(name).expanduser().is_dir() else name
        add_adapter(model, LoRA(base, settings.rank, settings.alpha, targets), seed)
    else:
        for key, asked, there in [
            ("rank", settings.rank, adapter.rank),
            ("alpha", settings.alpha, adapter.alpha),
            ("target_modules", list(targets), list(adapter.targets)),
        ]:
            if asked != there:
                raise UserError(
                    f"training.lora.{key}: got {asked}, the adapter in {name} has {there}: give that, or training.lora.rank=null, "
                    "which merges the adapter and trains all weights"
                )
    model.adapter = dataclasses.replace(model.adapter, save_merged=settings.save_merged)
    for layer in lora_layers(model.decoder).values():
        layer.dropout = settings.dropout


# -- on disk


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter instead of a model."""
    return (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file()


def tensor_names(family: Family, c: DecoderConfig, targets: tuple[str, ...]) -> dict[str, str]:
    """{peft's name: the decoder's} of every tensor of an adapter."""
    names = {}
    for piece in target_pieces(family, c, targets):
        ours = f"{piece.parameter.removesuffix('.weight')}.adapters.{short_name(piece)}"
        for kind in "AB":
            names[f"{PREFIX}{module_of(piece)}.lora_{kind}.weight"] = f"{ours}.{kind}"
    return names


def read_config(path: Path) -> dict[str, Any]:
    """adapter_config.json. Raises UserError where its adapter is not plain LoRA."""
    file = path / ADAPTER_CONFIG
    config = read_object(file)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type is {config.get('peft_type')!r}, only LORA is read: merge it into its base with peft")
    for key, plain in OTHER_KINDS.items():
        if config.get(key) not in (plain, None):
            raise UserError(f"{file}: {key} is {config[key]!r}, only plain LoRA is read: merge it into its base with peft")
    for key in ("base_model_name_or_path", "r", "lora_alpha"):
        if not config.get(key):
            raise UserError(f"{file}: {key} is missing: add it")
    return config


def load_adapter(model: Pretrained, path: Path, ignore: tuple[str, ...] = ()) -> None:
    """Put the adapter in `path` beside the weights of its base, `model`. Raises UserError.

    ignore: published names of tensors that may be there and are not the adapter's (a value head).
    """
    config = read_config(path)
    file = path / ADAPTER_WEIGHTS
    if not file.is_file():
        raise UserError(f"{path}: no {ADAPTER_WEIGHTS}: save the adapter as safetensors")
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys() if name.removeprefix(PREFIX) not in ignore}
    except SafetensorError as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}): save it again") from error
    # peft's target_modules may be a pattern: the tensors say what it came to.
    of_linear = tensor_names(model.family, model.decoder.config, resolve_targets(model.family, ["all-linear"]))
    strange = sorted(set(tensors) - set(of_linear))
    if strange:
        raise UserError(
            f"{file}: {len(strange)} tensors are no LoRA of a {model.family.name} model's linear layers, "
            f"the first is {strange[0]}: merge it into its base with peft"
        )
    found = {of_linear[name].rpartition(".")[0].rpartition(".")[2] for name in tensors}
    targets = resolve_targets(model.family, sorted(found), str(file))
    names = tensor_names(model.family, model.decoder.config, targets)
    missing = [name for name in names if name not in tensors]
    if missing:
        raise UserError(f"{file}: {len(missing)} tensors are missing, the first is {missing[0]}: every layer needs its own")
    lora = LoRA(config["base_model_name_or_path"], config["r"], float(config["lora_alpha"]), targets)
    attach(model.decoder, model.family, lora)
    parameters = dict(model.decoder.named_parameters())
    with torch.no_grad():
        for name, own in names.items():
            if tensors[name].shape != parameters[own].shape:
                raise UserError(
                    f"{file}: tensor {name} has shape {list(tensors[name].shape)}, rank {lora.rank} and the base, {lora.base}, "
                    f"make it {list(parameters[own].shape)}: is it the adapter's base?"
                )
            parameters[own].copy_(tensors[name])
    model.adapter, model.source = lora, path


def save_adapter(model: Pretrained, state: dict[str, Tensor], folder: Path, extra: dict[str, Tensor] | None = None) -> None:
    """Write the adapter in `state` (the decoder's) in peft's format, with the tokenizer. Written beside and renamed.

    extra: further trained tensors under their published names (a value head), whole, as peft's `modules_to_save` has them.
    """
    lora, c, extra = model.adapter, model.decoder.config, extra or {}
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {theirs: state[ours] for theirs, ours in tensor_names(model.family, c, lora.targets).items()}
    tensors |= {PREFIX + name: tensor for name, tensor in extra.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, partial / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lora.base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": exported_targets(model.family, c, lora.targets),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in extra}) or None,
        "init_lora_weights": True,
        "inference_mode": True,
        **OTHER_KINDS,
    }
    (partial / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if model.path is not None:
        for file in sorted(model.path.iterdir()):
            if file.is_file() and file.name.startswith(TOKENIZER_FILES):
                shutil.copyfile(file, partial / file.name)
    elif model.tokenizer is not None:
        model.tokenizer.save_pretrained(partial)
    replace_directory(partial, folder)


def exported_targets(family: Family, c: DecoderConfig, targets: tuple[str, ...]) -> list[str]:
    """Short names; whole ones where peft, which compares the ends of names, would take another tensor for one too."""
    pieces = target_pieces(family, c, targets)
    own = {piece.published for piece in pieces}
    others = {short_name(piece) for piece in family.pieces(c) if piece.published not in own}
    return sorted({module_of(piece) if short_name(piece) in others else short_name(piece) for piece in pieces})


def read_extra(path: Path, name: str) -> Tensor | None:
    """A tensor that `save_adapter` was given as extra, or None where the adapter in `path` has none of that name."""
    with safe_open(path / ADAPTER_WEIGHTS, framework="pt") as handle:
        return handle.get_tensor(PREFIX + name) if PREFIX + name in handle.keys() else None


def merged_state(model: Pretrained, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` (the decoder's) with the adapter added to the weights; sums in float32, then rounded to the weights' precision."""
    merged = dict(state)
    for piece in target_pieces(model.family, model.decoder.config, model.adapter.targets):
        pair = f"{piece.parameter.removesuffix('.weight')}.adapters.{short_name(piece)}"
        weight = merged[piece.parameter]
        if weight is state[piece.parameter]:
            weight = merged[piece.parameter] = weight.detach().clone()
        rows = weight[piece.start : piece.start + piece.rows]
        rows.copy_(rows.float() + product(state[f"{pair}.A"], state[f"{pair}.B"], model.adapter.scale).to(rows.device))
    return merged


def merged_folder(folder: str | os.PathLike) -> Path:
    """Where the merged weights of a checkpoint go: NAME-merged beside NAME."""
    folder = Path(folder)
    return folder.with_name(f"{folder.name}-merged")

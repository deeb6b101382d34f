"""Checkpoints in and out: a Hugging Face directory or hub name <-> the decoder.

What is written carries the published tensor names, config.json with its extra keys, the tokenizer and the remote-code files of
the checkpoint it came from, so that the original remote code, SGLang or LMDeploy load it.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import UserError
from common.files import replace_directory
from models.config_json import check_config_block_size, check_token_ids, decoder_shape, read_object
from models.decoder import Decoder
from models.family import TINY_RANDOM, Family, Piece
from models.lora import ADAPTER_CONFIG, LoRA, is_adapter, load_adapter, merged_folder, merged_state, read_config, save_adapter
from models.names import is_path, no_directory
from models.registry import FAMILIES

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".safetensors.index.json", ".bin.index.json", ".gguf", ".h5", ".msgpack")
SHARD_SIZE = "5GB"


@dataclass
class Pretrained:
    """A model that was read, with all that sampling, training and writing it again need."""

    decoder: Decoder
    family: Family
    tokenizer: Any
    """The checkpoint's tokenizer (transformers), or None where it has none."""
    config: dict[str, Any]
    """config.json, extra keys included."""
    path: Path | None
    """Directory it was read from; None for one made on the spot."""
    mask_id: int
    adapter: LoRA | None = None
    """The LoRA adapter that stands beside the weights; `path` is then that of its base."""
    source: Path | None = None
    """Directory that was named: `path`, or the adapter's, also where it has been merged since."""

    @property
    def eos_ids(self) -> list[int]:
        """Ids that end a turn, from config.json, the tokenizer and the family."""
        ids = self.config.get("eos_token_id")
        ids = list(ids) if isinstance(ids, (list, tuple)) else [ids]
        if self.tokenizer is not None:
            ids.append(self.tokenizer.eos_token_id)
            if self.family.stop_tokens:
                special = self.tokenizer.get_added_vocab()
                ids += [special.get(token) for token in self.family.stop_tokens]
        return sorted({i for i in ids if i is not None})

    @property
    def fill_id(self) -> int:
        """What fills a last block, or a canvas, behind its stop token: the pad id, or the end id where there is none that can be
        sampled. The fill is trained, and a pad that is the mask token, say, has no probability to raise."""
        pads = [self.config.get("pad_token_id"), None if self.tokenizer is None else self.tokenizer.pad_token_id]
        fill = next((n for n in [*pads, *self.eos_ids] if n is not None and n not in self.forbidden_ids), None)
        if fill is None:
            raise UserError(
                f"{self.path}: no token to fill responses up with: neither config.json nor the tokenizer names a pad or an end "
                "token that can be sampled: add pad_token_id or eos_token_id to config.json"
            )
        return fill

    @functools.cached_property
    def forbidden_ids(self) -> list[int]:
        """Ids that are never sampled and carry no probability: the mask, and rows of the vocabulary beyond the tokenizer.

        One list for the engine and the trainer: a token's log-probability must not depend on which of them computes it.
        """
        vocab_size = self.decoder.config.vocab_size
        known = vocab_size if self.tokenizer is None else max(self.tokenizer.get_vocab().values()) + 1
        return sorted({self.mask_id, *range(known, vocab_size)})


def find_directory(name: str, setting: str = "model.pretrained_model") -> Path:
    """A local directory as it is, a hub name as its downloaded snapshot. Raises UserError blaming `setting`."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and not is_adapter(path):
            raise UserError(f"{setting}: {name} has no config.json, nor {ADAPTER_CONFIG}: name a Hugging Face model directory")
        return path
    if path.exists():
        raise UserError(f"{setting}: {name} is a file: name the directory that holds config.json")
    if is_path(name):
        raise no_directory(name, setting)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf"]))
    except Exception as error:  # the hub raises a dozen kinds: all mean that the model is not to be had
        if path.parent.is_dir():  # runs/x, and there is runs: a directory was meant, of which the hub has nothing to say
            raise no_directory(name, setting) from error
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{setting}: {name} is neither a directory here nor to be had from the hub "
            f"({type(error).__name__}: {reason}): download it and give its path"
        ) from error


def check_family(config: dict[str, Any], family: Family, model_base: str, where: str) -> None:
    model_type = config.get("model_type")
    if model_type not in family.model_types:
        fitting = [name for name in FAMILIES if model_type in FAMILIES.get(name).model_types]
        hint = f"set model.model_base to {' or '.join(fitting)}" if fitting else "no known family reads it"
        raise UserError(
            f"model.model_base: {model_base} reads model_type {'/'.join(family.model_types)}, {where} says {model_type!r}: {hint}"
        )


def find_mask_id(config: dict[str, Any], family: Family, tokenizer: Any, vocab_size: int, where: str) -> int:
    """config.json's word, else the tokenizer's, else the family's published id; vocab_size: the decoder's, which may have more rows
    than config.json has words. Raises UserError where none fits."""
    if config.get("mask_token_id") is not None:
        found = config["mask_token_id"]
    elif tokenizer is not None:
        vocabulary = tokenizer.get_vocab()
        if family.mask_token not in vocabulary:
            raise UserError(
                f"{where}: no mask token: config.json has no mask_token_id and the tokenizer has no {family.mask_token!r}: "
                "add one of them, or choose another model.model_base"
            )
        found = vocabulary[family.mask_token]
    else:
        found = family.mask_token_id
    if not 0 <= found < vocab_size:
        raise UserError(f"{where}: mask token id {found} lies outside the vocabulary of {vocab_size}: mend config.json")
    return found


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in `path`, or None where the directory has none."""
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        return None
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if (path / "tokenizer.json").is_file():
            # Whole in itself. AutoTokenizer would look the model type up first, and warn that it knows none of ours.
            return PreTrainedTokenizerFast.from_pretrained(path)
        return AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: its tokenizer cannot be read ({type(error).__name__}: {reason}): mend or remove it") from error


def check_tokenizer(model: Pretrained) -> None:
    """Raises UserError where the checkpoint has no tokenizer. Every job needs one; a model alone (the golden sets) does not."""
    if model.tokenizer is None:
        raise UserError(f"{model.path}: no tokenizer (tokenizer.json): copy the files of the published checkpoint's there")


def check_block_size(model: Pretrained, size: int, setting: str, becomes: int | None = None) -> None:
    """Raises UserError where `setting` runs a block model in blocks of another `size` than its config.json says, and not in those
    of the size that it `becomes` (`model.block_size`) either."""
    trained = model.family.config_block_size(model.config)
    if model.family.attention == "block" and trained is not None and size not in (trained, becomes):
        to_other = f"model.block_size to {size}" if becomes is None else f"it to {becomes}, as model.block_size"
        raise UserError(
            f"{setting}: got {size}, but the checkpoint's config.json says block_size {trained}: "
            f"set it to {trained}, or, where the model is to become another's, set {to_other}"
        )


def load_pretrained(
    name: str,
    model_base: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
    ignore: tuple[str, ...] = (),
    check: Callable[[Pretrained], None] = lambda model: None,
    setting: str = "model.pretrained_model",
) -> Pretrained:
    """Read a checkpoint. `seed` makes the weights of the reserved name "tiny-random"; `ignore` as in `load_weights`; `setting` is
    the config key that gave the name.

    `check` is called with the model before its weights are read: what raises there is known at once. A LoRA adapter in peft's
    format is read with the base that it names. Raises UserError naming what is wrong.
    """
    family = FAMILIES.get(model_base, "model.model_base")
    if name == TINY_RANDOM:
        from models.tiny import build_tiny

        model = build_tiny(family, seed=seed, dtype=dtype, device=device)
        check(model)
        return model
    path = find_directory(name, setting)
    if is_adapter(path):
        model = load_base(path, model_base, dtype, device, seed, ignore, check, setting)
        load_adapter(model, path, ignore)
        return model
    file = path / "config.json"
    config = read_object(file)
    check_family(config, family, model_base, str(file))
    tokenizer = load_tokenizer(path)
    decoder = empty_decoder(family, config, dtype, device, str(file))
    check_token_ids(config, str(file), decoder.config.vocab_size)
    check_config_block_size(family, config, str(file))
    mask_id = find_mask_id(config, family, tokenizer, decoder.config.vocab_size, str(path))
    model = Pretrained(decoder, family, tokenizer, config, path, mask_id, source=path)
    check(model)
    load_weights(model.decoder, family, path, ignore)
    return model


def load_base(path: Path, model_base: str, *arguments: Any) -> Pretrained:
    """The model that the adapter in `path` belongs to; arguments as of `load_pretrained`. Raises UserError."""
    base = read_config(path)["base_model_name_or_path"]
    try:
        model = load_pretrained(base, model_base, *arguments)
    except UserError as error:
        raise UserError(f"{path / ADAPTER_CONFIG}: base_model_name_or_path {base}: {error}") from error
    if model.adapter is not None:
        raise UserError(f"{path / ADAPTER_CONFIG}: base_model_name_or_path {base} is an adapter itself: name a whole model")
    return model


def empty_decoder(
    family: Family, config: dict[str, Any], dtype: torch.dtype, device: torch.device | str, where: str = "config.json"
) -> Decoder:
    """A decoder of the shape that `config`, from the file `where`, says, with uninitialised weights. Raises UserError."""
    with torch.device("meta"):
        decoder = Decoder(decoder_shape(family, config, where))
    decoder = decoder.to(dtype).to_empty(device=device)
    if decoder.config.tie_word_embeddings:  # to_empty unties
        decoder.lm_head.weight = decoder.embed.weight
    return decoder


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or model.safetensors, or all there are."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        advice = "download it again, or remove it where all weights are in model.safetensors"
        weight_map = read_object(index, advice).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{index}: no weight_map from tensors to files: {advice}")
        names = sorted(set(weight_map.values()))
        for name in names:
            if not (path / name).is_file():
                raise UserError(f"{path}: shard {name}, which its index names, is missing: download it again")
        return [path / name for name in names]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path}: no .safetensors file: convert the checkpoint to safetensors")
    return files


def load_weights(decoder: Decoder, family: Family, path: Path, ignore: tuple[str, ...] = ()) -> None:
    """Copy every published tensor of `path` into its rows of the decoder; a missing, surplus or misshapen one is an error.

    `ignore`: names whose presence or absence does not matter (the heads of a value model).
    """
    parameters = dict(decoder.named_parameters())
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for file in weight_files(path):
            try:
                handle = stack.enter_context(safe_open(file, framework="pt"))
            except SafetensorError as error:
                raise UserError(f"{file}: not a whole safetensors file ({error}): download it again") from error
            for name in handle.keys():
                where[name] = handle
        pieces = family.pieces(decoder.config)
        surplus = set(where) - {piece.published for piece in pieces} - set(ignore)
        surplus = {name for name in surplus if not name.endswith("rotary_emb.inv_freq")}
        missing = [piece.published for piece in pieces if piece.published not in {*where, *ignore}]
        if missing:
            raise UserError(
                f"{path}: {len(missing)} tensors are missing, the first is {missing[0]}: not a {family.name} checkpoint?"
            )
        if decoder.config.tie_word_embeddings and surplus == {family.head_name}:
            # Some writers store the tied head as well: it has to be the embedding then.
            embedding = next(piece.published for piece in pieces if piece.parameter == "embed.weight")
            head, tied = (where[name].get_tensor(name) for name in (family.head_name, embedding))
            if not torch.equal(head, tied):
                raise UserError(
                    f"{path}: config.json ties the head, but {family.head_name} differs from {embedding}: mend config.json"
                )
            surplus = set()
        if surplus:
            raise UserError(
                f"{path}: {len(surplus)} tensors are not part of a {family.name} model, the first is {min(surplus)}: "
                "is model.model_base right?"
            )
        with torch.no_grad():
            for piece in pieces:
                if piece.published not in where:
                    continue
                target = piece_view(parameters, piece)
                shape = tuple(where[piece.published].get_slice(piece.published).get_shape())
                if shape != tuple(target.shape):
                    raise UserError(
                        f"{path}: tensor {piece.published} has shape {list(shape)}, config.json makes it {list(target.shape)}"
                    )
                target.copy_(where[piece.published].get_tensor(piece.published))


def read_tensor(path: Path, name: str) -> Tensor | None:
    """One tensor of a checkpoint, or None where it has none of that name."""
    for file in weight_files(path):
        with safe_open(file, framework="pt") as handle:
            if name in handle.keys():
                return handle.get_tensor(name)
    return None


def piece_view(parameters: dict[str, Tensor], piece: Piece) -> Tensor:
    """The rows of a decoder parameter that are one published tensor."""
    return parameters[piece.parameter][piece.start : piece.start + piece.rows]


def published_state(state: dict[str, Tensor], family: Family, decoder: Decoder) -> dict[str, Tensor]:
    """A decoder's state dict under the published names, on the CPU (copies: fused rows would share one storage)."""
    pieces = family.pieces(decoder.config)
    if decoder.lm_head is None:  # a value model's
        pieces = [piece for piece in pieces if not piece.parameter.startswith("lm_head.")]
    return {
        piece.published: torch.empty_like(view, device="cpu").copy_(view)
        for piece in pieces
        for view in [piece_view(state, piece).detach()]
    }


def save_pretrained(
    model: Pretrained, state: dict[str, Tensor], folder: str | os.PathLike, extra: dict[str, Tensor] | None = None
) -> None:
    """Write `state` (the decoder's, whole, under its own names) as a checkpoint like the one `model` was read from.

    Written beside and renamed; an existing `folder` is replaced as a whole. Of a model with an adapter that alone is written, in
    peft's format, and with `adapter.save_merged` the merged weights as FOLDER-merged. `extra`: tensors that are not the decoder's,
    under their published names.
    """
    from huggingface_hub import save_torch_state_dict

    folder = Path(folder)
    if model.adapter is not None:
        save_adapter(model, state, folder, extra)
        if model.adapter.save_merged:
            save_pretrained(replace(model, adapter=None), merged_state(model, state), merged_folder(folder), extra)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    tensors = published_state(state, model.family, model.decoder)
    tensors |= {name: tensor.detach().cpu() for name, tensor in (extra or {}).items()}
    save_torch_state_dict(tensors, partial, max_shard_size=SHARD_SIZE, metadata={"format": "pt"})
    if model.path is not None:
        for file in sorted(model.path.iterdir()):
            if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES) and not file.name.startswith("."):
                shutil.copyfile(file, partial / file.name)
    elif model.tokenizer is not None:
        model.tokenizer.save_pretrained(partial)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    # Both spellings: remote code of 2025 reads torch_dtype, transformers 5 reads dtype.
    config = {**model.config, "torch_dtype": dtype}
    if "dtype" in config:
        config["dtype"] = dtype
    (partial / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    replace_directory(partial, folder)

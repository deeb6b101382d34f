"""config.json and its like, read with all that can be wrong in them told in one line. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

from common.errors import UserError
from models.family import DecoderConfig, Family

MARKED = DecoderConfig(1009, 132, num_layers=5, num_heads=6, num_kv_heads=3, head_dim=22, intermediate_size=19, rope_theta=17.0)
"""A shape that a model may have and all of whose numbers differ, so that they can be found again under a family's keys."""
NUMBERS = {field.name: field.type for field in dataclasses.fields(DecoderConfig) if field.type in ("int", "float")}


def read_object(file: Path, advice: str = "mend it") -> dict[str, Any]:
    """The JSON object in `file`. Raises UserError where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not JSON ({error}): {advice}") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}): {advice}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: got a {type(found).__name__}, expected an object with keys: {advice}")
    return found


@functools.cache
def keys_of_shape(family: Family) -> dict[str, list[str]]:
    """{field of DecoderConfig: the family's keys of config.json for it}, of those that are numbers; none where it cannot say."""
    try:
        keys = family.config_json(MARKED)
    except Exception:  # a user's function, of a shape that the user never gave: the keys only word messages
        keys = {}
    return {name: [key for key, value in keys.items() if value == getattr(MARKED, name)] for name in NUMBERS}


def is_fit(field: str, value: Any) -> bool:
    """Whether a shape can have that number."""
    if isinstance(value, bool) or not isinstance(value, int if NUMBERS[field] == "int" else (int, float)):
        return False
    return math.isfinite(value) and value > 0


def null_size(family: Family, config: dict[str, Any]) -> str | None:
    """The key of a config.json of which no shape can be made that is null, and that the family cannot do without. Other nulls may
    mean something to the family, so they stay."""
    sizes = {key for names in keys_of_shape(family).values() for key in names}
    try:
        family.decoder_config({key: value for key, value in config.items() if value is not None or key not in sizes})
    except KeyError as error:
        return error.args[0]
    except Exception:  # there is more wrong with it, which its caller knows
        pass
    return None


def decoder_shape(family: Family, config: dict[str, Any], where: str) -> DecoderConfig:
    """The shape that a config.json says. Raises UserError with file and key: `where` is the file."""

    def unfit(field: str, value: Any, key: str) -> UserError:
        meant = "a whole number above 0" if NUMBERS[field] == "int" else "a number above 0"
        return UserError(f"{where}: {key} is {value!r}, must be {meant}: mend it")

    def missing(key: str) -> UserError:
        return UserError(f"{where}: {key} is missing: take it from the published checkpoint's")

    keys = keys_of_shape(family)
    for field, names in keys.items():
        for key in names:
            if config.get(key) is not None and not is_fit(field, config[key]):
                raise unfit(field, config[key], key)
    try:
        shape = family.decoder_config(config)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('config.json: ')}") from error
    except KeyError as error:
        raise missing(error.args[0]) from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        null = null_size(family, config)
        if null is not None:
            raise missing(null) from error
        raise UserError(f"{where}: no shape of a {family.name} model ({error}): compare it with the published one") from error
    for field in NUMBERS:
        value = getattr(shape, field)
        if not is_fit(field, value):
            null = null_size(family, config) if value is None else None
            if null is not None:
                raise missing(null)
            key = next((key for key in keys[field] if key in config), None)
            raise unfit(field, value, field) if key is None else unfit(field, config[key], key)
    if shape.num_heads % shape.num_kv_heads:
        raise UserError(
            f"{where}: {shape.num_heads} heads cannot share {shape.num_kv_heads} of keys and values: the one must divide the other"
        )
    if shape.head_dim % 2:
        raise UserError(f"{where}: makes heads {shape.head_dim} wide, must be even: mend the width or the number of heads")
    return shape


def check_token_ids(config: dict[str, Any], where: str, vocab_size: int) -> None:
    """Raises UserError where a special token of config.json is no id of the vocabulary, or several where one is meant."""
    for key in ("mask_token_id", "pad_token_id", "eos_token_id"):
        value = config.get(key)
        several = isinstance(value, list) and key == "eos_token_id"
        for one in value if several else [value]:
            if one is not None and (isinstance(one, bool) or not isinstance(one, int)):
                raise UserError(f"{where}: {key} is {value!r}, must be a token id{' or a list of them' * several}: mend it")
            if one is not None and key != "mask_token_id" and not 0 <= one < vocab_size:  # the mask: find_mask_id
                raise UserError(f"{where}: {key} {one} lies outside the vocabulary of {vocab_size}: mend it, or set it to null")


def check_config_block_size(family: Family, config: dict[str, Any], where: str) -> None:
    """Raises UserError where a config.json says a block size that is none."""
    size = family.config_block_size(config)
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise UserError(f"{where}: block_size is {size!r}, must be a whole number above 0: mend it, or set it to null")

"""Data of supervised finetuning: prompt and response, optionally with the step at which each response token was revealed.

A record is one of these (docs/sft.md; `python -m data.prepare_sft` makes them from chat data):

    {"prompt": text, "response": text}                                one user's turn, rendered in the model's chat format at load
    {"prompt": text, "prompt_is_rendered": true, "response": text}    the text before the response as it stands
    {"messages": [{"role": ..., "content": ...}, ...], "response": text}    a longer conversation, rendered at load
    {"prompt_ids": [...], "response_ids": [...], "step_map": [...], "num_response": N}    a rollout: token ids as sampled

and may have `id` and `step_map`: per response token the 1-based step that revealed it, 0 for never. Where it is longer than the
response, it goes on with the end token and the fill of the last block.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any, Callable, TypeVar

import numpy as np

from common.errors import UserError
from data.prompts import encode, end_token, render_chat, render_messages
from data.tasks import DATA_DIR, find_file, read_records

T = TypeVar("T")
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class SFTRecord:
    id: str
    prompt: str
    response: str
    step_map: list[int] | None = None
    """1-based step that revealed each response token (trace SFT); None: not recorded."""
    messages: list[dict[str, str]] | None = None
    """The conversation before the response; in place of `prompt`."""
    is_rendered: bool = False
    """Whether `prompt` is the text that the model sees, chat format included."""
    prompt_ids: list[int] | None = None
    """With response_ids: in place of texts."""
    response_ids: list[int] | None = None
    num_response: int | None = None
    """Of response_ids, those that are trained; the others were visible behind the stop token."""


def load_sft(
    name_or_path: str | os.PathLike, data_type: str | None = None, folder: str | os.PathLike = DATA_DIR
) -> list[SFTRecord]:
    """The records of an SFT data set. With data_type `exact`, task records (question, ground_truth_answer) serve too.

    Raises UserError with the file, the number of the record (counted from 1) and the field.
    """
    path = find_file(name_or_path, folder)
    result = []
    for index, record in enumerate(read_records(path)):
        if data_type == "exact" and "prompt" not in record and "question" in record:
            answer = record.get("ground_truth_answer")
            record = {**record, "prompt": record["question"], "response": answer if answer is None else str(answer)}
        problem = record_problem(record)
        if problem is not None:
            raise UserError(f"{path}: record {index + 1}: {problem} (data of supervised finetuning)")
        result.append(as_record(record, f"{path.stem}:{index}"))
    return result


def as_record(record: dict[str, Any], default_id: str) -> SFTRecord:
    """A record without a `record_problem`."""
    own_id = record.get("id", record.get("task_id"))
    record_id = default_id if own_id is None else str(own_id)
    if "response_ids" in record:
        ids = record["prompt_ids"], record["response_ids"], record.get("num_response", len(record["response_ids"]))
        return SFTRecord(record_id, "", "", record.get("step_map"), None, False, *ids)
    messages, is_rendered = record.get("messages"), bool(record.get("prompt_is_rendered", False))
    return SFTRecord(record_id, record.get("prompt", ""), record["response"], record.get("step_map"), messages, is_rendered)


def response_end(tokenizer: Any, chat_style: str, is_chat: bool) -> int | None:
    """Id of the token that every response is ended with, if there is one."""
    return end_token(chat_style, tokenizer) if is_chat else tokenizer.eos_token_id


def encode_sft(
    record: SFTRecord, tokenizer: Any, chat_style: str, is_chat: bool, use_template: bool = True
) -> tuple[list[int], list[int]]:
    """Token ids of prompt and response; the response ends with the token that ends an answer. Rollouts are as they were sampled.

    is_chat: whether prompts of the data type are a user's turn (else they are the whole text). use_template: whether the
    tokenizer's own chat template comes before the fixed form of `chat_style`.
    """
    if record.response_ids is not None:
        return list(record.prompt_ids), list(record.response_ids)
    if record.messages is not None:
        text = render_messages(record.messages, chat_style, tokenizer, use_template)
    elif is_chat and not record.is_rendered:
        text = render_chat(record.prompt, chat_style, tokenizer, use_template)
    else:
        text = record.prompt
    response_ids = encode(tokenizer, record.response)
    end = response_end(tokenizer, chat_style, is_chat)
    if end is not None and response_ids[-1:] != [end]:
        response_ids.append(end)
    return encode(tokenizer, text), response_ids


def prompt_key(record: SFTRecord) -> str:
    """Equal for records of one prompt."""
    return json.dumps([record.prompt, record.is_rendered, record.messages, record.prompt_ids])


def split(records: list[T], share: float, seed: int, key: Callable[[T], str] = prompt_key) -> tuple[list[T], list[T]]:
    """(what stays, what is held out), both in their order: `share` of the prompts, rounded, at least one, chosen by `seed`, with
    all their records: no prompt is on both sides. Raises UserError where nothing would stay.
    """
    if not share:
        return records, []
    prompts = list(dict.fromkeys(key(record) for record in records))
    number = max(1, round(share * len(prompts)))
    if number >= len(prompts):
        raise UserError(f"{len(prompts)} prompts are too few to hold out a share of {share}: take more data, or hold out none")
    held_out = {prompts[i] for i in np.random.default_rng([seed, len(prompts)]).permutation(len(prompts))[:number]}
    parts: tuple[list[T], list[T]] = ([], [])
    for record in records:
        parts[key(record) in held_out].append(record)
    return parts


def record_problem(record: dict[str, Any]) -> str | None:
    """What is wrong with a record, in words."""
    if "response_ids" in record:
        return _ids_problem(record)
    is_conversation = "messages" in record and "prompt" not in record
    for name in ("messages", "response") if is_conversation else ("prompt", "response"):
        value, kind = record.get(name), list if name == "messages" else str
        if value is None and name == "response" and is_conversation:
            return "field 'response' is missing: `python -m data.prepare_sft` takes it from the last turn of `messages`"
        if value is None:
            return f"field {name!r} is missing"
        if not isinstance(value, kind):
            return f"field {name!r} is {type(value).__name__}, wanted {'a list of turns' if kind is list else 'text'}"
        if not value:
            return f"field {name!r} is empty"
    if is_conversation:
        for message in record["messages"]:
            if not isinstance(message, dict) or not isinstance(message.get("content"), str) or message.get("role") not in ROLES:
                return f"field 'messages' has a turn that is not {{role: {' | '.join(ROLES)}, content: text}}"
    if not isinstance(record.get("prompt_is_rendered", False), bool):
        return "field 'prompt_is_rendered' is not true or false"
    return _steps_problem(record.get("step_map"))


def _ids_problem(record: dict[str, Any]) -> str | None:
    for name in ("prompt_ids", "response_ids"):
        if not _is_list_of_numbers(record.get(name)):
            return f"field {name!r} is not a list of whole numbers from 0"
    length, number, steps = len(record["response_ids"]), record.get("num_response"), record.get("step_map")
    if not length:
        return "field 'response_ids' is empty"
    if number is not None and not (type(number) is int and 0 <= number <= length):
        return f"field 'num_response' is {number!r}, wanted a number of tokens up to {length}"
    if steps is not None and _is_list_of_numbers(steps) and len(steps) != length:
        return f"field 'step_map' has {len(steps)} entries, response_ids {length}"
    return _steps_problem(steps)


def _steps_problem(steps: Any) -> str | None:
    if steps is not None and not _is_list_of_numbers(steps):
        return "field 'step_map' is not a list of whole numbers from 0"
    return None


def _is_list_of_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)

"""Turn chat records or prompt/response records into data of supervised finetuning.

    python -m data.prepare_sft chats.jsonl --out data/chats.json --held-out 0.05
    python -m data.prepare_sft open-r1/OpenR1-Math-220k --out data/openr1.json --tokenizer JetLM/SDAR-4B-Chat --max-response 8192
    python -m data.prepare_sft data/chats.json --out data/chats_steps.json --sample-steps JetLM/SDAR-4B-Chat --model-base sdar

INPUT is a json, jsonl or parquet file, the name of one in data/, or a data set of the hub. Records may be

    {"messages": [{"role": ..., "content": ...}, ...]}          the last assistant turn is the response, the turns before it
    {"conversations": [{"from": "human", "value": ...}, ...]}   are the prompt
    {"prompt": ..., "response": ...}                            or question/answer, problem/solution, instruction (+ input)/output
    rollouts of an RL run (rollouts/step_*.jsonl)               token ids and step maps as sampled, of right answers: --only-correct

What is dropped is counted, by reason. The result is a function of the input and the options alone.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

from common.errors import UserError, entry_point
from data.sft import ROLES, SFTRecord, as_record, encode_sft, prompt_key, record_problem, split
from data.tasks import SUFFIXES, find_file, read_records
from data.tiny_tasks import write_records

ROLE_NAMES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "function": "tool"}
"""Other names of roles."""
FIELD_PAIRS = [
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("problem", "solution"),
    ("question", "ground_truth_answer"),
    ("query", "response"),
    ("input", "output"),
]
"""Names of prompt and response that are looked for, in this order."""


class Dropped(Exception):
    """Why a record is left out."""


# ---- one record --------------------------------------------------------------------------------------------------------


def convert(row: dict[str, Any], prompt_field: str | None = None, response_field: str | None = None) -> dict[str, Any]:
    """A record as it was found -> a record of data/sft.py. Raises Dropped."""
    if "response_ids" in row:
        return _rollout(row)
    named = prompt_field is not None or response_field is not None
    if not named and "response" not in row:
        for name in ("messages", "conversations", "conversation"):
            if name in row:
                return _with_extras(row, _conversation(row[name]))
    if not named and isinstance(row.get("messages"), list) and "prompt" not in row:  # ours already: the response is apart
        return _with_extras(row, _prompt_of(_turns(row["messages"])) | {"response": _response(row["response"])})
    pairs = [(prompt_field or "prompt", response_field or "response")] if named else FIELD_PAIRS
    for prompt_name, response_name in pairs:
        if prompt_name in row and response_name in row:
            return _with_extras(row, _pair(row, prompt_name, response_name))
    raise Dropped("no prompt and response found")


def _with_extras(row: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    kept = {name: row[name] for name in ("id", "prompt_is_rendered", "step_map") if name in row}
    if "id" in kept:
        kept["id"] = str(kept["id"])
    return {**kept, **record}


def _pair(row: dict[str, Any], prompt_name: str, response_name: str) -> dict[str, Any]:
    prompt, response = row[prompt_name], row[response_name]
    if isinstance(response, list) and response and isinstance(response[-1], dict):  # [{"role": "assistant", ...}]
        response = _content(response[-1])
    if isinstance(prompt, list):
        return _prompt_of(_turns(prompt)) | {"response": _response(response)}
    if not isinstance(prompt, str):
        raise Dropped("prompt is not text")
    extra = row.get("input") if prompt_name == "instruction" else None
    if isinstance(extra, str) and extra.strip():
        prompt = f"{prompt}\n{extra}"
    if not prompt.strip():
        raise Dropped("empty prompt")
    system = row.get("system")
    if isinstance(system, str) and system.strip() and not row.get("prompt_is_rendered"):
        turns = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        return {"messages": turns, "response": _response(response)}
    return {"prompt": prompt, "response": _response(response)}


def _conversation(value: Any) -> dict[str, Any]:
    """The last assistant turn is the response; turns behind it are left out."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise Dropped("conversation is not a list of turns") from None
    turns = _turns(value)
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    if last is None:
        raise Dropped("no assistant turn")
    return _prompt_of(turns[:last]) | {"response": _response(turns[last]["content"])}


def _turns(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise Dropped("conversation is not a list of turns")
    turns = []
    for turn in value:
        role = turn.get("role", turn.get("from"))
        role = ROLE_NAMES.get(role, role)
        if role not in ROLES:
            raise Dropped("unknown role")
        turns.append({"role": role, "content": _content(turn)})
    return turns


def _content(turn: dict[str, Any]) -> str:
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise Dropped("a turn is not text")
    return content


def _prompt_of(turns: list[dict[str, str]]) -> dict[str, Any]:
    if not any(turn["role"] == "user" and turn["content"].strip() for turn in turns):
        raise Dropped("empty prompt")
    if len(turns) == 1:
        return {"prompt": turns[0]["content"]}
    return {"messages": turns}


def _response(value: Any) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Dropped("empty response")
    if not isinstance(value, str):
        raise Dropped("response is not text")
    return value


def _rollout(row: dict[str, Any]) -> dict[str, Any]:
    if not row["response_ids"] or not row.get("num_response", 1):
        raise Dropped("empty response")
    kept = {name: row[name] for name in ("prompt_ids", "response_ids", "num_response", "step_map") if name in row}
    own_id = str(row.get("task_id", row.get("id", "rollout")))
    return {"id": f"{own_id}/{row['sample']}" if "sample" in row else own_id, **kept}


# ---- all of them -------------------------------------------------------------------------------------------------------


@dataclass
class Prepared:
    records: list[dict[str, Any]] = field(default_factory=list)
    num_read: int = 0
    dropped: Counter = field(default_factory=Counter)
    """How many by reason."""
    lengths: list[tuple[int, int]] = field(default_factory=list)
    """(prompt, response) tokens of every record, where there is a tokenizer."""


def prepare(
    rows: list[dict[str, Any]],
    prompt_field: str | None = None,
    response_field: str | None = None,
    only_correct: bool = False,
    encode: Callable[[SFTRecord], tuple[list[int], list[int]]] | None = None,
    max_prompt: int | None = None,
    max_response: int | None = None,
) -> Prepared:
    """Convert, check and count. encode: a record's token ids; needed for max_prompt and max_response (tokens; the end counts)."""
    result, seen = Prepared(num_read=len(rows)), set()
    for row in rows:
        try:
            if only_correct and not row.get("correct"):
                raise Dropped("not correct")
            record = convert(row, prompt_field, response_field)
            problem = record_problem(record)
            if problem is not None:
                raise Dropped(problem)
            key = json.dumps({name: value for name, value in record.items() if name not in ("id", "step_map")}, sort_keys=True)
            if key in seen:
                raise Dropped("duplicate")
            if encode is not None:
                prompt_ids, response_ids = encode(as_record(record, ""))
                if max_prompt is not None and len(prompt_ids) > max_prompt:
                    raise Dropped(f"prompt over {max_prompt} tokens")
                if max_response is not None and len(response_ids) > max_response:
                    raise Dropped(f"response over {max_response} tokens")
                result.lengths.append((len(prompt_ids), len(response_ids)))
        except Dropped as reason:
            result.dropped[str(reason)] += 1
            continue
        seen.add(key)
        result.records.append(record)
    return result


def table(prepared: Prepared, held_out: int = 0) -> str:
    """What was read, dropped and kept."""
    lines = [("read", prepared.num_read)]
    by_number = sorted(prepared.dropped.items(), key=lambda item: (-item[1], item[0]))
    lines += [(f"dropped: {reason}", number) for reason, number in by_number]
    lines.append(("kept", len(prepared.records)))
    if held_out:
        lines.append(("of them held out", held_out))
    lines += [(f"kept with {what}", number) for what, number in _kinds(prepared.records) if number]
    width = max(len(name) for name, _ in lines)
    text = [f"{name:<{width}}  {number:>9,}" for name, number in lines]
    for name, values in zip(("prompt", "response"), zip(*prepared.lengths, strict=True), strict=False):
        values = sorted(values)
        p50, p95 = (values[min(len(values) - 1, int(q * len(values)))] for q in (0.5, 0.95))
        text.append(f"{name} tokens: mean {sum(values) / len(values):,.1f}, median {p50:,}, 95% {p95:,}, longest {values[-1]:,}")
    return "\n".join(text)


def _kinds(records: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [
        ("a conversation as prompt", sum("messages" in r for r in records)),
        ("token ids", sum("response_ids" in r for r in records)),
        ("a step map", sum("step_map" in r for r in records)),
    ]


# ---- in and out --------------------------------------------------------------------------------------------------------


def read_input(name: str, hub_split: str = "train", hub_config: str | None = None) -> list[dict[str, Any]]:
    """The records of a file, of a file in data/, or of a data set of the hub. Raises UserError."""
    path = Path(name).expanduser()
    is_local = path.suffix in SUFFIXES or path.parent.is_dir() or name.startswith((".", "~", "/"))
    return read_hub(name, hub_split, hub_config) if name.count("/") == 1 and not is_local else read_records(find_file(name))


def read_hub(name: str, hub_split: str, hub_config: str | None) -> list[dict[str, Any]]:
    import datasets
    from huggingface_hub import constants

    from data.download_data import _host_is_known

    if not (constants.HF_HUB_OFFLINE or _host_is_known(constants.ENDPOINT)):
        by_hand = "download the data by hand and name the file, or set HF_ENDPOINT"
        raise UserError(f"{name}: {constants.ENDPOINT} cannot be reached: {by_hand}")
    try:
        rows = datasets.load_dataset(name, hub_config, split=hub_split).to_list()
    except (ConnectionError, OSError, ValueError, RuntimeError) as error:  # offline, unknown name, config or split
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}: the hub's data set cannot be read: {cause}") from error
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


def read_tokenizer(name: str) -> Any:
    """The tokenizer of a model directory or hub name. Raises UserError."""
    from models.checkpoint import find_directory, load_tokenizer

    path = find_directory(name, "--tokenizer")
    tokenizer = load_tokenizer(path)
    if tokenizer is None:
        raise UserError(f"--tokenizer: {path} has none: name a model directory that holds tokenizer.json")
    return tokenizer


def render(record: dict[str, Any], chat_style: str, tokenizer: Any, use_template: bool = True) -> dict[str, Any]:
    """The record with its prompt as the text that the model sees."""
    from data.prompts import render_chat, render_messages

    if "response_ids" in record or record.get("prompt_is_rendered"):
        return record
    rest = {name: value for name, value in record.items() if name not in ("messages", "prompt")}
    if "messages" in record:
        text = render_messages(record["messages"], chat_style, tokenizer, use_template)
    else:
        text = render_chat(record["prompt"], chat_style, tokenizer, use_template)
    return {"prompt": text, "prompt_is_rendered": True, **rest}


def add_steps(records: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Give every record the step map that the model would have unmasked it by, in place."""
    import torch
    from tqdm import tqdm

    from models.checkpoint import check_tokenizer, load_pretrained
    from models.registry import FAMILIES
    from sample.engine import SamplingSettings
    from sample.steps_of_canvas import steps_of_canvases
    from sample.steps_of_text import Text, steps_of_texts

    size, canvas = options.block_size, options.canvas
    is_full = FAMILIES.get(options.model_base, "--model-base").attention == "full"
    if is_full != (canvas is not None):
        why = "a response is filled up to it: give training.max_gen_length" if is_full else "it is for full attention: leave it out"
        raise UserError(f"--canvas: got {'nothing' if canvas is None else canvas} with --model-base {options.model_base}: {why}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = load_pretrained(options.sample_steps, options.model_base, dtype, device, check=check_tokenizer)
    settings = SamplingSettings(
        max_tokens=1,
        mask_id=model.mask_id,
        forbidden_ids=tuple(model.forbidden_ids),
        block_size=size,
        steps_per_block=options.steps_per_block,
        steps=options.steps_per_block * -(-canvas // size) if is_full and options.steps_per_block else None,
        strategy=options.strategy,
        threshold=options.threshold,
        seed=options.seed,
    )
    texts, lengths = [], []
    for number, record in enumerate(records):
        own = as_record(record, str(number))
        is_chat = not options.plain
        prompt_ids, response_ids = encode_sft(own, model.tokenizer, model.family.chat_style, is_chat, not options.fixed_form)
        lengths.append(len(response_ids))
        num_fill = canvas - len(response_ids) if is_full else -(len(prompt_ids) + len(response_ids)) % size
        # A canvas is cut where training cuts it: the model sees nothing behind it, and the steps are of so many blocks.
        texts.append(Text(own.id, prompt_ids, (response_ids + [model.fill_id] * num_fill)[:canvas]))
    with tqdm(total=len(texts), desc="step maps", unit="text", leave=False, disable=None, delay=1.0) as bar:
        progress = lambda finished: bar.update(finished - bar.n)  # noqa: E731
        rest = dict(max_tokens=options.max_tokens_per_forward, progress=progress)
        if is_full:
            maps = steps_of_canvases(model.decoder, model.family, texts, settings, **rest)
        else:
            maps = steps_of_texts(model.decoder, texts, settings, **rest)
    for record, length, steps in zip(records, lengths, maps, strict=True):
        steps = steps + [max(steps) + 1] * (length - len(steps))  # what is cut off, behind all else
        record["step_map"] = steps[: len(record["response_ids"])] if "response_ids" in record else steps


def main_options(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m data.prepare_sft", description=__doc__, formatter_class=raw)
    parser.add_argument("input", help="json, jsonl or parquet file, a name in data/, or a data set of the hub")
    parser.add_argument("--out", required=True, type=Path, help="JSON file to write (held-out part: NAME_held_out.json beside it)")
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    parser.add_argument("--split", default="train", help="of a data set of the hub (default: train)")
    parser.add_argument("--config", help="of a data set of the hub that has several")
    parser.add_argument("--prompt-field", help="name of the prompt, where it is an unusual one")
    parser.add_argument("--response-field", help="name of the response, where it is an unusual one")
    parser.add_argument("--only-correct", action="store_true", help="keep the records whose field `correct` is true (rollouts)")
    parser.add_argument("--limit", type=int, help="read no more than so many records")
    parser.add_argument("--held-out", type=float, default=0.0, metavar="SHARE", help="of the prompts, for the validation loss")
    parser.add_argument("--seed", type=int, default=1, help="of the choice of held-out prompts")
    parser.add_argument("--tokenizer", metavar="MODEL", help="count tokens with this model's tokenizer")
    parser.add_argument("--max-prompt", type=int, metavar="TOKENS", help="drop longer prompts (needs --tokenizer)")
    parser.add_argument("--max-response", type=int, metavar="TOKENS", help="drop longer responses (needs --tokenizer)")
    parser.add_argument("--chat-style", default="chatml", help="chat format where the tokenizer has no template (default: chatml)")
    parser.add_argument("--fixed-form", action="store_true", help="no tokenizer's template (dataset.use_chat_template=false)")
    parser.add_argument("--plain", action="store_true", help="prompts are the whole text, no user's turn (data_type exact)")
    parser.add_argument("--render", action="store_true", help="write prompts as the text that the model sees (needs --tokenizer)")
    steps = parser.add_argument_group("step maps, for training.method=trace")
    steps.add_argument("--sample-steps", metavar="MODEL", help="unmask every response with this model and keep the order")
    steps.add_argument("--model-base", default="sdar", help="its family (default: sdar)")
    steps.add_argument("--block-size", type=int, default=4, help="training.block_size (default: 4)")
    steps.add_argument("--canvas", type=int, metavar="TOKENS", help="full attention: training.max_gen_length")
    dynamic = "low_confidence_dynamic"
    steps.add_argument("--strategy", default=dynamic, help=f"as rollout.remasking_strategy (default: {dynamic})")
    steps.add_argument("--threshold", type=float, default=0.9, help="as rollout.dynamic_threshold (default: 0.9)")
    steps.add_argument("--steps-per-block", type=int, help="as rollout.denoising_steps_per_block (default: block size)")
    steps.add_argument("--max-tokens-per-forward", type=int, default=16384, help="two per token of text, or one (default: 16384)")
    return parser.parse_args(argv)


def check_options(options: argparse.Namespace) -> None:
    needs = [name for name in ("max_prompt", "max_response") if getattr(options, name) is not None] + ["render"] * options.render
    if needs and options.tokenizer is None:
        raise UserError(f"--{needs[0].replace('_', '-')}: needs a tokenizer: give --tokenizer MODEL")
    if options.render and options.plain:
        raise UserError("--render: with --plain there is nothing to render: give only one of them")
    if options.out.suffix != ".json":
        raise UserError(f"--out: got {options.out}, must end in .json")
    if not 0 <= options.held_out < 1:
        raise UserError(f"--held-out: got {options.held_out}, must be a share from 0 to below 1")
    for path in outputs(options):
        if path.exists() and not options.force:
            raise UserError(f"--out: {path} is there already: choose another name, or --force")


def outputs(options: argparse.Namespace) -> list[Path]:
    """The file to write, and that of the held-out part where there is one."""
    return [options.out, options.out.with_name(f"{options.out.stem}_held_out.json")][: 2 if options.held_out else 1]


@entry_point
def main(argv: list[str] | None = None) -> None:
    options = main_options(argv)
    check_options(options)
    rows = read_input(options.input, options.split, options.config)[: options.limit]
    encode = tokenizer = None
    if options.tokenizer is not None:
        tokenizer = read_tokenizer(options.tokenizer)
        forms = options.chat_style, not options.plain, not options.fixed_form
        encode = lambda record: encode_sft(record, tokenizer, *forms)  # noqa: E731
    prepared = prepare(
        rows, options.prompt_field, options.response_field, options.only_correct, encode, options.max_prompt, options.max_response
    )
    if not prepared.records:
        print(table(prepared))
        raise UserError(f"{options.input}: no record is left, nothing was written")
    if options.render:
        prepared.records = [render(r, options.chat_style, tokenizer, not options.fixed_form) for r in prepared.records]
    if options.sample_steps is not None:
        add_steps(prepared.records, options)
    parts = split(prepared.records, options.held_out, options.seed, lambda record: prompt_key(as_record(record, "")))
    for path, part in zip(outputs(options), parts, strict=False):
        write_records(path, part)
    print(table(prepared, len(parts[1])))
    for path, part in zip(outputs(options), parts, strict=False):
        print(f"{path}: {len(part)} records")


if __name__ == "__main__":
    main()

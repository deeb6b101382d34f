"""A page that replays how responses were unmasked.

    python -m sample.trace_viewer run/rollouts/step_000012.jsonl -o trace.html [--tokenizer PATH] [--max 50]

One HTML file, no network: choose a response, play or step through its denoising forwards; tokens appear at their step, coloured
by step, confidence or entropy. `trace.html#rollout=2&step=3&color=confidence` opens the third response at its third forward.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Callable, Sequence

from common.errors import UserError, entry_point, warn
from common.metrics import tokens_per_forward
from common.page import finite, render_page, write_page
from common.records import Rollout, ScoredRollout

ROLLOUT_FIELDS = [field.name for field in dataclasses.fields(Rollout)]
"""What every record has; those that are not scored have no more."""
TEMPLATE = Path(__file__).with_name("trace_viewer.html")


def read_trace_file(path: str | Path, limit: int | None = None) -> tuple[list[ScoredRollout], int]:
    """The first `limit` records of a file of Rollout or ScoredRollout JSON lines, and the number of records in it.

    A plain Rollout gets no reward (`correct` None, `reward` NaN). Raises UserError with file and line for a bad record.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file: give a file of rollouts (JSON lines), as in RUN_DIR/rollouts/")
    rollouts: list[ScoredRollout] = []
    count = 0
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                count += 1
                if limit is None or len(rollouts) < limit:
                    rollouts.append(_parse(line, f"{path} line {number}"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error.reason}): give a file of rollouts (JSON lines)") from None
    if not rollouts:
        raise UserError(f"{path}: holds no rollouts: was the run stopped before its first step ended?")
    return rollouts, count


def _parse(line: str, where: str) -> ScoredRollout:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}): expected one rollout per line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a rollout is a JSON object, got {type(row).__name__}")
    missing = next((name for name in ROLLOUT_FIELDS if name not in row), None)
    if missing is not None:
        raise UserError(
            f"{where}: no field {missing!r}: not a file of rollouts: give one of RUN_DIR/rollouts/, or the responses of an "
            "evaluation, RUN_DIR/results/NAME.DECODING.jsonl"
        )
    row.setdefault("reward", float("nan"))
    try:
        rollout = ScoredRollout(**row)
    except TypeError as error:
        raise UserError(f"{where}: not a rollout ({str(error).replace('ScoredRollout.__init__() ', '')})") from None
    except AssertionError as error:
        raise UserError(f"{where}: {str(error) or 'num_response is outside the response'}") from None
    for name, kind in (
        ("prompt_ids", int),
        ("response_ids", int),
        ("step_map", int),
        ("logprobs", (int, float)),
        ("entropy", (int, float)),
    ):
        if not all(isinstance(value, kind) for value in getattr(rollout, name)):
            raise UserError(f"{where}: {name} must be a list of numbers")
    if not isinstance(rollout.block_size, int) or rollout.block_size < 1:
        raise UserError(f"{where}: block_size must be 1 or more, got {rollout.block_size!r}")
    return rollout


# ---- the page ----------------------------------------------------------------------------------------------------------


def trace_data(
    rollouts: Sequence[Rollout], token_text: Callable[[int], str], source: str = "", total: int | None = None
) -> dict[str, Any]:
    """What the page embeds: prompts once for their responses, one table of token texts, numbers at five digits."""
    prompts: dict[tuple[int, ...], int] = {}
    texts: dict[int, str] = {}
    rows = []
    for rollout in rollouts:
        prompt = prompts.setdefault(tuple(rollout.prompt_ids), len(prompts))
        for token in (*rollout.prompt_ids, *rollout.response_ids):
            if token not in texts:
                texts[token] = token_text(token)
        rows.append(
            {
                "task": rollout.task_id,
                "sample": rollout.sample,
                "prompt": prompt,
                "ids": rollout.response_ids,
                "steps": rollout.step_map,
                "logprobs": [finite(value) for value in rollout.logprobs],
                "entropy": [finite(value) for value in rollout.entropy],
                "num": rollout.num_response,
                "finish": rollout.finish,
                "forwards": rollout.num_forwards,
                "last": max([rollout.num_forwards, *rollout.step_map]),
                "per_forward": finite(tokens_per_forward([rollout])),
                "block": rollout.block_size,
                "origin": rollout.block_origin,
                "version": rollout.weights_version,
                "reward": finite(getattr(rollout, "reward", None)),
                "correct": getattr(rollout, "correct", None),
                "advantage": finite(getattr(rollout, "advantage", None)),
                "dropped": getattr(rollout, "dropped", None),
            }
        )
    return {
        "source": source,
        "total": len(rows) if total is None else total,
        "texts": {str(token): text for token, text in texts.items()},
        "prompts": [list(prompt) for prompt in prompts],
        "rollouts": rows,
    }


def write_trace_page(
    rollouts: Sequence[Rollout],
    token_text: Callable[[int], str],
    path: str | Path,
    source: str = "",
    total: int | None = None,
) -> None:
    """Write the page of these rollouts (plain or scored) to `path`, beside and renamed.

    `token_text`: the text of one token id. `source`: where they come from, for the title; `total`: how many there were, if more.
    """
    title = f"{source} · unmasking trace" if source else "Unmasking trace"
    write_page(path, render_page(TEMPLATE, title, trace_data(rollouts, token_text, source, total)))


# ---- token texts -------------------------------------------------------------------------------------------------------


def tokenizer_text(tokenizer: Any) -> Callable[[int], str]:
    """`token_text` of a Hugging Face tokenizer: leading spaces kept; a piece of a character as its bytes, `‹E4 BD›`."""
    byte_of = _byte_alphabet()

    def text(token: int) -> str:
        if not 0 <= token < len(tokenizer):
            return f"‹{token}›"
        piece = tokenizer.convert_ids_to_tokens(token)
        decoded = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if "\ufffd" in decoded and piece and all(letter in byte_of for letter in piece):
            return "‹" + " ".join(f"{byte_of[letter]:02X}" for letter in piece) + "›"
        if piece and piece.startswith("▁") and not decoded.startswith(" "):  # sentencepiece drops the space of a first word
            return " " + decoded
        return decoded or piece or f"‹{token}›"

    return text


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's letter for each byte, inverted: printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def load_token_text(tokenizer_path: str | None, rollouts_path: Path) -> Callable[[int], str]:
    """From `tokenizer_path`; otherwise from the run that the rollouts lie in; otherwise, with a warning, ids are shown."""
    if tokenizer_path is not None:
        try:
            return tokenizer_text(_load_tokenizer(tokenizer_path, local_only=False))
        except Exception as error:  # transformers raises what its many loaders raise
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--tokenizer {tokenizer_path}: no tokenizer could be loaded ({reason}): give its directory") from None
    candidates = tokenizer_candidates(rollouts_path)
    for candidate in candidates:
        try:
            return tokenizer_text(_load_tokenizer(candidate, local_only=True))
        except Exception as error:
            warn(f"no tokenizer in {candidate} ({' '.join(str(error).split())[:120]})")
    warn("no tokenizer found: the page shows token ids; --tokenizer PATH gives one")
    return lambda token: f"{token} "


def tokenizer_candidates(rollouts_path: Path) -> list[str]:
    """Places of a tokenizer for rollouts inside a run directory: its checkpoints, then config.yaml's model.pretrained_model."""
    for run_dir in list(Path(rollouts_path).resolve().parents)[:3]:
        config_file = run_dir / "config.yaml"
        checkpoints = sorted(path.parent for path in run_dir.glob("ckpt/*/tokenizer_config.json"))
        if not config_file.is_file() and not checkpoints:
            continue
        found = [str(path) for path in sorted(checkpoints, key=lambda path: path.name != "optimized")[:1]]
        if config_file.is_file():
            import yaml

            try:
                config = yaml.safe_load(config_file.read_text(encoding="utf-8")) or {}
                model = config.get("model")
                name = model.get("pretrained_model") if isinstance(model, dict) else model
            except (yaml.YAMLError, AttributeError) as error:
                raise UserError(f"{config_file}: not readable as YAML ({' '.join(str(error).split())}): give --tokenizer") from None
            if name:
                found.append(str(name))
        return found
    return []


def _load_tokenizer(name: str, local_only: bool) -> Any:
    """From a directory, a hub name (from the hub's cache alone if `local_only`), or the reserved name of the tiny model."""
    from models.checkpoint import load_tokenizer
    from models.family import TINY_RANDOM

    if name == TINY_RANDOM:
        from models.tiny import tiny_tokenizer

        return tiny_tokenizer()
    if Path(name).is_dir():
        tokenizer = load_tokenizer(Path(name))
        if tokenizer is None:
            raise FileNotFoundError("no tokenizer.json, tokenizer_config.json or vocab.json in it")
        return tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, local_files_only=local_only, trust_remote_code=True)


# ---- the program -------------------------------------------------------------------------------------------------------


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sample.trace_viewer",
        description="Write one self-contained HTML page that replays the unmasking of responses.",
    )
    parser.add_argument("rollouts", type=Path, metavar="ROLLOUTS.jsonl", help="rollouts, one JSON object per line")
    parser.add_argument("-o", "--output", type=Path, default=Path("trace.html"), help="the page to write (default: trace.html)")
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer directory or hub name (default: that of the run)")
    parser.add_argument(
        "--max", type=int, default=50, metavar="N", help="responses in the page, from the file's start (default: 50)"
    )
    args = parser.parse_args(argv)
    if args.max < 1:
        raise UserError(f"--max must be 1 or more, got {args.max}")
    if args.output.exists() and args.rollouts.exists() and args.output.samefile(args.rollouts):
        raise UserError(f"-o {args.output}: that is the file of rollouts: choose another name for the page")
    rollouts, total = read_trace_file(args.rollouts, args.max)
    token_text = load_token_text(args.tokenizer, args.rollouts)
    write_trace_page(rollouts, token_text, args.output, source=args.rollouts.name, total=total)
    shown = f"{len(rollouts)} of {total} responses (--max)" if len(rollouts) < total else f"{total} response{'s' * (total > 1)}"
    print(f"{args.output}: {shown}; open it in a browser", file=sys.stdout)


if __name__ == "__main__":
    main()

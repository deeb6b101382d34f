"""Tiny tasks over digit strings, for the embedded tiny model: a letter for the task, digits, `=`; one id per character.

    s52910=  ->  01259

`python -m data.tiny_tasks --task sort --count 2000 --seed 1 --out data/tiny_sort_train.json --exclude data/tiny_sort_test.json`

Records: question, ground_truth_answer (data_type `exact`). The shipped sets were written by `python -m data.tiny_tasks --shipped`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Collection

from common.errors import UserError, entry_point
from common.registry import Registry

DATA_DIR = Path(__file__).resolve().parent

ALPHABET = "0123456789=+-,abcdmnrsuxt"
"""The tiny tokenizer's characters, in the order of their ids (models/tiny.py)."""

TINY_SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "<stop>", "mask_token": "<mask>"}
"""Its special tokens, whose ids follow: 28 ids in all, the mask last."""

assert len(set(ALPHABET)) + len(TINY_SPECIAL_TOKENS) == 28


@dataclass(frozen=True)
class TinyTask:
    letter: str
    """First character of its questions."""
    answer: Callable[[str], str]
    """Digits of the question -> the answer."""


TINY_TASKS: Registry[TinyTask] = Registry("tiny task")
TINY_TASKS.register("sort", TinyTask("s", lambda digits: "".join(sorted(digits))))
TINY_TASKS.register("descending", TinyTask("d", lambda digits: "".join(sorted(digits, reverse=True))))
TINY_TASKS.register("reverse", TinyTask("r", lambda digits: digits[::-1]))
TINY_TASKS.register("max", TinyTask("x", max))
TINY_TASKS.register("min", TinyTask("n", min))
TINY_TASKS.register("unique", TinyTask("u", lambda digits: "".join(dict.fromkeys(digits))))  # in order of first appearance
TINY_TASKS.register("count", TinyTask("c", lambda digits: str(len(digits))))
TINY_TASKS.register("alternate", TinyTask("a", lambda digits: digits[::2]))  # every second digit, from the first


def generate(
    task: str, count: int, seed: int, exclude: Collection[str] = frozenset(), min_digits: int = 4, max_digits: int = 6
) -> list[dict[str, str]]:
    """`count` different questions of `task` ("mixed": all tasks in turn), none of them in `exclude` (questions); a function of
    the arguments alone. Lengths are uniform between the bounds. Raises UserError where there are not so many questions."""
    rules = [TINY_TASKS.get(name) for name in (TINY_TASKS.names() if task == "mixed" else [task])]
    if not 1 <= min_digits <= max_digits:
        raise UserError(f"digits: got {min_digits} to {max_digits}, wanted 1 <= min <= max")
    generator = random.Random(f"{task}/{seed}/{min_digits}/{max_digits}")
    taken, records, num_misses = set(exclude), [], 0
    while len(records) < count:
        rule = rules[len(records) % len(rules)]
        digits = "".join(generator.choices("0123456789", k=generator.randint(min_digits, max_digits)))
        question = f"{rule.letter}{digits}="
        if question in taken:
            num_misses += 1
            if num_misses > 100 * (count + 100):
                raise UserError(f"{task}: only {len(records)} of {count} different questions found; ask for fewer, or more digits")
            continue
        taken.add(question)
        records.append({"question": question, "ground_truth_answer": rule.answer(digits)})
    return records


def to_sft(records: list[dict[str, str]]) -> list[dict[str, str]]:
    """The same questions as data of supervised finetuning: prompt, response."""
    return [{"prompt": record["question"], "response": record["ground_truth_answer"]} for record in records]


def write_records(path: str | os.PathLike, records: list[dict[str, str]]) -> None:
    """A JSON list, one record per line; written beside and renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        lines = ",\n".join(json.dumps(record) for record in records)
        partial.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_questions(path: str | os.PathLike) -> set[str]:
    from data.tasks import read_records

    return {str(record.get("question", record.get("prompt"))) for record in read_records(path)}


def shipped_sets() -> dict[str, list[dict[str, str]]]:
    """File name -> records of the sets in data/: the test sets are drawn first, and no training set holds a question of them."""
    sort_test, mixed_test = generate("sort", 256, seed=2), generate("mixed", 128, seed=4)
    held_out = {record["question"] for record in sort_test + mixed_test}
    return {
        "tiny_sort_train.json": generate("sort", 2000, seed=1, exclude=held_out),
        "tiny_sort_test.json": sort_test,
        "tiny_mixed_train.json": generate("mixed", 1000, seed=3, exclude=held_out),
        "tiny_mixed_test.json": mixed_test,
    }


@entry_point
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data.tiny_tasks", description="Write a set of tiny tasks.")
    parser.add_argument("--task", default="sort", help=f"mixed, {', '.join(TINY_TASKS.names())} (default: sort)")
    parser.add_argument("--count", type=int, default=2000, help="questions (default: 2000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--min-digits", type=int, default=4)
    parser.add_argument("--max-digits", type=int, default=6)
    parser.add_argument("--exclude", nargs="*", default=[], metavar="FILE", help="sets whose questions are left out")
    parser.add_argument("--sft", action="store_true", help="write prompt and response instead of question and answer")
    parser.add_argument("--out", metavar="FILE", help="JSON file to write")
    parser.add_argument("--shipped", action="store_true", help="write the sets that are shipped in data/ again")
    options = parser.parse_args()
    if options.shipped:
        for name, records in shipped_sets().items():
            write_records(DATA_DIR / name, records)
            print(f"{DATA_DIR / name}: {len(records)} records")
        return
    if options.out is None:
        raise UserError("--out: the file to write is missing")
    exclude = set().union(*(read_questions(path) for path in options.exclude))
    records = generate(options.task, options.count, options.seed, exclude, options.min_digits, options.max_digits)
    write_records(options.out, to_sft(records) if options.sft else records)
    print(f"{options.out}: {len(records)} records")


if __name__ == "__main__":
    main()

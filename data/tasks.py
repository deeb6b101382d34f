"""Data sets of tasks: reading and checking a file, and the order in which a run sees its tasks."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any, Collection, Iterator, Sequence

import numpy as np

from common.errors import UserError
from common.records import Task
from reward.registry import REWARDS, scoring_reward

DATA_DIR = Path(__file__).resolve().parent
SUFFIXES = (".json", ".jsonl", ".parquet")
ENCODING = "utf-8-sig"
"""With the mark at the beginning that Windows writes, or without it."""
UNREADABLE = (ValueError, RecursionError)
"""JSON that Python will not read: numbers of thousands of digits, brackets in brackets without end."""


# ---- files -------------------------------------------------------------------------------------------------------------


def find_file(name_or_path: str | os.PathLike, folder: str | os.PathLike = DATA_DIR) -> Path:
    """`NAME` -> folder/NAME.json (or .jsonl, .parquet); a path to such a file is taken as it is. Raises UserError."""
    text, folder = str(name_or_path), Path(folder)
    path = Path(text).expanduser()
    if path.suffix in SUFFIXES or len(path.parts) > 1:
        if path.is_file():
            if path.suffix not in SUFFIXES:
                raise UserError(f"{path}: cannot read {path.suffix or 'a file without a suffix'}; give {', '.join(SUFFIXES)}")
            return path
    else:
        for suffix in SUFFIXES:
            if (folder / f"{text}{suffix}").is_file():
                return folder / f"{text}{suffix}"
    raise UserError(f"no data set {text!r}: {_what_there_is(text, folder)}")


def _what_there_is(name: str, folder: Path) -> str:
    from data.download_data import DATASETS  # imports this module

    there = sorted(p.stem for p in folder.glob("*") if p.suffix in SUFFIXES) if folder.is_dir() else []
    have = f"{folder} has {', '.join(there)}" if there else f"{folder} has none"
    if name in DATASETS:
        return f"get it with `python data/download_data.py --dataset {name}`; {have}"
    return f"{have}; `python data/download_data.py --list` shows what can be downloaded; or give a path to json, jsonl or parquet"


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[Any]:
    """The `datasets` library without progress bars and remarks; its state is put back."""
    import datasets

    verbosity, bars = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


def read_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a json (a list), jsonl or parquet file, as dicts; fields that a record does not have are left out.

    Parquet is read with `datasets`, JSON with the standard library: `datasets` makes one table of it, in which the answer
    "2024-01-01" becomes a date, 5 becomes 5.0 beside 2.5, and the number of a broken record is lost.
    Raises UserError for a file that is missing, empty, broken, or not a list of records.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    rows = _read_parquet(path) if path.suffix == ".parquet" else _read_json(path)
    if not rows:
        raise UserError(f"{path}: no record in the file")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: record {number} is {type(row).__name__}, wanted an object with named fields")
        for name, value in row.items():
            if not _can_be_written(value):
                raise UserError(f"{path}: record {number}: field {name!r} holds half a character (such as \\ud800): mend its text")
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    with _quiet_datasets() as datasets, tempfile.TemporaryDirectory(prefix="unmask-data-") as cache:
        # A cache of its own: the shared one takes a file of the same size and time for the same, and locks between processes.
        try:
            return datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True).to_list()
        except (OSError, ValueError, RuntimeError) as error:  # datasets' and Arrow's own errors are kinds of these
            cause = str(error.__cause__ or error).splitlines()
            raise UserError(f"{path}: not a readable parquet file ({cause[0] if cause else type(error).__name__})") from error


def _can_be_written(value: Any) -> bool:
    """Whether all text in a value is Unicode: an escape of JSON may be half of a character, of which no tokens can be made."""
    parts = [value]
    while parts:
        part = parts.pop()
        if isinstance(part, str) and not part.isascii():
            try:
                part.encode("utf-8")
            except UnicodeEncodeError:
                return False
        elif isinstance(part, (list, dict)):
            parts.extend(part.values() if isinstance(part, dict) else part)
    return True


def _read_json(path: Path) -> list[Any]:
    try:
        if path.suffix == ".jsonl":
            return list(_json_lines(path))
        rows = json.loads(path.read_text(encoding=ENCODING))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error.msg}, line {error.lineno})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except UNREADABLE as error:
        raise UserError(f"{path}: holds what cannot be read ({error}): mend it") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: the file holds {type(rows).__name__}, wanted a list of records")
    return rows


def _json_lines(path: Path) -> Iterator[Any]:
    with open(path, encoding=ENCODING) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}: line {number} is not JSON ({error.msg}, column {error.colno})") from error
                except UNREADABLE as error:
                    raise UserError(f"{path}: line {number} cannot be read ({error}): mend it") from error


# ---- tasks -------------------------------------------------------------------------------------------------------------


def load_tasks(
    name_or_path: str | os.PathLike, data_type: str, function: str | None = None, folder: str | os.PathLike = DATA_DIR
) -> list[Task]:
    """The tasks of a data set, each record checked against what the reward of `data_type` needs, and where `function` (the setting
    reward.function) names another reward, against what that one needs, whose answers count then.

    Ids are the records' own (`id` or `task_id`), else NAME:INDEX, counted from 0. Raises UserError with the file, the number of
    the record (counted from 1) and the field.
    """
    needing = {f"dataset.data_type={data_type}": REWARDS.get(data_type, "dataset.data_type")}
    scoring = scoring_reward(data_type, function)
    if function is not None and scoring is not None:
        needing[f"reward.function={function}"] = scoring
    answer_field = None
    for reward in needing.values():
        answer_field = reward.answer_field or answer_field
    path = find_file(name_or_path, folder)
    tasks: list[Task] = []
    first_with: dict[str, int] = {}
    for index, record in enumerate(read_records(path)):
        for setting, reward in needing.items():
            problem = reward.record_problem(record)
            if problem is not None:
                raise UserError(f"{path}: record {index + 1}: {problem} ({setting})")
        task = _task(record, f"{path.stem}:{index}", answer_field)
        if task.id in first_with:
            raise UserError(f"{path}: record {index + 1}: id {task.id!r} is that of record {first_with[task.id]} too")
        first_with[task.id] = index + 1
        tasks.append(task)
    return tasks


def _task(record: dict[str, Any], default_id: str, answer_field: str | None) -> Task:
    own_id = record.get("id", record.get("task_id"))
    answer = record.get(answer_field) if answer_field is not None else None
    return Task(
        id=default_id if own_id is None else str(own_id),
        question=record["question"],
        answer=None if answer is None else _as_text(answer),
        fields={name: value for name, value in record.items() if name not in ("id", "task_id", "question", answer_field)},
    )


def _as_text(answer: Any) -> str:
    """A number as it would be written; 5.0, which a table makes of 5 beside 2.5, as 5."""
    if isinstance(answer, float) and math.isfinite(answer) and answer == int(answer):
        return str(int(answer))
    return str(answer)


# ---- the order of a run ------------------------------------------------------------------------------------------------


class TaskCursor:
    """Deals tasks out in shuffled epochs: every task is seen before any comes again.

    The order of an epoch is a function of seed and epoch alone. Where a `take` reaches over the end of an epoch, tasks that it
    holds already are put off to the next `take`, so that no task occurs twice in one RL step.
    """

    def __init__(self, tasks: Sequence[Task], seed: int) -> None:
        assert tasks, "no tasks"
        self.tasks = list(tasks)
        self.seed = seed
        self.epoch = 0
        self._position = 0  # how many of this epoch's order have been dealt or put off
        self._put_off: list[int] = []  # indices of this epoch that come first in the next take
        self._order = self._order_of(0)

    def _order_of(self, epoch: int) -> list[int]:
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        return generator.permutation(len(self.tasks)).tolist()

    def take(self, n: int, exclude: Collection[str] = frozenset()) -> list[Task]:
        """The next n tasks, all different and none of them in `exclude` (ids: what this RL step holds already).

        With `exclude`, fewer are returned where there are no more. Raises UserError where n is more than all tasks.
        """
        if n > len(self.tasks) and not exclude:
            raise UserError(
                f"{n} different tasks per step (rollout.num_task_per_step), but the data set has {len(self.tasks)}: ask for fewer"
            )
        taken: list[int] = []
        held = {index for index, task in enumerate(self.tasks) if task.id in exclude}
        n = min(n, len(self.tasks) - len(held))
        while len(taken) < n:
            index = self._next(held)
            taken.append(index)
            held.add(index)
        return [self.tasks[index] for index in taken]

    def _next(self, held: set[int]) -> int:
        """The next index that is not held; held ones on the way are put off. The caller holds fewer than all."""
        for place, index in enumerate(self._put_off):
            if index not in held:
                return self._put_off.pop(place)
        while True:
            if self._position == len(self._order):
                # What is put off belongs to the epoch that ends: it stays due, ahead of the new one.
                self.epoch, self._position = self.epoch + 1, 0
                self._order = self._order_of(self.epoch)
            index = self._order[self._position]
            self._position += 1
            if index not in held:
                return index
            self._put_off.append(index)

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on from here; JSON-able."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self._position,
            "put_off": list(self._put_off),
            "num_tasks": len(self.tasks),
            "tasks_hash": self._tasks_hash,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state()`. Raises UserError where the data set is another one.

        A state of an earlier version knows the ids of its tasks alone (`ids_hash`).
        """
        whole = "tasks_hash" in state
        is_same = self._tasks_hash == state["tasks_hash"] if whole else self._ids_hash() == state["ids_hash"]
        if state["num_tasks"] != len(self.tasks) or not is_same:
            changed = f"{state['num_tasks']} tasks then, {len(self.tasks)} now"
            if state["num_tasks"] == len(self.tasks):
                changed = f"still {len(self.tasks)} tasks, but other {'contents' if whole else 'ids'}"
            raise UserError(
                f"the data set has changed since this run was saved ({changed}): "
                "put the old file back (dataset.train_dataset), or start another run directory (experiment.project)"
            )
        self.seed, self.epoch, self._position = state["seed"], state["epoch"], state["position"]
        self._put_off = list(state["put_off"])
        self._order = self._order_of(self.epoch)

    @functools.cached_property
    def _tasks_hash(self) -> str:
        """Of all that is known of the tasks, in their order. A state is written behind every step: reckoned once."""
        digest = hashlib.sha256()
        for task in self.tasks:  # repr: a parquet file may hold dates and bytes
            record = [task.id, task.question, task.answer, task.fields]
            digest.update(json.dumps(record, sort_keys=True, default=repr).encode() + b"\n")
        return digest.hexdigest()[:16]

    def _ids_hash(self) -> str:
        return hashlib.sha256("\0".join(task.id for task in self.tasks).encode()).hexdigest()[:16]

"""Data of supervised finetuning: prompt and response, optionally with the step at which each response token was revealed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from common.errors import UserError
from data.tasks import DATA_DIR, find_file, read_records


@dataclass(frozen=True)
class SFTRecord:
    id: str
    prompt: str
    response: str
    step_map: list[int] | None = None
    """1-based step that revealed each response token (trace SFT); None: not recorded."""


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
        problem = _problem(record)
        if problem is not None:
            raise UserError(f"{path}: record {index + 1}: {problem} (data of supervised finetuning)")
        own_id = record.get("id", record.get("task_id"))
        record_id = f"{path.stem}:{index}" if own_id is None else str(own_id)
        result.append(SFTRecord(record_id, record["prompt"], record["response"], record.get("step_map")))
    return result


def _problem(record: dict[str, Any]) -> str | None:
    for name in ("prompt", "response"):
        value = record.get(name)
        if value is None:
            return f"field {name!r} is missing"
        if not isinstance(value, str):
            return f"field {name!r} is {type(value).__name__}, wanted text"
        if not value:
            return f"field {name!r} is empty"
    steps = record.get("step_map")
    if steps is not None and not (isinstance(steps, list) and all(type(step) is int and step >= 0 for step in steps)):
        return "field 'step_map' is not a list of whole numbers from 0"
    return None

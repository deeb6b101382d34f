"""Judgements on disk: what the judge said once is never asked again, by this run or by the one that goes on after a kill.

One file of JSON lines per process, only ever appended to, one `write` per line: whatever a SIGKILL leaves behind is whole lines and
at most one torn last line, which is dropped when the file is opened again.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from common.errors import warn

FOLDER = "judge"
"""In the run directory."""
LONGEST_REPLY = 2000
"""Characters of a reply that are kept: its end, where the verdict is."""


def judgement_key(model: str, prompt: str, sampling: dict[str, Any], sample: int) -> str:
    """Hash of all that a judgement depends on; not of where the judge runs, so that it may move."""
    text = json.dumps([model, prompt, sampling, sample], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


class JudgementCache:
    """key -> score; None is a judgement too: the judge was asked often enough and gave no verdict."""

    def __init__(self, folder: Path | None, rank: int = 0) -> None:
        """`folder` None: kept in memory only. All files there are read (the number of processes may change), one is written."""
        self._scores: dict[str, float | None] = {}
        self._file: int | None = None
        self.path = folder / f"judgements.{rank}.jsonl" if folder is not None else None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        num_broken = sum(self._read(path) for path in sorted(folder.glob("judgements.*.jsonl")))
        if num_broken:
            warn(f"{folder}: {num_broken} lines cannot be read: those judgements are asked for again")
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._drop_torn_tail()

    def _read(self, path: Path) -> int:
        """Take the whole lines of a file; returns how many of them are broken."""
        num_broken = 0
        with open(path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break  # the torn tail of a killed process
                try:
                    record = json.loads(line)
                    key, score = record["key"], record["score"]
                    assert isinstance(key, str) and (score is None or -1 <= score <= 1)
                except (ValueError, KeyError, TypeError, AssertionError):
                    num_broken += 1
                    continue
                self._scores[key] = score
        return num_broken

    def _drop_torn_tail(self) -> None:
        """Else the next line would be glued to it."""
        size = os.fstat(self._file).st_size
        end = size
        while end > 0:
            start = max(0, end - (1 << 16))
            newline = os.pread(self._file, end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            os.ftruncate(self._file, end)

    def __contains__(self, key: str) -> bool:
        return key in self._scores

    def __getitem__(self, key: str) -> float | None:
        return self._scores[key]

    def __len__(self) -> int:
        return len(self._scores)

    def put(self, key: str, score: float | None, reply: str, num_tries: int) -> None:
        self._scores[key] = score
        if self._file is None:
            return
        record = {"key": key, "score": score, "tries": num_tries, "reply": reply[-LONGEST_REPLY:]}
        data = json.dumps(record).encode() + b"\n"  # ASCII: a lone surrogate in a reply is escaped, not an error
        written = os.write(self._file, data)
        while written < len(data):  # a disk that is full fails here
            written += os.write(self._file, data[written:])

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

"""data_type `code`: the last python block of a response passes the task's tests, in a sandbox (docs/code_reward.md)."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from typing import Any, Iterator, Mapping, Sequence

from common.errors import UserError, warn
from common.launch import local_world_size
from data.instructions import code_turn
from reward.code_text import last_program, with_prefix
from reward.registry import LIST, TEXT, Progress, ResponseToScore, Reward, Score
from reward.worker_pool import WorkerPool

DEFAULT_SECONDS = 4.0
"""Time limit of a test where the data set names none (`test_time_limit`)."""
LONGEST_PROGRAM = 200_000  # characters
BACKSTOP_SECONDS = 3600  # the sandbox ends tests by itself; this ends a sandbox that does not
MEMORY_OF_WORKER = 64 << 30  # address space; programs have limits of their own

Verdict = tuple[bool, "str | None"]
"""Whether a test passed, and why not."""


def cores_of_process() -> int:
    """The cores that this process of a job may count on."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, cores // local_world_size())


class CodeChecker:
    """Runs programs against tests. A job is one program with function tests, or one program and one input."""

    def __init__(self, num_at_a_time: int = 128, memory_mb: int = 1024, use_namespaces: bool = True) -> None:
        self.pool = WorkerPool("reward.sandbox:run_job", min(num_at_a_time, cores_of_process()), BACKSTOP_SECONDS, MEMORY_OF_WORKER)
        self.common = {"memory_bytes": memory_mb << 20, "use_namespaces": use_namespaces}
        self.is_probed = False

    def probe(self) -> None:
        """Start a sandbox, once, and say what it cannot protect from. Raises RuntimeError where it fails."""
        if self.is_probed:
            return
        if sys.platform != "linux":
            raise UserError(f"dataset.data_type: got code on {sys.platform}, but the sandbox for programs needs Linux")
        self.is_probed = True
        (outcome,) = self.pool.map([{"kind": "probe", **self.common}])
        if outcome.status != "ok":
            raise RuntimeError(f"the sandbox for programs does not start: {outcome.value or outcome.status}")
        if outcome.value["unprotected"] is not None and os.environ.get("RANK", "0") == "0":
            warn(outcome.value["unprotected"])

    def jobs(self, code: str, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What has to be run to test `code` as a record says; the verdicts of all, in order, are those of its tests."""
        seconds = float(fields.get("test_time_limit", DEFAULT_SECONDS))
        if fields["test_method"] == "function":
            prefix = fields.get("prefix") or ""
            job = {"kind": "function", "code": with_prefix(code, prefix), "tests": fields["test_list"], "prefix": prefix}
            return [{**job, "seconds": seconds}]
        pairs = zip(fields["test_input"], fields["test_output"])
        return [{"kind": "script", "code": code, "input": i, "output": o, "seconds": seconds} for i, o in pairs]

    def check(self, programs: Sequence[tuple[str, Mapping[str, Any]]], progress: Progress | None = None) -> list[list[Verdict]]:
        """Verdicts of all tests of each (program, record). Equal programs with equal tests are run once."""
        if programs:
            self.probe()
        unique: dict[Any, int] = {}
        jobs: list[dict[str, Any]] = []
        parts: list[list[int]] = []
        for code, fields in programs:
            parts.append([])
            for job in self.jobs(code, fields):
                key = tuple(tuple(value) if isinstance(value, list) else value for value in job.values())
                if key not in unique:
                    unique[key] = len(jobs)
                    jobs.append({**job, **self.common})
                parts[-1].append(unique[key])
        if progress is not None:
            progress(0, len(jobs))
        verdicts: list[list[Verdict]] = []
        failures = []
        for job, outcome in zip(jobs, self.pool.map(jobs, progress)):
            if outcome.status == "ok":
                verdicts.append([(passed, note) for passed, note in outcome.value])
            else:
                failures.append(outcome)
                verdicts.append([(False, f"sandbox: {outcome.value or outcome.status}")] * len(job.get("tests", [None])))
        if failures:
            warn(f"{len(failures)} of {len(jobs)} runs of programs failed in the sandbox and count as wrong: {failures[0].value}")
        return [[verdict for n in part for verdict in verdicts[n]] for part in parts]

    def close(self) -> None:
        self.pool.close()


class CodeReward(Reward):
    required_fields = {"question": TEXT, "test_method": TEXT}
    answer_field = None
    filter_by_solve_rate = False

    def __init__(self, settings: Any = None, execute: Any = None) -> None:
        super().__init__(settings)
        self.all_or_nothing = settings is not None and settings.code_score == "all"
        self.filter_by_solve_rate = self.all_or_nothing  # rewards are then 0 and 1, as in math
        self.checker = CodeChecker() if execute is None else CodeChecker(execute.num_chunk, execute.memory_mb)

    @classmethod
    def from_config(cls, config: Any) -> CodeReward:
        return cls(config.reward, config.execute)

    @classmethod
    def instruction(cls, task) -> str:
        return code_turn(task.question, task.fields)

    @classmethod
    def record_problem(cls, record: Mapping[str, Any]) -> str | None:
        if (problem := super().record_problem(record)) is not None:
            return problem
        limit = record.get("test_time_limit", DEFAULT_SECONDS)
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not (math.isfinite(limit) and limit > 0):
            return f"field 'test_time_limit' is {limit!r}, wanted seconds above 0"
        if record["test_method"] == "function":
            if not isinstance(record.get("prefix", ""), str):
                return f"field 'prefix' is {type(record['prefix']).__name__}, wanted text"
            return _list_problem(record, "test_list")
        if record["test_method"] == "stdio":
            if (problem := _list_problem(record, "test_input") or _list_problem(record, "test_output")) is not None:
                return problem
            num_inputs, num_outputs = len(record["test_input"]), len(record["test_output"])
            if num_inputs != num_outputs:
                return f"field 'test_input' has {num_inputs} entries and 'test_output' {num_outputs}, wanted as many"
            return None
        return f"field 'test_method' is {record['test_method']!r}, wanted function or stdio"

    def score(self, responses: Sequence[ResponseToScore], progress: Progress | None = None) -> list[Score]:
        codes = [last_program(response.text) for response in responses]
        notes = [
            "no python block" if code is None else "program too long" if len(code) > LONGEST_PROGRAM else None for code in codes
        ]
        programs = [(code, r.task.fields) for code, r, note in zip(codes, responses, notes) if note is None]
        with contextlib.ExitStack() as stack:
            if progress is None:
                progress = stack.enter_context(progress_bar())
            verdicts = iter(self.checker.check(programs, progress))
        return [Score(0.0, False, note=note) if note is not None else self._as_score(next(verdicts)) for note in notes]

    def _as_score(self, verdicts: list[Verdict]) -> Score:
        passed = sum(ok for ok, _ in verdicts)
        correct = passed == len(verdicts)
        note = None if correct else f"{passed} of {len(verdicts)} tests passed; {next(why for ok, why in verdicts if not ok)}"
        return Score(float(correct) if self.all_or_nothing else passed / len(verdicts), correct, note=note)

    def close(self) -> None:
        self.checker.close()


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar over runs of programs: on a terminal only, and on one process only."""
    from tqdm import tqdm

    disable = None if os.environ.get("RANK", "0") == "0" else True
    with tqdm(desc="tests", unit="run", leave=False, disable=disable, delay=1.0) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def _list_problem(record: Mapping[str, Any], name: str) -> str | None:
    value = record.get(name)
    if value is None:
        return f"field {name!r} is missing"
    if not isinstance(value, LIST):
        return f"field {name!r} is {type(value).__name__}, wanted a list"
    if not value:
        return f"field {name!r} is empty"
    wrong = next((n for n, item in enumerate(value) if not isinstance(item, str)), None)
    return None if wrong is None else f"field {name!r}, entry {wrong + 1}, is {type(value[wrong]).__name__}, wanted text"

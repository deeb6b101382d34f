"""Golden sets of rewards: boxed answers, equality of answers, programs against tests, group-normalised rewards.

A set is a JSON file; its name says its kind. Sizes, seeds and further files are not known here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import numpy as np

from reward.advantages import drop_reason, is_overlong, zscore
from reward.code_reward import CodeChecker
from reward.math_reward import MathChecker
from reward.math_text import for_parser, last_boxed, normalise, quick_verdict
from tests.golden.result import SetResult

EQUAL_SHARE = 0.97
"""The share of math_equal cases whose verdict must be that of a careful reader."""
REWARD_TOLERANCE = 1e-6
OVERLONG_MARGIN = 5
KEEP_SOLVE_RATE = (0.2, 0.8)


def check(folder: Path, root: Path | None = None) -> list[SetResult]:
    """The sets in `folder`, each named by its path under `root` (default: the folder above)."""
    folder = Path(folder)
    results = []
    for file in sorted(folder.glob("*.json")):
        path = file.with_suffix("").relative_to(root or folder.parent).as_posix()
        kind = next((kind for kind in CHECKS if file.stem.startswith(kind)), None)
        if kind is None:
            results.append(SetResult(path, "UNSUPPORTED", notes=[f"no check for a set called {file.stem}"]))
        else:
            results.append(CHECKS[kind](path, json.loads(file.read_text(encoding="utf-8"))))
    return results


def check_boxed(path: str, cases: list[dict[str, Any]]) -> SetResult:
    """Every extraction is the reader's; where another answer is defensible, a different one is only noted."""
    num_wrong, notes = 0, []
    for case in cases:
        got = last_boxed(case["text"])
        if got == case["human"]:
            continue
        num_wrong += not case.get("ambiguous", False)
        notes.append(f"{case['text']!r}: got {got!r}, reader {case['human']!r}{' (ambiguous)' if case.get('ambiguous') else ''}")
    return SetResult(path, "FAIL" if num_wrong else "PASS", len(cases), num_wrong, 0, notes)


def check_math_equal(path: str, cases: list[dict[str, Any]]) -> SetResult:
    """max_error: the share of verdicts that are not the reader's."""
    checker = MathChecker()
    try:
        verdicts = checker.compare([(case["prediction"], case["ground_truth"]) for case in cases])
    finally:
        checker.close()
    notes = []
    for case, verdict in zip(cases, verdicts):
        if verdict.equal != case["human"]:
            reason = verdict.note or _how(case["prediction"], case["ground_truth"])
            pair = f"{case['prediction']} against {case['ground_truth']}"
            notes.append(f"{pair}: got {verdict.equal}, reader {case['human']}: {reason}")
    share = len(notes) / len(cases) if cases else 0.0
    tolerance = 1 - EQUAL_SHARE
    return SetResult(path, "FAIL" if share > tolerance + 1e-12 else "PASS", len(cases), share, tolerance, notes)


def _how(prediction: str, answer: str) -> str:
    """How a verdict came about."""
    if quick_verdict(prediction, answer) is not None:
        return f"decided by text, {normalise(prediction)!r} and {normalise(answer)!r}"
    return f"decided by math-verify, from {for_parser(prediction)!r} and {for_parser(answer)!r}"


FUNCTION_SECONDS, SCRIPT_SECONDS = 3.0, 4.0


def check_code_function(path: str, cases: list[dict[str, Any]]) -> SetResult:
    """The verdict on every test of every program is the reader's. max_error: how many are not."""
    programs = [
        (case["code"], {"test_method": "function", "test_list": case["tests"], "test_time_limit": FUNCTION_SECONDS})
        for case in cases
    ]
    return _compare_verdicts(path, cases, programs, [case["human_pass"] for case in cases])


def check_code_stdio(path: str, cases: list[dict[str, Any]]) -> SetResult:
    """As for functions; an expected output may be given as [text, times]."""
    programs = []
    for case in cases:
        expected = case["expected_output"]
        if expected is None:
            text, times = case["expected_output_repeat"]
            expected = text * times
        fields = {"test_method": "stdio", "test_input": [case["input"]], "test_output": [expected]}
        programs.append((case["code"], {**fields, "test_time_limit": SCRIPT_SECONDS}))
    return _compare_verdicts(path, cases, programs, [[case["human_pass"]] for case in cases])


def _compare_verdicts(path: str, cases: list[dict], programs: list[tuple[str, dict]], wanted: list[list[bool]]) -> SetResult:
    checker = CodeChecker()
    try:
        results = checker.check(programs)
    finally:
        checker.close()
    num_wrong, notes = 0, []
    for case, verdicts, human in zip(cases, results, wanted):
        got = [passed for passed, _ in verdicts]
        if got != human:
            num_wrong += sum(a != b for a, b in zip(got, human))
            notes.append(f"{case['id']}: got {got}, reader {human}: {'; '.join(why or 'passed' for _, why in verdicts)}")
    return SetResult(path, "FAIL" if num_wrong else "PASS", len(cases), num_wrong, 0, notes)


def check_group_rewards(path: str, sets: list[dict[str, Any]]) -> SetResult:
    """Rewards within the tolerance; correctness and the choice of groups exactly (one that differs is an infinite error)."""
    error, cases, notes = 0.0, 0, []
    for one in sets:
        if one["kind"] not in ("math", "code"):
            notes.append(f"kind {one['kind']} is not known")
            error = float("inf")
            continue
        for number, task in enumerate(one["tasks"]):
            cases += 1
            scores, correct = _math_scores(one, task) if one["kind"] == "math" else _code_scores(task)
            bounds = KEEP_SOLVE_RATE if one["kind"] == "math" else (0.0, 1.0)
            got = zscore(np.asarray(scores, dtype=np.float64))
            kept = drop_reason(scores, correct, bounds) is None
            error = max(error, float(np.abs(got - np.asarray(task["rewards"], dtype=np.float64)).max()))
            wanted = task.get("correctness_after_length_rule", correct)
            if kept != task["kept_for_training"] or list(correct) != list(wanted):
                notes.append(f"{one['kind']} task {number}: kept {kept}, correct {correct}")
                error = float("inf")
    return SetResult(path, "PASS" if error <= REWARD_TOLERANCE else "FAIL", cases, error, REWARD_TOLERANCE, notes)


def _math_scores(one: dict[str, Any], task: dict[str, Any]) -> tuple[list[float], list[bool]]:
    checker = MathChecker(num_workers=1)
    try:
        verdicts = checker.compare([(answer, task["ground_truth"]) for answer in task["answers"]])
    finally:
        checker.close()
    correct = [
        verdict.equal and not is_overlong(length, one["max_token"], OVERLONG_MARGIN)
        for verdict, length in zip(verdicts, task["response_length"])
    ]
    return [float(c) for c in correct], correct


def _code_scores(task: dict[str, Any]) -> tuple[list[float], list[bool]]:
    """The score of a response is the number of tests it passes; it is right where it passes all."""
    return [float(sum(passed)) for passed in task["test_pass"]], [all(passed) for passed in task["test_pass"]]


CHECKS: dict[str, Callable[[str, Any], SetResult]] = {
    "boxed": check_boxed,
    "math_equal": check_math_equal,
    "code_function": check_code_function,
    "code_stdio": check_code_stdio,
    "group_rewards": check_group_rewards,
}

"""data_type `math`: the last boxed answer equals the expected one (DESIGN, "Reward")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Sequence

from data.instructions import math_turn
from reward.math_text import last_boxed, quick_verdict
from reward.registry import TEXT, TEXT_OR_NUMBER, Progress, ResponseToScore, Reward, Score
from reward.worker_pool import WorkerPool

LONGEST_ANSWER = 2000  # characters; more is no answer, and parsers take quadratic time or worse


@dataclass(frozen=True)
class Verdict:
    equal: bool
    note: str | None = None
    """Why the checker gave up, where it did: the answer then counts as wrong."""


class MathChecker:
    """Compares answers: by their text where that settles it, else by math-verify in worker processes with a time limit."""

    def __init__(self, num_workers: int = 2, timeout_seconds: float = 5.0) -> None:
        self.pool = WorkerPool("reward.math_verdict:is_equal", num_workers, timeout_seconds)

    def compare(self, pairs: Sequence[tuple[str, str]], progress: Progress | None = None) -> list[Verdict]:
        """Verdict of each (prediction, answer). No pair raises: one that hangs or crashes the checker is unequal."""
        unique = dict.fromkeys(pairs)
        verdicts: dict[tuple[str, str], Verdict] = {}
        open_pairs = []
        for pair in unique:
            if max(map(len, pair)) > LONGEST_ANSWER:
                verdicts[pair] = Verdict(pair[0].strip() == pair[1].strip(), "answer too long to be parsed")
            elif (equal := quick_verdict(*pair)) is not None:
                verdicts[pair] = Verdict(equal)
            else:
                open_pairs.append(pair)
        num_settled = len(verdicts)
        if progress is not None:
            progress(num_settled, len(unique))

        def report(done: int, _: int) -> None:
            progress(num_settled + done, len(unique))

        outcomes = self.pool.map([list(pair) for pair in open_pairs], report if progress is not None else None)
        for pair, outcome in zip(open_pairs, outcomes):
            if outcome.status == "ok":
                verdicts[pair] = Verdict(outcome.value)
            else:
                what = {"timeout": "checker timed out", "died": "checker died", "error": "checker failed"}[outcome.status]
                verdicts[pair] = Verdict(False, what if outcome.value is None else f"{what}: {outcome.value}")
        return [verdicts[pair] for pair in pairs]

    def close(self) -> None:
        self.pool.close()


class MathReward(Reward):
    required_fields = {"question": TEXT, "ground_truth_answer": TEXT_OR_NUMBER}

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self.checker = MathChecker() if settings is None else MathChecker(settings.num_workers, settings.timeout_seconds)

    @classmethod
    def instruction(cls, task) -> str:
        return math_turn(task.question)

    def score(self, responses: Sequence[ResponseToScore], progress: Progress | None = None) -> list[Score]:
        boxed = [last_boxed(response.text) for response in responses]
        pairs = [(box, response.task.answer) for box, response in zip(boxed, responses) if box is not None]
        verdicts = iter(self.checker.compare(pairs, progress))
        scores = []
        for box in boxed:
            verdict = Verdict(False, "no boxed answer") if box is None else next(verdicts)
            scores.append(Score(float(verdict.equal), verdict.equal, note=verdict.note))
        return scores

    def close(self) -> None:
        self.checker.close()

"""data_type `exact`: the stripped text equals the answer, character by character. The tiny tasks use it."""

from __future__ import annotations

from typing import Sequence

from reward.registry import TEXT, TEXT_OR_NUMBER, Progress, ResponseToScore, Reward, Score


class ExactReward(Reward):
    required_fields = {"question": TEXT, "ground_truth_answer": TEXT_OR_NUMBER}
    chat = False

    def score(self, responses: Sequence[ResponseToScore], progress: Progress | None = None) -> list[Score]:
        correct = [r.text.strip() == r.task.answer.strip() for r in responses]
        if progress is not None:
            progress(len(responses), len(responses))
        return [Score(float(c), c) for c in correct]

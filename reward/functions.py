"""A user's own reward: a plain function, named by `reward.function: path/to/file.py:name` (or by a registered name).

    def brevity(task: Task, response_text: str, rollout: Rollout) -> float:
        return 1.0 / (1 + rollout.num_response)

It may return a number (the reward; whether the answer is right stays unknown, so only groups of equal rewards are dropped),
a bool (right or wrong: reward 1 or 0, and solve rates are counted), or a reward.registry.Score. The prompt and the fields
of the data set stay those of `dataset.data_type`. The function runs in the training process, one call per response.
"""

from __future__ import annotations

import inspect
import math
from numbers import Real
from typing import Any, Sequence

from common.errors import UserError
from common.plugins import import_file
from common.registry import did_you_mean
from reward.registry import REWARD_FUNCTIONS, Progress, ResponseToScore, Reward, RewardFunction, Score


def load_function(spec: str) -> RewardFunction:
    """`path/to/file.py:name`, or a name in REWARD_FUNCTIONS, -> the function. Raises UserError, also where it cannot be called
    with three arguments."""
    path, colon, name = spec.rpartition(":")
    if not colon or not path.endswith(".py"):
        if spec in REWARD_FUNCTIONS:
            return _checked(REWARD_FUNCTIONS.get(spec), spec)
        raise UserError(
            f"reward.function: got {spec!r}; give path/to/file.py:name"
            + (f", or one of {', '.join(REWARD_FUNCTIONS.names())}" if REWARD_FUNCTIONS.names() else "")
        )
    module = import_file(path, "reward.function")
    function = getattr(module, name, None)
    if function is None:
        here = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise UserError(f"reward.function: {path} has no function {name!r}{did_you_mean(name, here)}")
    if not callable(function):
        raise UserError(f"reward.function: {name!r} in {path} is {type(function).__name__}, not a function")
    return _checked(function, spec)


def _checked(function: RewardFunction, spec: str) -> RewardFunction:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # one of C does not say
        return function
    try:
        signature.bind(None, "", None)
    except TypeError as error:
        raise UserError(
            f"reward.function: {spec} takes {signature}, but is called with (task, response_text, rollout): {error}"
        ) from None
    return function


class FunctionReward(Reward):
    """Scores every response with one user's function."""

    def __init__(self, function: RewardFunction, name: str, settings: Any = None) -> None:
        super().__init__(settings)
        self.function = function
        self.name = name

    def score(self, responses: Sequence[ResponseToScore], progress: Progress | None = None) -> list[Score]:
        scores = []
        for n, response in enumerate(responses):
            try:
                result = self.function(response.task, response.text, response.rollout)
            except Exception as error:
                raise RuntimeError(f"reward.function {self.name} failed on task {response.task.id!r}: {error}") from error
            scores.append(self._as_score(result, response))
            if progress is not None:
                progress(n + 1, len(responses))
        return scores

    def _as_score(self, result: Any, response: ResponseToScore) -> Score:
        score = result if isinstance(result, Score) else None
        if isinstance(result, bool) or type(result).__name__ in ("bool", "bool_"):  # numpy's bool_ is not a bool
            score = Score(float(result), correct=bool(result))
        elif isinstance(result, Real):
            score = Score(float(result))
        if score is None or not math.isfinite(score.reward):
            raise UserError(
                f"reward.function {self.name}: returned {result!r} for task {response.task.id!r}; "
                "return a finite number, a bool or a Score"
            )
        if score.token_rewards is not None and len(score.token_rewards) != len(response.rollout.response_ids):
            raise UserError(
                f"reward.function {self.name}: {len(score.token_rewards)} token_rewards for task {response.task.id!r}, "
                f"wanted one for each of the {len(response.rollout.response_ids)} response tokens"
            )
        return score

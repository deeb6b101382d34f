"""What a reward is, and the registry of them, named by `dataset.data_type`. Nothing here imports torch.

A reward owns everything that depends on how answers are scored: which fields a record must have, what the prompt asks for,
and the score itself. A new one is a class that ends in a registry line, in this room or in a file of `experiment.plugins`:

    @REWARDS.register("shout")
    class ShoutReward(Reward):
        required_fields = {"question": TEXT}

        def score(self, responses):
            return [Score(float(r.text.isupper())) for r in responses]

A user's plain function is enough where only the score differs: see reward/functions.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, ClassVar, Mapping, Sequence

from common.records import Rollout, Task
from common.registry import NO_IMAGES, Registry

TEXT = (str,)
TEXT_OR_NUMBER = (str, int, float)
LIST = (list,)

_KINDS = {str: "text", int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}

Progress = Callable[[int, int], None]
"""Called as progress(done, total) while responses are scored."""


@dataclass(frozen=True)
class ResponseToScore:
    task: Task
    text: str
    """The response as text: up to the stop token, without it and without special tokens."""
    rollout: Rollout


@dataclass(frozen=True)
class Score:
    reward: float
    correct: bool | None = None
    """Whether the answer is right; None where the reward does not say (then solve rates do not filter)."""
    token_rewards: list[float] | None = None
    """Process reward: one number per response token."""
    note: str | None = None
    """Why, where it is not plain: "no boxed answer", "checker timed out"."""
    outcome: float = 0.0
    """With token_rewards: the part of the reward that is not in them, and belongs to the last denoising step."""


class Reward:
    """Base of all rewards: class attributes are facts that hold without an instance, `score` is the work."""

    required_fields: ClassVar[Mapping[str, tuple[type, ...]]] = {"question": TEXT}
    """Fields that every record of the data set must have, and the types they may be."""
    answer_field: ClassVar[str | None] = "ground_truth_answer"
    """The field that becomes Task.answer (as text)."""
    chat: ClassVar[bool] = True
    """True: the prompt is a chat turn in the model's format; False: the question verbatim."""
    filter_by_solve_rate: ClassVar[bool] = True
    """False: groups are dropped only where all their rewards are equal (rewards with many values, such as tests passed)."""

    has_outcome: ClassVar[bool] = True
    """False: nothing but a judge scores (reward/judge.py), in evaluations too."""

    def __init__(self, settings: Any = None) -> None:
        """`settings`: the config's `reward` section (num_workers, timeout_seconds, ...)."""
        self.settings = settings

    @classmethod
    def from_config(cls, config: Any) -> Reward:
        """Made for a job, whose other sections a reward may need too."""
        return cls(config.reward)

    @classmethod
    def instruction(cls, task: Task) -> str:
        """The text of the user's turn: by default the bare question."""
        return task.question

    @classmethod
    def record_problem(cls, record: Mapping[str, Any]) -> str | None:
        """What is wrong with a data set's record (`field 'x' is missing`), or None. Rewards with optional fields extend it."""
        for name, types in cls.required_fields.items():
            value = record.get(name)
            if value is None:
                return f"field {name!r} is missing"
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                wanted = " or ".join(dict.fromkeys(_KINDS.get(t, t.__name__) for t in types))
                return f"field {name!r} is {_KINDS.get(type(value), type(value).__name__)}, wanted {wanted}"
            if isinstance(value, (str, list)) and len(value) == 0:
                return f"field {name!r} is empty"
            if isinstance(value, str) and not value.strip():
                return f"field {name!r} is blank"
        return None

    def score(self, responses: Sequence[ResponseToScore], progress: Progress | None = None) -> list[Score]:
        """One Score per response, in order. Called once per RL step or evaluation, with all of its responses."""
        raise NotImplementedError

    def take_counts(self) -> dict[str, float]:
        """Sums since the last call, that may be added up over processes: what `metrics` is made of."""
        return {}

    def metrics(self, counts: dict[str, float] | None = None) -> dict[str, float]:
        """Numbers for the log, by name (`judge/score`), of `counts`; None: of this process, since the last call."""
        return {}

    def close(self) -> None:
        """End worker processes, if any. Called once; also safe to leave out: workers end with their parent."""


REWARDS: Registry[type[Reward]] = Registry("reward")
REWARDS.register("math", "reward.math_reward:MathReward")
REWARDS.register("exact", "reward.exact:ExactReward")
REWARDS.register("code", "reward.code_reward:CodeReward")
REWARDS.register("judge", "reward.judge:NoOutcome")
REWARDS.lacks("mmu", NO_IMAGES)

RewardFunction = Callable[[Task, str, Rollout], "float | bool | Score"]
REWARD_FUNCTIONS: Registry[RewardFunction] = Registry("reward function")


def _names_a_function(name: str | None) -> bool:
    return name is not None and (name in REWARD_FUNCTIONS or name not in REWARDS)


def check_function(settings: Any) -> None:
    """Raises UserError where `reward.function` names a function that is not there or takes other arguments. Asked before anything
    long: `make_reward` comes behind the model."""
    if _names_a_function(settings.function):
        from reward.functions import load_function

        load_function(settings.function)


def scoring_reward(data_type: str, function: str | None) -> type[Reward] | None:
    """The registered reward that scores: the one that `reward.function` names, else that of `dataset.data_type`. None: a function
    does. Raises UserError where there is none of that name."""
    reward = REWARDS.get(data_type, "dataset.data_type")
    if _names_a_function(function):
        return None
    return reward if function is None else REWARDS.get(function, "reward.function")


def make_reward(data_type: str, settings: Any = None, config: Any = None) -> Reward:
    """The reward of `dataset.data_type`, scored by `settings.function` where that is set. Raises UserError.

    `settings`: the config's `reward` section; `config`: the whole, where there is one."""

    function = getattr(settings, "function", None)
    reward = scoring_reward(data_type, function)
    if reward is not None:
        return reward(settings) if config is None else reward.from_config(config)
    from reward.functions import FunctionReward, load_function

    return FunctionReward(load_function(function), function, settings)

"""The reward stage: rollouts -> scored rollouts, with advantages and the groups that are not trained on."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Mapping, Sequence

from common.errors import UserError
from common.records import Rollout, ScoredRollout, Task
from reward.advantages import filter_groups, group_advantages, is_overlong
from reward.judge import JudgedReward, judge_is_set
from reward.registry import Progress, ResponseToScore, Score, make_reward

if TYPE_CHECKING:
    from configs.schema import Config, Decoding

ROLLOUT_FIELDS = [field.name for field in dataclasses.fields(Rollout)]


def response_text(rollout: Rollout, tokenizer: Any) -> str:
    """The response up to its stop token, without it (it may be an ordinary token) and without special tokens."""
    end = rollout.num_response - (rollout.finish == "stop")
    # Clean-up of spaces would change answers: "f (x) , y" -> "f (x), y".
    return tokenizer.decode(rollout.response_ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)


def apply_length_rule(score: Score) -> Score:
    """An over-long response counts as wrong: not correct, reward 0 (or what it was, where that is less)."""
    correct = None if score.correct is None else False
    reward = min(score.reward, 0.0)
    return dataclasses.replace(score, reward=reward, correct=correct, token_rewards=None, outcome=0.0, note="over-long")


def overlong_penalty(num_response: int, max_response: int, penalty_tokens: int) -> float:
    """What is taken from the reward of a long response, 0 to 1: DAPO's soft overlong punishment (arXiv 2503.14476, equation 13).

    0 up to max_response - penalty_tokens tokens, from there linear, 1 from max_response on (a last block may reach beyond it).
    """
    if penalty_tokens == 0:
        return 0.0
    return min(1.0, max(0.0, (num_response - (max_response - penalty_tokens)) / penalty_tokens))


def apply_penalty(score: Score, penalty: float) -> Score:
    """`penalty` off the reward; where tokens have rewards of their own, off what falls on the last step. Right stays right."""
    outcome = score.outcome if score.token_rewards is None else score.outcome - penalty
    return dataclasses.replace(score, reward=score.reward - penalty, outcome=outcome)


class Scorer:
    """Scores rollouts as the config says. Holds the reward, whose worker processes live until `close`."""

    def __init__(self, config: Config, tasks_by_id: Mapping[str, Task], tokenizer: Any, decoding: Decoding | None = None) -> None:
        """`tasks_by_id` is read at every `score` and may grow. `decoding`: config.rollout (default) or config.evaluation, whose
        `max_token` the length rule counts from; `reward.overlong_margin: null` switches that rule off (responses as short as
        those of the tiny tasks may fill `max_token` rightly)."""
        low, high = config.reward.keep_solve_rate if len(config.reward.keep_solve_rate) == 2 else (1, 0)
        if not 0 <= low <= high <= 1:
            raise UserError(f"reward.keep_solve_rate: got {list(config.reward.keep_solve_rate)}, wanted [low, high] within 0..1")
        self.keep_solve_rate = (low, high)
        self.tasks_by_id = tasks_by_id
        self.tokenizer = tokenizer
        self.max_response = (decoding or config.rollout).max_response_length
        self.is_evaluation = decoding is not None
        self.overlong_margin = config.reward.overlong_margin
        # It shapes what is learnt; evaluations report the reward as it is.
        self.penalty_tokens = config.reward.overlong_penalty_tokens if decoding is None else 0
        self.advantage = config.training.advantage
        self.has_critic = config.model.value_shared or config.model.value_base_model is not None
        self.reward = make_reward(config.dataset.data_type, config.reward, config)
        # An evaluation counts right answers: there the judge is asked only where nothing else scores.
        if judge_is_set(config) and (decoding is None or not self.reward.has_outcome):
            self.reward = JudgedReward(self.reward, config, tokenizer, self.is_overlong)

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the reward's worker processes."""
        self.reward.close()

    def is_overlong(self, rollout: Rollout) -> bool:
        return is_overlong(rollout.num_response, self.max_response, self.overlong_margin)

    def metrics(self) -> dict[str, float]:
        """The reward's own numbers since the last call, of this process (`metrics_on_all_ranks`: of all)."""
        return self.reward.metrics()

    def score(self, rollouts: Sequence[Rollout], progress: Progress | None = None) -> list[ScoredRollout]:
        """Rollouts in any order -> scored ones in the same order; the responses to one task are a group.

        Sets reward, correct, token_rewards, advantage and, for every response of a group that teaches nothing, dropped.
        """
        responses = [ResponseToScore(self.tasks_by_id[r.task_id], response_text(r, self.tokenizer), r) for r in rollouts]
        scores = self.reward.score(responses, progress) if responses else []
        assert len(scores) == len(rollouts), f"{type(self.reward).__name__} gave {len(scores)} scores for {len(rollouts)} responses"
        scores = [apply_length_rule(score) if self.is_overlong(rollout) else score for rollout, score in zip(rollouts, scores)]
        if self.penalty_tokens:
            penalties = [overlong_penalty(r.num_response, self.max_response, self.penalty_tokens) for r in rollouts]
            scores = [apply_penalty(score, penalty) for score, penalty in zip(scores, penalties)]

        rewards, correct = [s.reward for s in scores], [s.correct for s in scores]
        task_ids = [rollout.task_id for rollout in rollouts]
        advantages = group_advantages(rewards, task_ids, self.advantage)
        bounds = self.keep_solve_rate if self.reward.filter_by_solve_rate else (0.0, 1.0)
        dropped: list[str | None] = [None] * len(rollouts)  # an evaluation drops nothing
        if not self.is_evaluation:
            dropped = filter_groups(rewards, correct, task_ids, bounds, self.has_critic)
        return [
            ScoredRollout(
                **{name: getattr(rollout, name) for name in ROLLOUT_FIELDS},
                reward=score.reward,
                correct=score.correct,
                token_rewards=score.token_rewards,
                outcome=score.outcome,
                advantage=float(advantage),
                dropped=reason,
            )
            for rollout, score, advantage, reason in zip(rollouts, scores, advantages, dropped)
        ]


def score_on_all_ranks(scorer: Scorer, rollouts: Sequence[Rollout], accelerator: Any) -> list[ScoredRollout]:
    """`scorer.score` of rollouts that every rank holds (the same list): whole groups are dealt out, all ranks get all, in order."""
    from common import dist

    task_ids = list(dict.fromkeys(r.task_id for r in rollouts))
    own_tasks = set(task_ids[accelerator.process_index :: accelerator.num_processes])
    own = scorer.score([r for r in rollouts if r.task_id in own_tasks])
    scored = {(r.task_id, r.sample): r for share in dist.gather_objects(accelerator, own) for r in share}
    return [scored[r.task_id, r.sample] for r in rollouts]


def metrics_on_all_ranks(scorer: Scorer, accelerator: Any) -> dict[str, float]:
    """`scorer.metrics()` over all processes, the same on each."""
    from common import dist

    total: dict[str, float] = {}
    for counts in dist.gather_objects(accelerator, scorer.reward.take_counts()):
        for name, count in counts.items():
            total[name] = total.get(name, 0.0) + count
    return scorer.reward.metrics(total)

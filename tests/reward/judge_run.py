"""A run that does nothing but have responses judged, as a process that tests can kill: URL, run directory, number of responses."""

from __future__ import annotations

import dataclasses
import json
import sys

from common.errors import entry_point
from common.records import Rollout, Task
from configs.schema import Config
from reward.judge_client import JudgeRequest
from reward.judge_prompts import GradingPrompt
from reward.scoring import Scorer


class Letters:
    """A tokenizer whose ids are code points; 0 is special."""

    def decode(self, ids, skip_special_tokens=True, clean_up_tokenization_spaces=False):
        return "".join(chr(i) for i in ids if i)


def rollout(task_id: str, sample: int, text: str, finish: str = "stop", behind: str = "", steps: list | None = None) -> Rollout:
    """`text`, a stop token (id 0), and what follows in its block."""
    ids = [ord(c) for c in text] + ([0] if finish == "stop" else [])
    all_ids = ids + [ord(c) for c in behind]
    size = len(all_ids)
    steps = steps or [1] * size
    return Rollout(task_id, sample, [1], all_ids, steps, [0.0] * size, [0.0] * size, len(ids), finish, size, 0, 4)


def make_config(project: str | None, base_url: str | None = None, k_sample: int = 2, chunk: int = 4, **judge) -> Config:
    config = Config()
    config.experiment.project = project
    config.dataset.data_type = "exact"
    config.rollout.max_token = 1000
    config.reward.keep_solve_rate = [0.0, 1.0]
    config.rollout.reward_model = dataclasses.replace(config.rollout.reward_model, reward_chunk_length=chunk, k_sample=k_sample)
    settings = {"timeout_seconds": 5.0, "retry_seconds": 20.0, "concurrency": 4, **judge}
    config.reward.judge = dataclasses.replace(config.reward.judge, base_url=base_url, **settings)
    return config


def requests(number: int, **fields) -> list[JudgeRequest]:
    return [JudgeRequest(GradingPrompt("?", f"part {n}", "m", **fields), n) for n in range(number)]


def replies_of(judge, asked: list[JudgeRequest]) -> dict[int, str]:
    replies = {}
    judge.complete(asked, lambda n, text: replies.setdefault(n, text))
    return replies


@entry_point
def main() -> None:
    url, project, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
    settings = json.loads(sys.argv[4]) if len(sys.argv) > 4 else {}
    rollouts = [rollout("a", n, f"{n:04d}abcdefgh") for n in range(number)]
    with Scorer(make_config(project, url, **settings), {"a": Task("a", "which?", "12")}, Letters()) as scorer:
        scored = scorer.score(rollouts)
    print(json.dumps([r.token_rewards for r in scored]))


if __name__ == "__main__":
    main()

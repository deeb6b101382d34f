"""A control, loaded as a plugin: `exact` rewards, permuted among the responses to each task. Nothing can be learnt from them."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Sequence

import numpy as np

from reward.exact import ExactReward
from reward.registry import REWARDS, Progress, ResponseToScore, Score


@REWARDS.register("exact_permuted")
class PermutedReward(ExactReward):
    """Solve rates stay true (`correct`), only the reward that is trained on moves to another response of the group."""

    def score(self, responses: Sequence[ResponseToScore], progress: Progress | None = None) -> list[Score]:
        scores = super().score(responses, progress)
        groups: dict[str, list[int]] = {}
        for index, response in enumerate(responses):
            groups.setdefault(response.task.id, []).append(index)
        for task_id, indices in groups.items():
            # The seed is the group's own content, so that a resumed run permutes alike.
            content = repr([responses[i].rollout.response_ids for i in indices])
            order = np.random.default_rng(zlib.crc32((task_id + content).encode())).permutation(len(indices))
            rewards = [scores[indices[i]].reward for i in order]
            for index, reward in zip(indices, rewards, strict=True):
                scores[index] = dataclasses.replace(scores[index], reward=reward)
        return scores

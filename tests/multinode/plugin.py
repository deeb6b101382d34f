"""A plugin of the runs of test_runs.py: a reward that differs from the first step on, and, in ranks, a network that breaks.

    CUT_AT=update:2      a place of a step (tests/jobs/killer.py): there the rank that comes first takes its own interface down
    CUT_MARKER=FILE      made then; where it exists already nothing breaks
    KILL_AT, KILL_MARKER as in tests/jobs/killer.py
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from reward.exact import ExactReward
from reward.registry import REWARDS, Score

IS_LAUNCHER = "NODE_RANK" in os.environ and "RANK" not in os.environ
Base = ExactReward

if "CUT_AT" in os.environ and not IS_LAUNCHER:
    os.environ["KILL_AT"] = os.environ["CUT_AT"]
    os.environ["KILL_MARKER"] = os.environ["CUT_MARKER"]

if "KILL_AT" in os.environ and not IS_LAUNCHER:  # the launcher would import torch with it
    from tests.jobs import killer

    Base = killer.DigitsReward  # whose `score` is one of the places

    if "CUT_AT" in os.environ:
        from tests.multinode.hosts import INTERFACE

        def cut_now(step: int | None = None) -> None:
            marker = Path(os.environ["CUT_MARKER"])
            if (killer.step_now if step is None else step) == int(killer.STEP) and not marker.exists():
                marker.write_text(os.environ["CUT_AT"])
                subprocess.run(["ip", "link", "set", INTERFACE, "down"], check=True)

        killer.kill_now = cut_now


@REWARDS.register("characters")
class CharactersReward(Base):
    """The share of the response's characters that the answer has: random weights have some right. Right from a half on."""

    def score(self, responses, progress=None):
        super().score(responses, progress)
        shares = [sum(c in r.task.answer for c in r.text) / max(1, len(r.text)) for r in responses]
        return [Score(share, share >= 0.5) for share in shares]

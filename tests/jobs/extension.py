"""What a user adds to Unmask, in one file named by `experiment.plugins`; test_extension.py runs it.

A family, a reward, a trace method with an objective of its own, and an unmasking strategy.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from models.family import Piece
from models.registry import FAMILIES
from reward.registry import REWARDS, TEXT, Reward, Score
from sample.registry import UNMASKING
from sample.unmask import rank
from train.methods import METHODS, Method
from train.objectives import OBJECTIVES, Measures, ObjectiveOutput
from train.traces import TRACES, Response, Trace

# ---- a family: SDAR under other tensor names

SDAR = FAMILIES.get("sdar")


def renamed_pieces(config):
    return [dataclasses.replace(piece, published=rename(piece)) for piece in SDAR.pieces(config)]


def rename(piece: Piece) -> str:
    return piece.published.replace("model.layers.", "transformer.h.").replace("self_attn", "attn").replace("lm_head", "output")


FAMILIES.register("renamed", dataclasses.replace(SDAR, name="renamed", model_types=("renamed",), pieces=renamed_pieces))


# ---- a reward


@REWARDS.register("ascending")
class AscendingReward(Reward):
    """The share of neighbouring characters in ascending order. Needs no answer."""

    required_fields = {"question": TEXT}
    answer_field = None
    chat = False

    def score(self, responses, progress=None):
        return [Score(self.share(r.text)) for r in responses]

    @staticmethod
    def share(text: str) -> float:
        pairs = list(zip(text, text[1:]))
        return sum(a <= b for a, b in pairs) / len(pairs) if pairs else 0.0


def variety(task, text, rollout) -> float:
    """As reward.function: path/to/extension.py:variety. How many different characters there are."""
    return len(set(text))


# ---- a trace method: every block once, whole, as one slice; and an objective for it


@TRACES.register("whole_blocks")
def whole_blocks(response: Response, block_size: int, training, generator: np.random.Generator) -> Trace:
    start, end = len(response.prompt_ids), len(response.prompt_ids) + len(response.response_ids)
    block = np.arange(start // block_size, end // block_size)
    position = block[:, None] * block_size + np.arange(block_size)
    hidden = position >= start
    predicted = hidden & (position < start + response.num_trained)
    return Trace(block, hidden, predicted, rank=np.zeros(len(block), dtype=np.int64)).nonempty()


@OBJECTIVES.register("reinforce")
def reinforce(x, training) -> ObjectiveOutput:
    """Without ratio and clip: minimise -sum w A logp."""
    loss = -(x.weights * x.advantages * x.logprobs).sum()
    return ObjectiveOutput(loss, Measures(sums={"surprise": -x.logprobs.detach().sum()}))


METHODS.register("WholeBlocks", Method(trace="whole_blocks", objective="reinforce", stage="rl"))


# ---- an unmasking strategy


@UNMASKING.register("from_the_right")
def from_the_right(c, s) -> torch.Tensor:
    """The last n(s) masked positions."""
    position = torch.arange(c.masked.shape[1], device=c.masked.device).expand_as(c.masked).float()
    return c.masked & (rank(position, c.masked) < c.count[:, None])

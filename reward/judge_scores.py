"""From a response to chunks, and from judgements of the chunks to scores of tokens. Pure; standard library only."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Callable, Sequence

from common.records import Rollout
from reward.judge_prompts import NEUTRAL_SCORE


@dataclass(frozen=True)
class Chunk:
    """Tokens start..end of a response, and the text they add to it."""

    start: int
    end: int
    text: str


def cut_into_chunks(ids: Sequence[int], num_text: int, size: int, decode: Callable[[Sequence[int]], str]) -> list[Chunk]:
    """Chunks of `size` tokens that cover `ids`; the first `num_text` tokens have a text, what follows is the stop token.

    Decoded from the start each time, because a character may be made of several tokens, and a token mean another text at the
    start: a character that a cut divides belongs to the later chunk. The texts joined are the whole text. A chunk without a
    visible character is joined to the one before it.
    """
    whole = decode(ids[:num_text])
    chunks: list[Chunk] = []
    begin = 0
    for start in range(0, len(ids), size):
        end = min(start + size, len(ids))
        until = len(whole) if end >= num_text else max(begin, len(os.path.commonprefix([whole, decode(ids[:end])])))
        text, begin = whole[begin:until], until
        if chunks and not text.strip():
            chunks[-1] = Chunk(chunks[-1].start, end, chunks[-1].text + text)
        else:
            chunks.append(Chunk(start, end, text))
    return chunks


def aggregate(scores: Sequence[float | None], how: str) -> float:
    """One score of several judgements; None among them are no judgements, and without any the score is neutral.

    mean: their mean. agreement: their mean where all lie on one side of neutral, else neutral.
    """
    given = [score for score in scores if score is not None]
    if not given or (how == "agreement" and disagree(given)):
        return NEUTRAL_SCORE
    return math.fsum(given) / len(given)


def disagree(scores: Sequence[float | None]) -> bool:
    """Whether the judgements do not all lie on the same side of neutral."""
    return len({(score > NEUTRAL_SCORE) - (score < NEUTRAL_SCORE) for score in scores if score is not None}) > 1


def response_score(chunks: Sequence[Chunk], scores: Sequence[float]) -> float:
    """Mean of the chunks' scores, weighted by their tokens; neutral for an empty response."""
    num_tokens = sum(chunk.end - chunk.start for chunk in chunks)
    if not num_tokens:
        return NEUTRAL_SCORE
    return math.fsum(score * (chunk.end - chunk.start) for chunk, score in zip(chunks, scores)) / num_tokens


def spread_over_tokens(rollout: Rollout, chunks: Sequence[Chunk], scores: Sequence[float], per_step: bool) -> list[float]:
    """Token rewards [response tokens]: a chunk's score on each of its tokens, 0 behind num_response.

    per_step: divided by the number of denoising steps that revealed a trained token, so that the undiscounted sum of the step
    rewards, r*_t = mean over tau(t), is a mean score in [-1, 1] however many steps were taken.
    """
    num_steps = len({step for step in rollout.step_map[: rollout.num_response] if step > 0})
    divisor = max(num_steps, 1) if per_step else 1
    rewards = [0.0] * len(rollout.response_ids)
    for chunk, score in zip(chunks, scores):
        rewards[chunk.start : chunk.end] = [score / divisor] * (chunk.end - chunk.start)
    return rewards

"""The records that the stages exchange: the only contract between sampling, rewards and training.

    Task -> prompt token ids -> Rollout -> ScoredRollout -> packed rows -> update

Rollouts carry token ids, never text: text is decoded for rewards and for display only. All per-token lists of one rollout
cover its response tokens and have one length.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterable, Iterator, Literal


@dataclass(frozen=True)
class Task:
    """One question with what is needed to score an answer to it."""

    id: str
    """Unique within its data set, and stable between runs: sampling noise is keyed on it."""
    question: str
    answer: str | None = None
    """The expected answer, where the reward compares with one."""
    fields: dict[str, Any] = field(default_factory=dict)
    """All other fields of the data set's record (tests, limits, image paths): the reward reads what it needs."""


@dataclass
class Rollout:
    """One sampled response and how it was unmasked (DESIGN, "The way of the data")."""

    task_id: str
    sample: int
    """Which of the task's k responses, from 0."""
    prompt_ids: list[int]
    response_ids: list[int]
    """Whole blocks: the tokens behind the first stop token are kept, because they were visible while its block was denoised."""
    step_map: list[int]
    """1-based number of the denoising forward of this sequence that revealed the token; 0 = never revealed."""
    logprobs: list[float]
    """Log-probability of the token at that forward, under the sampling temperature (1 where it is 0), before top-k/top-p."""
    entropy: list[float]
    """Entropy of the same distribution, nats."""
    num_response: int
    """Tokens up to and including the first stop token: these are trained, the others are context."""
    finish: Literal["stop", "length"]
    num_forwards: int
    """Denoising forwards of this sequence."""
    weights_version: int
    """Optimizer steps taken by the weights that sampled it."""
    block_size: int
    """Blocks have this many tokens, counted from `block_origin`."""

    def __post_init__(self) -> None:
        lengths = {len(self.response_ids), len(self.step_map), len(self.logprobs), len(self.entropy)}
        assert len(lengths) == 1, f"per-token lists of {self.task_id}/{self.sample} differ in length: {lengths}"
        assert 0 <= self.num_response <= len(self.response_ids)

    @property
    def block_origin(self) -> int:
        """From where blocks are counted: 0, the prompt included (block attention), or the prompt's end (full attention).

        Responses are whole blocks, so their lengths tell the two apart; where the prompt is whole blocks too they are one.
        """
        is_canvas = len(self.prompt_ids) % self.block_size and len(self.response_ids) % self.block_size == 0
        return len(self.prompt_ids) if is_canvas else 0


@dataclass
class ScoredRollout(Rollout):
    """A rollout with its reward and what training makes of it."""

    reward: float = 0.0
    """The scalar reward of the response."""
    correct: bool | None = None
    """Whether the answer is right, where the reward knows; solve rates count this."""
    token_rewards: list[float] | None = None
    """Process reward: one number per response token."""
    advantage: float = 0.0
    """Group-normalised reward of the response; objectives may replace it per token (value model)."""
    dropped: str | None = None
    """Why the response is not trained on ("too easy", "too hard", "prompt too long"); None: it is."""
    outcome: float = 0.0
    """With token_rewards: what falls on the tokens of the last step beside them. Without: `reward` is all, and falls there."""


def write_jsonl(path: str | os.PathLike, records: Iterable[Any]) -> None:
    """Write dataclasses or dicts as JSON lines, beside and renamed: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            for record in records:
                # __dict__, not dataclasses.asdict: that copies every list element by element.
                row = record.__dict__ if dataclasses.is_dataclass(record) else record
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_jsonl(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def read_rollouts(path: str | os.PathLike, scored: bool = True) -> list[ScoredRollout] | list[Rollout]:
    """Rollouts written by `write_jsonl`; unknown keys are an error, as a record of another version would be."""
    record = ScoredRollout if scored else Rollout
    return [record(**row) for row in read_jsonl(path)]

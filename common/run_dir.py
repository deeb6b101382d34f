"""The run directory: what a run writes, and how it is found again.

    config.yaml      the resolved settings
    metrics.jsonl    a line per step
    rollouts/        step_000012.jsonl: every scored response of that RL step
    ckpt/            Hugging Face checkpoints: optimized, step-N
    state/           step_000012/: what resuming needs (the newest one is kept)
    results/         evaluations
    report.html
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Callable

from common.errors import UserError

STATE_PREFIX = "step_"


class RunDir:
    """Paths of one run. Only the main process creates or deletes anything."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.rollouts = self.path / "rollouts"
        self.checkpoints = self.path / "ckpt"
        self.states = self.path / "state"
        self.results = self.path / "results"

    def rollout_file(self, step: int) -> Path:
        """The finished phase: every response of the step, scored."""
        return self.rollouts / f"step_{step:06d}.jsonl"

    def round_file(self, step: int, round_: int) -> Path:
        """A finished sampling round, not yet scored; removed when the step's file is written."""
        return self.rollouts / f"step_{step:06d}.round_{round_}.jsonl"

    def latest_state(self) -> Path | None:
        """The newest whole state. A half-written one has another name (its folder begins with a dot)."""
        states = sorted(self.states.glob(f"{STATE_PREFIX}*")) if self.states.is_dir() else []
        return states[-1] if states else None

    def write_state(self, step: int, write: Callable[[Path], None], is_main: bool, barrier: Callable[[], None]) -> None:
        """Let every process `write` its part into a new folder, then give it its name and drop the older ones."""
        final = self.states / f"{STATE_PREFIX}{step:06d}"
        partial = self.states / f".{final.name}.partial"
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        barrier()
        write(partial)
        barrier()
        if is_main:
            older = [p for p in self.states.iterdir() if p not in (partial, final)]
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            for path in older:
                shutil.rmtree(path, ignore_errors=True)
        barrier()

    def open(self, config: Any, start_from_scratch: bool) -> None:
        """Create the directory, or find an unfinished run of the same config in it. Raises UserError for anything else.

        start_from_scratch: any other existing run directory is refused; otherwise the run there goes on in any case.
        """
        from configs.load import config_difference, to_yaml

        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"experiment.project: {self.path} is a file: choose another name")
        if self.path.is_dir() and any(self.path.iterdir()):
            if not self.config.is_file():
                raise UserError(f"experiment.project: {self.path} exists and is no run directory (no config.yaml): choose another name")
            different = config_difference(self.config.read_text(encoding="utf-8"), config)
            if different and start_from_scratch:
                raise UserError(
                    f"experiment.project: {self.path} holds a run of another config ({different[0]}"
                    f"{f' and {len(different) - 1} more' if len(different) > 1 else ''}): choose another project, remove it, "
                    "or go on with it by experiment.start_from_scratch=false"
                )
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.config, to_yaml(config))


def write_text(path: Path, text: str) -> None:
    """Write beside and rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)

"""The run directory: what a run writes, and how it is found again.

config.yaml      the resolved settings
metrics.jsonl    a line per step
gradient_norms.jsonl   of every tensor, where they are asked for
rollouts/        step_000012.jsonl: every scored response of that RL step
ckpt/            Hugging Face checkpoints: optimized, step-N
state/           step_000012/: what resuming needs (the newest one is kept)
results/         evaluations
cache/           compiled kernels
report.html
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Callable

from common.errors import UserError
from common.files import recover_directories, remove_partials, replace_directory
from common.launch import already_launched

STATE_PREFIX = "step_"
CACHE = "cache"
"""Filled by libraries, maybe before anything else is here."""
STATE_FILE = "run.json"
"""In a state's folder: the counters of the run, beside what common/state.py writes."""


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
        """Let every process `write` its part into a new folder, then give it its name and, when it is on the disk, drop the older
        ones."""
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
            replace_directory(partial, final)
            for path in older:
                shutil.rmtree(path, ignore_errors=True)
        barrier()

    def differences(self, config: Any) -> list[str]:
        """Settings in which the run that is there has another value than `config`; [] where there is none."""
        from configs.load import config_difference

        return config_difference(self.config.read_text(encoding="utf-8"), config) if self.config.is_file() else []

    def check(self, config: Any) -> None:
        """Raises UserError where the run of `config` may not write here. Writes nothing itself.

        experiment.start_from_scratch: only an unfinished run of the same config goes on; otherwise any run that is here does.
        """
        self.check_path()
        if config.experiment.start_from_scratch:
            different = self.differences(config)
            if different:
                raise UserError(
                    f"experiment.project: {self.path} holds a run of another config ({different[0]}"
                    f"{f' and {len(different) - 1} more' if len(different) > 1 else ''}): choose another project, remove it, "
                    "or go on with it by experiment.start_from_scratch=false"
                )

    def check_path(self) -> None:
        """Raises UserError where the path is taken by something that is no run directory, or cannot be made."""
        try:
            nearest = next(path for path in [self.path, *self.path.absolute().parents] if path.exists())
        except OSError as error:  # a name that is too long, a folder that may not be entered
            raise UserError(f"experiment.project: {self.path}: {error.strerror}: choose another name") from error
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"experiment.project: {self.path}: {nearest} is no directory to write in: choose another name")
        is_new = nearest != self.path or all(path.name == CACHE or path.name.endswith(".partial") for path in self.path.iterdir())
        if not is_new and not self.config.is_file():
            raise UserError(f"experiment.project: {self.path} exists and is no run directory (no config.yaml): choose another name")

    def create(self, config: Any) -> None:
        """Make the directory, or take over the one that `check` has allowed, cleared of what a killed process left half-done."""
        from configs.load import to_yaml

        if self.differences(config):
            # Sampled under other settings, and by weights that will not come again.
            for file in self.rollouts_after(self.latest_step()):
                file.unlink()
        self.path.mkdir(parents=True, exist_ok=True)
        recover_directories(self.checkpoints)
        for folder in (self.path, self.rollouts, self.states, self.results):
            remove_partials(folder)
        write_text(self.config, to_yaml(config))

    def rollouts_after(self, step: int) -> list[Path]:
        """Rollout files of steps beyond `step`."""
        files = self.rollouts.glob(f"{STATE_PREFIX}*.jsonl")
        return sorted(file for file in files if int(file.name.removeprefix(STATE_PREFIX).partition(".")[0]) > step)

    def read_state(self) -> dict[str, Any] | None:
        """The counters of the newest state; None where there is none."""
        folder = self.latest_state()
        return None if folder is None else json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))

    def latest_step(self) -> int:
        """The step that a resumed run starts behind."""
        state = self.read_state()
        return 0 if state is None else state["step"]

    def is_finished(self, config: Any) -> bool:
        """Whether a run of this very config has come to its end here."""
        state = self.read_state()
        return state is not None and state["finished"] and not self.differences(config)

    def is_interrupted(self) -> bool:
        """Whether the run that is here, whatever its settings, has not come to its end."""
        state = self.read_state()
        return state is None or not state["finished"]

    def goodbye(self, config: Any) -> str:
        """What a finished run says of itself."""
        return f"finished: weights in {self.checkpoints / config.model.optimized_name}, curves in {self.path / 'report.html'}"


def is_over(config: Any) -> bool:
    """Asked before anything long: whether the run of `config` has come to its end already, which it says then.

    Raises UserError for a run directory that may not be used. Ranks do not ask: they begin and end together.
    """
    if already_launched():
        return False
    directory = RunDir(config.experiment.project)
    directory.check(config)
    if not directory.is_finished(config):
        return False
    print(directory.goodbye(config), flush=True)
    return True


def write_text(path: Path, text: str) -> None:
    """Write beside and rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)

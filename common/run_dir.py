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
.run.lock        held by the job that trains here; an evaluation holds .results-NAME.lock (common/run_lock.py)
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
from common.run_lock import SUFFIX as LOCK_SUFFIX
from common.run_lock import RunLock

STATE_PREFIX = "step_"
CACHE = "cache"
"""Filled by libraries, maybe before anything else is here."""
STATE_FILE = "run.json"
"""In a state's folder: the counters of the run, beside what common/state.py writes."""
STATE_KEYS = ("step", "finished", "num_optimizer_steps", "extra")
"""Of the counters those that going on needs (train/run.py)."""


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
        self.lock = RunLock(self.path / f".run{LOCK_SUFFIX}", f"experiment.project: {self.path}")
        """Held by the one process that writes the run: rank 0."""

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

    def differences(self, config: Any, file: Path | None = None) -> list[str]:
        """Settings in which the run that is there, or the results whose settings `file` holds, have another value than `config`; []
        where there is none. The directory's own name is none of them: it may be written otherwise, moved or copied."""
        import yaml
        from omegaconf.errors import OmegaConfBaseException

        from configs.difference import config_difference

        of_results = file is not None
        file = self.config if file is None else file
        if not file.is_file():
            return []
        try:
            text = file.read_text(encoding="utf-8")
            if not text.strip():
                raise ValueError("it is empty")
            different = config_difference(text, config, of_results)
        except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, AttributeError) as error:  # the last: of a list
            reason = " ".join(str(error).split())
            raise UserError(
                f"{file}: cannot be read as settings ({reason}): put back what the run was started with (its command with "
                "--print-config prints it), or choose another project"
            ) from error
        return [one for one in different if not one.startswith("experiment.project: ")]

    def check(self, config: Any) -> None:
        """Raises UserError where the run of `config` may not write here. Writes nothing itself.

        experiment.start_from_scratch: only an unfinished run of the same config goes on; otherwise any run that is here does.
        """
        self.check_path()
        if config.experiment.start_from_scratch:
            different = self.differences(config)
            if different:
                raise UserError(
                    f"experiment.project: {self.path} holds a run of another config ({_first(different)}): choose another project, "
                    "remove it, or go on with it by experiment.start_from_scratch=false"
                )

    def take(self, config: Any) -> None:
        """`check`, and hold the directory until `lock.release`. Raises UserError, also where another job holds it."""
        self.check(config)
        self.lock.acquire()
        try:
            self.check(config)  # again: the last holder may have written in between
        except UserError:
            self.lock.release()
            raise

    # -- results of eval.py: NAME.config.yaml says what NAME.json and the files beside it are of

    def results_config(self, name: str) -> Path:
        return self.results / f"{name}.config.yaml"

    def check_results(self, config: Any, name: str) -> None:
        """Raises UserError where results NAME are there of another config: only the same evaluation writes over itself."""
        self.check_path()
        there = f"experiment.project: {self.path} holds results of {name}"
        what_to_do = f"choose another project, or move {self.results / name}.* away"
        if self.results_config(name).is_file():
            different = self.differences(config, self.results_config(name))
            if different:
                raise UserError(f"{there} by another config ({_first(different)}): {what_to_do}")
        elif (self.results / f"{name}.json").is_file():
            raise UserError(f"{there} by settings that are not known (no {self.results_config(name).name}): {what_to_do}")

    def results_lock(self, name: str) -> RunLock:
        """Held by an evaluation that will write results NAME. Others may be made beside it, also while the run is trained."""
        return RunLock(self.path / f".results-{name}{LOCK_SUFFIX}", f"experiment.project: {self.path} (results of {name})")

    def save_config(self, config: Any, name: str) -> None:
        """Keep the settings of results NAME, and as those of the directory where it has none: a training run's stay. Clears up
        behind an evaluation of this name that was killed; to be called by the holder of its lock."""
        from configs.load import to_yaml

        remove_partials(self.results, f"{name}.")
        if not self.config.is_file():  # first: by it the directory is known
            write_text(self.config, to_yaml(config))
        write_text(self.results_config(name), to_yaml(config))

    # -- the path

    def check_path(self) -> None:
        """Raises UserError where the path is taken by something that is no run directory, or cannot be made."""
        try:
            nearest = next(path for path in [self.path, *self.path.absolute().parents] if path.exists())
        except OSError as error:  # a name that is too long, a folder that may not be entered
            raise UserError(f"experiment.project: {self.path}: {error.strerror}: choose another name") from error
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"experiment.project: {self.path}: {nearest} is no directory to write in: choose another name")
        names = [path.name for path in self.path.iterdir()] if nearest == self.path else []
        is_new = all(name == CACHE or name.endswith((".partial", LOCK_SUFFIX)) for name in names)
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
        for folder in (self.path, self.rollouts, self.states):
            remove_partials(folder)
        remove_partials(self.results, "step-")  # its own; evaluations may be at work there
        write_text(self.config, to_yaml(config))

    def rollouts_after(self, step: int) -> list[Path]:
        """Rollout files of steps beyond `step`."""
        files = self.rollouts.glob(f"{STATE_PREFIX}*.jsonl")
        return sorted(file for file in files if int(file.name.removeprefix(STATE_PREFIX).partition(".")[0]) > step)

    def read_state(self) -> dict[str, Any] | None:
        """The counters of the newest state; None where there is none. Raises UserError where they cannot be read."""
        folder = self.latest_state()
        if folder is None:
            return None
        file = folder / STATE_FILE
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise broken_state(file, getattr(error, "strerror", None) or str(error)) from error
        missing = [key for key in STATE_KEYS if not isinstance(state, dict) or key not in state]
        if missing:
            raise broken_state(file, f"{missing[0]!r} is not in it")
        return state

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


def broken_state(file: Path, reason: str) -> UserError:
    """Of a file of a state that was damaged: a state gets its name when it is whole."""
    folder = next((folder for folder in file.parents if folder.name.startswith(STATE_PREFIX)), file.parent)
    return UserError(
        f"{file}: cannot be read ({reason}), the state is not whole: put it back from a copy, or remove {folder} and the run goes "
        "on from an older state, or begins again where there is none"
    )


def is_over(config: Any) -> bool:
    """Asked before anything long: whether the run of `config` has come to its end already, which it says then.

    Raises UserError for a run directory that may not be used. Ranks do not ask: they begin and end together.
    """
    if already_launched():
        return False
    directory = RunDir(config.experiment.project)
    directory.lock.check()
    directory.check(config)
    if not directory.is_finished(config):
        return False
    print(directory.goodbye(config), flush=True)
    return True


def _first(different: list[str]) -> str:
    return f"{different[0]}{f' and {len(different) - 1} more' if len(different) > 1 else ''}"


def write_text(path: Path, text: str) -> None:
    """Write beside and rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)

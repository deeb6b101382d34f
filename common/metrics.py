"""The numbers of a run: what is computed from rollouts, where it is kept, and the line that a person reads.

Keys are flat, `group/name`:

    rollout/*  solve_rate, response_length, cut_off_share, tokens_per_forward, steps_per_block, entropy, dropped_groups, ...
    train/*    loss, kl, clip_fraction, ratio_max, ratio_min, gradient_norm, learning_rate, num_skipped_updates
    gap/*      logprob_mean, logprob_max, k3: engine against trainer
    eval/NAME/accuracy, ...
    judge/*    what the judge was asked and said (docs/judge.md)
    time/*     seconds of a phase;  rate/*  tokens per second;  memory/*  GiB, recomputed layers

`metrics.jsonl` in the run directory holds one line per step, {"step": N, key: number, ...}. A step may have a second line
(an evaluation that came later): readers join them. With `logging.gradient_norms_every`, `gradient_norms.jsonl` holds a line per
measured optimizer step: {"step": N, "model": policy or value, "optimizer_step": n, "norms": {published name: norm}}.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import sys
import uuid
from collections import defaultdict
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Sequence

from common.errors import UserError, warn
from common.records import Rollout, ScoredRollout, write_jsonl
from common.step_line import Clock, fit_line, line_fields

METRICS_FILE = "metrics.jsonl"
GRADIENT_NORMS_FILE = "gradient_norms.jsonl"
VARYING_GROUPS = ("time/", "rate/", "memory/", "judge/")


def is_deterministic(key: str) -> bool:
    """Whether a resumed run must show the same value as an unbroken one: all but times, rates, memory and the judge's work."""
    return not key.startswith(VARYING_GROUPS)


# ---- what rollouts show ------------------------------------------------------------------------------------------------


def num_revealed(rollout: Rollout) -> int:
    """Tokens that a denoising forward revealed, those behind the stop token in its block included: the work that was done."""
    return sum(step > 0 for step in rollout.step_map)


def tokens_per_forward(rollouts: Iterable[Rollout]) -> float:
    """Revealed tokens / denoising forwards, both summed over the rollouts; 0 where nothing was sampled."""
    revealed = forwards = 0
    for rollout in rollouts:
        revealed += num_revealed(rollout)
        forwards += rollout.num_forwards
    return revealed / forwards if forwards else 0.0


def steps_of_blocks(rollout: Rollout) -> list[int]:
    """For every block with a revealed token, in order: the number of distinct steps that revealed its tokens."""
    steps: dict[int, set[int]] = defaultdict(set)
    for position, step in enumerate(rollout.step_map, start=len(rollout.prompt_ids) - rollout.block_origin):
        if step > 0:
            steps[position // rollout.block_size].add(step)
    return [len(steps[block]) for block in sorted(steps)]


def rollout_metrics(scored: Sequence[ScoredRollout]) -> dict[str, float]:
    """All `rollout/*` numbers of one RL step. Means are over what was sampled; a mean over nothing has no key.

    A rollout without a forward (its prompt was too long) counts in num_responses and in the dropped counts only.
    dropped_groups: tasks that have no response left to train on; dropped_groups_REASON: those of them with that reason.
    """
    metrics: dict[str, float] = {"rollout/num_responses": len(scored)}
    sampled = [rollout for rollout in scored if rollout.num_forwards > 0]
    if sampled:
        lengths = [rollout.num_response for rollout in sampled]
        metrics["rollout/reward"] = _mean([rollout.reward for rollout in sampled])
        metrics["rollout/response_length"] = _mean(lengths)
        metrics["rollout/response_length_max"] = max(lengths)
        metrics["rollout/num_tokens"] = sum(lengths)
        metrics["rollout/cut_off_share"] = _mean([rollout.finish == "length" for rollout in sampled])
        metrics["rollout/tokens_per_forward"] = tokens_per_forward(sampled)
    judged = [rollout.correct for rollout in sampled if rollout.correct is not None]
    if judged:
        metrics["rollout/solve_rate"] = _mean(judged)
    block_steps = [count for rollout in sampled for count in steps_of_blocks(rollout)]
    if block_steps:
        metrics["rollout/steps_per_block"] = _mean(block_steps)
    entropy = [
        value for rollout in sampled for value, step in zip(rollout.entropy[: rollout.num_response], rollout.step_map) if step > 0
    ]
    if entropy:
        metrics["rollout/entropy"] = _mean(entropy)

    groups: dict[str, list[str | None]] = defaultdict(list)
    for rollout in scored:
        groups[rollout.task_id].append(rollout.dropped)
    dropped = [reasons for reasons in groups.values() if all(reason is not None for reason in reasons)]
    metrics["rollout/num_groups"] = len(groups)
    metrics["rollout/dropped_responses"] = sum(rollout.dropped is not None for rollout in scored)
    metrics["rollout/dropped_groups"] = len(dropped)
    for reason in sorted({str(reason) for reasons in dropped for reason in reasons}):
        slug = re.sub(r"[^a-z0-9]+", "_", reason.lower()).strip("_")
        metrics[f"rollout/dropped_groups_{slug}"] = sum(reason in reasons for reasons in dropped)
    return metrics


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# ---- metrics.jsonl -----------------------------------------------------------------------------------------------------


def read_metrics(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, those of one step joined, in the order of steps. A torn last line (a killed run) is left out."""
    path = Path(run_dir) / METRICS_FILE
    steps: dict[int, dict[str, Any]] = {}
    for row in _read_rows(path):
        steps.setdefault(row["step"], {}).update(row)
    return [steps[step] for step in sorted(steps)]


def read_gradient_norms(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of gradient_norms.jsonl, in the order in which they were written; a torn last line is left out."""
    return _read_rows(Path(run_dir) / GRADIENT_NORMS_FILE)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):  # cut short by a kill: the step is done again
                break
            try:
                row = json.loads(line)
                int(row["step"])
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{path} line {number}: not a JSON object with a step ({error}): remove the line") from None
            rows.append(row)
    return rows


def _plain_number(value: Any) -> float | int | None:
    """A Python number of a Python, numpy or torch scalar; None where it is not finite."""
    if value is None:
        return None
    if hasattr(value, "item"):  # numpy and torch scalars
        value = value.item()
    if isinstance(value, bool):
        return int(value)
    assert isinstance(value, (int, float)), f"a metric is a number, got {value!r}"
    return value if math.isfinite(value) else None


class StepLines:
    """A file of JSON lines with a step each, which grows line by line and is cut back where a run is taken up again."""

    def __init__(self, path: Path) -> None:
        """Mends what a kill has left of the last line."""
        self.path = path
        with _disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _drop_torn_tail(path)

    def append(self, row: dict[str, Any]) -> None:
        """The line is on the disk when this returns."""
        with _disk_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def truncate_after(self, step: int) -> None:
        """Forget steps beyond `step`. The file is replaced whole."""
        if not self.path.exists():
            return
        with _disk_errors(self.path):
            rows = _read_rows(self.path)
            if any(row["step"] > step for row in rows):
                write_jsonl(self.path, [row for row in rows if row["step"] <= step])


class MetricsLog:
    """Keeps the metrics of a run: metrics.jsonl always, wandb and tensorboard when asked for.

    Only the main process writes; on the others every method does nothing. wandb and tensorboard are conveniences: where one is
    missing or fails there is one warning, and the run goes on with metrics.jsonl.
    """

    def __init__(self, run_dir: str | os.PathLike, config: Any, is_main: bool = True) -> None:
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / METRICS_FILE
        self.config = config
        self.is_main = is_main
        self._sinks: list[tuple[str, Callable[[int, dict], None], Callable[[], None]]] | None = None  # opened at the first write
        self._clock = Clock()
        self._resumed_after: int | None = None
        if is_main:
            self._metrics, self._norms = StepLines(self.path), StepLines(self.run_dir / GRADIENT_NORMS_FILE)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Append the metrics of one step, on the disk when it returns. What is not finite is written as null, and warned of."""
        if not self.is_main:
            return
        row: dict[str, Any] = {"step": int(step)}
        for key, value in metrics.items():
            row[key] = _plain_number(value)
        lost = [key for key, value in row.items() if value is None and metrics[key] is not None]
        if lost:
            warn(f"step {step}: not a finite number, written as null: {', '.join(lost)}")
        self._metrics.append(row)
        self._forward(step, {key: value for key, value in row.items() if key != "step" and value is not None})

    def write_gradient_norms(self, step: int, model: str, optimizer_step: int, norms: dict[str, float]) -> None:
        """Append the gradient norms of one optimizer step of `model` to a file of their own. What is not finite is null there."""
        if not self.is_main:
            return
        values = {name: _plain_number(value) for name, value in norms.items()}
        lost = [name for name, value in values.items() if value is None]
        if lost:
            warn(f"step {step}: gradients of {len(lost)} of {len(values)} tensors of the {model} are not finite, first {lost[0]}'s")
        self._norms.append({"step": int(step), "model": model, "optimizer_step": optimizer_step, "norms": values})

    def truncate_after(self, step: int) -> None:
        """Forget steps beyond `step`, which a resumed run does again."""
        self._resumed_after = step
        if self.is_main:
            self._metrics.truncate_after(step)
            self._norms.truncate_after(step)

    def line(self, step: int, total: int | None, metrics: dict[str, Any]) -> None:
        """Print the line of one step. On a terminal the last fields give way where the window is narrow."""
        if not self.is_main:
            return
        fields = line_fields(step, total, metrics, self._clock.eta_seconds(step, total))
        is_terminal = sys.stdout.isatty()
        print(fit_line(fields, shutil.get_terminal_size().columns if is_terminal else None), flush=True)

    def close(self) -> None:
        """Finish wandb and tensorboard."""
        for name, _, finish in self._sinks or []:
            try:
                finish()
            except Exception as error:  # the run is done: nothing is lost but their copy
                warn(f"{name}: {_one_line(error)}")
        self._sinks = None

    # -- wandb and tensorboard

    def _forward(self, step: int, values: dict[str, float]) -> None:
        if self._sinks is None:
            self._sinks = []
            if _setting(self.config, "wandb.enabled"):
                self._open("wandb", self._open_wandb)
            if _setting(self.config, "logging.tensorboard"):
                self._open("tensorboard", self._open_tensorboard)
        for sink in list(self._sinks):
            name, log, _ = sink
            try:
                log(step, values)
            except Exception as error:
                warn(f"{name}: {_one_line(error)}; the run goes on without it ({METRICS_FILE} has everything)")
                self._sinks.remove(sink)

    def _open(self, name: str, opener: Callable[[], tuple[Callable[[int, dict], None], Callable[[], None]]]) -> None:
        assert self._sinks is not None
        try:
            self._sinks.append((name, *opener()))
        except ImportError as error:
            warn(f"{name} is asked for but not installed ({_one_line(error)}); the run goes on without it: pip install {name}")
        except Exception as error:  # no network, no login, a full disk: theirs, not the run's
            warn(f"{name}: {_one_line(error)}; the run goes on without it ({METRICS_FILE} has everything)")

    def _open_wandb(self) -> tuple[Callable[[int, dict], None], Callable[[], None]]:
        import wandb

        id_file = self.run_dir / "wandb_id"  # a resumed run goes on in the same wandb run
        run_id = _setting(self.config, "wandb.run_id") or (
            id_file.read_text().strip() if id_file.exists() else uuid.uuid4().hex[:12]
        )
        resume = _setting(self.config, "wandb.resume")
        run = wandb.init(
            project=self.run_dir.name,
            entity=_setting(self.config, "wandb.entity"),
            name=self.run_dir.name,
            id=run_id,
            resume="allow" if resume in (None, "auto") else resume,  # wandb's own auto looks for crashed runs of this machine
            dir=str(self.run_dir),
            config=_as_dict(self.config),
        )
        id_file.write_text(run_id + "\n")
        return (lambda step, values: run.log(values, step=step)), run.finish

    def _open_tensorboard(self) -> tuple[Callable[[int, dict], None], Callable[[], None]]:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if self._resumed_after is None else self._resumed_after + 1
        writer = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=purge_step)

        def log(step: int, values: dict[str, float]) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        return log, writer.close


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turns a full or unwritable disk into one line for the user."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be written ({reason}): free the disk and start again, the run goes on") from error


def _drop_torn_tail(path: Path) -> None:
    """Cut a last line that a kill left without its end, so that the next line does not continue it."""
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with open(path, "r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _setting(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part, None)
    return config


def _as_dict(config: Any) -> Any:
    return dataclasses.asdict(config) if dataclasses.is_dataclass(config) else None


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]

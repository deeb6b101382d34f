"""A plugin of test_resume.py and of distributed/test_faults.py: ends its process at one place of one RL or SFT step, by default
with no chance to clean up.

    KILL_AT=update:3     the place, a name in PLACES, and the step
    KILL_MARKER=FILE     made at the kill; where it exists already nothing is killed
    KILL_RANK=1          of several processes this one alone; left out: whichever comes first
    KILL_BY=kill         by SIGKILL; interrupt: as Ctrl-C does; raise: by an error; memory: by one that says that the GPU's memory
                         is full; full: by filling the GPU's memory, so that whatever wants some next fails

Without KILL_AT it changes nothing. It also registers the rewards of those runs, which differ more than right and wrong do.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any, Callable

import huggingface_hub
import torch

import common.dist
import common.files
import common.metrics
import common.report
import common.run_dir
from reward.exact import ExactReward
from reward.registry import REWARDS, Score
from sample.block import BlockEngine
from sample.canvas import CanvasEngine

ENGINES = [BlockEngine, CanvasEngine]
"""Those of a CPU."""


@REWARDS.register("digits")
class DigitsReward(ExactReward):
    """The share of the answer's characters that stand where they should; right from four fifths on."""

    def score(self, responses, progress=None):
        scores = []
        for r in responses:
            share = sum(a == b for a, b in zip(r.text, r.task.answer)) / len(r.task.answer)
            scores.append(Score(share, share >= 0.8))
        return scores


@REWARDS.register("remainder")
class RemainderReward(ExactReward):
    """Says something of any text: what a model from random weights writes differs in it."""

    def score(self, responses, progress=None):
        return [Score(-(sum(map(ord, r.text)) % 7), False) for r in responses]


PLACE, _, STEP = os.environ.get("KILL_AT", ":0").partition(":")
step_now = 0
"""The step at work: one beyond those that are counted."""
PLACES: dict[str, Callable[[], None]] = {}
"""Name -> what arms it."""


def place(function: Callable[[], None]) -> Callable[[], None]:
    PLACES[function.__name__] = function
    return function


def kill_now(step: int | None = None) -> None:
    """The end, if this is the step."""
    marker, how = Path(os.environ["KILL_MARKER"]), os.environ.get("KILL_BY", "kill")
    if os.environ.get("KILL_RANK", "any") not in ("any", os.environ.get("RANK")):
        return
    if (step_now if step is None else step) == int(STEP) and not marker.exists():
        marker.write_text(f"{PLACE} {STEP}")
        if how in ("kill", "interrupt"):
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGINT)
            return
        if how == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has a total capacity of 139.80 GiB")
        if how == "full":
            fill_memory()
            return
        raise RuntimeError("this is the end")


held: list[torch.Tensor] = []


def fill_memory() -> None:
    """Take what the GPU has left, and what torch keeps of it for itself."""
    num_bytes = 2**37
    while num_bytes >= 512:
        try:
            held.append(torch.empty(num_bytes, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            num_bytes //= 2


def patch(
    owner: Any, name: str, before: bool = False, after: bool = False, when: Callable[..., bool] = lambda *a, **k: True
) -> None:
    """Kill before or after a call of `owner.name` whose arguments `when` accepts."""
    original = getattr(owner, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        fits = when(*args, **kwargs)
        if before and fits:
            kill_now()
        result = original(*args, **kwargs)
        if after and fits:
            kill_now()
        return result

    setattr(owner, name, patched)


def follow_steps() -> None:
    """Know the step: a run counts it when it writes its metrics, and says at its start where it goes on."""
    write, truncate = common.metrics.MetricsLog.write, common.metrics.MetricsLog.truncate_after

    def truncated(self: Any, step: int) -> None:
        global step_now
        step_now = step + 1
        truncate(self, step)

    def written(self: Any, step: int, metrics: dict) -> None:
        global step_now
        assert step == step_now
        write(self, step, metrics)

    common.metrics.MetricsLog.truncate_after, common.metrics.MetricsLog.write = truncated, written
    from train.run import Run

    finish = Run.finish_step

    def finished(self: Any, metrics: dict, extra: dict) -> None:
        global step_now
        finish(self, metrics, extra)
        step_now += 1

    Run.finish_step = finished


def is_named(path: Any, *parts: str) -> bool:
    return all(part in str(path) for part in parts)


def is_evaluation(settings: Any) -> bool:
    return settings.seed < 1_000_003  # RL steps are mixed into the seed (sample/rollout.py)


# -- the places, in the order of a step


@place
def rollout() -> None:
    """Some blocks are sampled, none is finished."""

    def killed(generate: Callable[..., Any]) -> Callable[..., Any]:
        def stopped(
            self: Any, requests: list, settings: Any, weights_version: int = 0, progress: Any = None, queue: Any = None
        ) -> Any:
            calls = iter(range(10**6))

            def stop(*args: Any) -> None:
                if next(calls) == 3 and not is_evaluation(settings):
                    kill_now()

            return generate(self, requests, settings, weights_version, stop, queue)

        return stopped

    for engine in ENGINES:
        engine.generate = killed(engine.generate)


@place
def round_writing() -> None:
    """A round is sampled, its file half there."""
    patch(os, "replace", before=True, when=lambda source, target: is_named(target, "rollouts", ".round_"))


@place
def reward() -> None:
    for kind in (DigitsReward, RemainderReward):
        patch(kind, "score", before=True)


@place
def second_reward() -> None:
    """With rollout.resample: behind the first round of the step, in the second one."""
    count = {"calls": 0, "step": -1}

    def is_second(*args: Any) -> bool:
        count["calls"] = count["calls"] + 1 if count["step"] == step_now else 1
        count["step"] = step_now
        return count["calls"] == 2

    patch(DigitsReward, "score", after=True, when=is_second)


@place
def scored_not_written() -> None:
    patch(os, "replace", before=True, when=lambda source, target: is_named(target, "rollouts") and ".round_" not in str(target))


@place
def written_rounds_left() -> None:
    patch(os, "replace", after=True, when=lambda source, target: is_named(target, "rollouts") and ".round_" not in str(target))


@place
def update() -> None:
    """The gradient is there, the step not taken."""
    patch(common.dist, "optimizer_step", before=True)


@place
def updated() -> None:
    patch(common.dist, "optimizer_step", after=True)


@place
def evaluation() -> None:
    for engine in ENGINES:
        patch(engine, "generate", after=True, when=lambda self, requests, settings, *a: is_evaluation(settings))


@place
def metrics_half_written() -> None:
    def half(self: Any, step: int, metrics: dict) -> None:
        if step == int(STEP) and not Path(os.environ["KILL_MARKER"]).exists():
            with open(self.path, "a") as file:
                file.write(f'{{"step": {step}, "rollout/rew')
        kill_now(step)
        write(self, step, metrics)

    write = common.metrics.MetricsLog.write
    common.metrics.MetricsLog.write = half


@place
def metrics_not_state() -> None:
    patch(common.metrics.MetricsLog, "line", after=True)


@place
def checkpoint_half_written() -> None:
    def half(tensors: Any, folder: Any, **options: Any) -> None:
        save(tensors, folder, **options)
        file = next(Path(folder).glob("*.safetensors"))
        content = file.read_bytes()
        if step_now == int(STEP) and not Path(os.environ["KILL_MARKER"]).exists():
            file.write_bytes(content[: len(content) // 2])
        kill_now()

    save = huggingface_hub.save_torch_state_dict
    huggingface_hub.save_torch_state_dict = half


@place
def checkpoint_before_exchange() -> None:
    patch(common.files, "exchange", before=True)


@place
def checkpoint_after_exchange() -> None:
    patch(common.files, "exchange", after=True)


@place
def checkpoint_between_renames() -> None:
    """A file system that cannot exchange names: the old directory has lost its name, the new one not yet got it."""
    common.files.exchange = lambda one, other: False
    patch(Path, "rename", after=True, when=lambda self, target: is_named(target, "ckpt", ".old"))


@place
def checkpoint_renamed() -> None:
    common.files.exchange = lambda one, other: False
    patch(shutil, "rmtree", before=True, when=lambda path, *a, **k: is_named(path, "ckpt", ".old") and Path(path).exists())


@place
def state_begun() -> None:
    """The weights are written in part, the optimizer not at all."""
    count = iter(range(10**6))

    def half(value: Any, file: Any, *args: Any, **options: Any) -> None:
        save(value, file, *args, **options)
        if is_named(file, "state") and step_now == int(STEP) and next(count) == 0 and not Path(os.environ["KILL_MARKER"]).exists():
            content = Path(file).read_bytes()
            Path(file).write_bytes(content[: len(content) // 2])
            kill_now()

    save = torch.save
    torch.save = half


@place
def state_without_counters() -> None:
    import train.run

    patch(train.run, "save_state", after=True)


@place
def state_not_renamed() -> None:
    patch(Path, "rename", before=True, when=lambda self, target: is_named(target, "state", "step_"))


@place
def state_older_left() -> None:
    patch(Path, "rename", after=True, when=lambda self, target: is_named(target, "state", "step_"))


@place
def report() -> None:
    """The page of the run is written, the last state not."""
    import train.run

    patch(train.run, "write_report", after=True)


if PLACE:
    follow_steps()
    PLACES[PLACE]()

"""Everyday behaviour of rl.py: steps without anything to learn from, checkpoints that others read while they are replaced."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import common.files
from common.files import exchange, link_directory, recover_directories, replace_directory
from common.metrics import read_metrics
from tests.jobs.fork_server import ForkServer


def test_groups_that_are_all_alike_skip_the_step(server: ForkServer, settings: Any, tmp_path: Path):
    """Greedy by top_p: all responses of a task are the same. A warning per step, no update, and the run goes on to its end."""
    job = server.run("rl.py", settings("rl", tmp_path / "run", {"rollout.top_p": 1e-6, "experiment.total_step": 3}))
    assert job.code == 0, job.err
    assert job.error_lines == [
        f"warning: step {step}: every response was dropped (all rewards equal: 16): no update" for step in (1, 2, 3)
    ]
    rows = read_metrics(tmp_path / "run")
    assert [row["train/skipped"] for row in rows] == [1, 1, 1]
    assert all(row["rollout/dropped_groups"] == row["rollout/num_groups"] == 4 for row in rows)
    run = json.loads((tmp_path / "run" / "state" / "step_000003" / "run.json").read_text())
    assert run["num_optimizer_steps"] == 0


def test_kept_responses_of_which_nothing_is_masked_skip_the_step(server: ForkServer, settings: Any, tmp_path: Path):
    """Masks depend on seed and step alone, so a step that failed by them would fail again at every start."""
    changes = {"training.method": "random_masking", "training.lower_p": 1e-4, "training.upper_p": 2e-4}
    job = server.run("rl.py", settings("rl", tmp_path / "run", changes))
    assert job.code == 0, job.err
    rows = read_metrics(tmp_path / "run")
    kept = [16 - 4 * int(row["rollout/dropped_groups"]) for row in rows]
    assert min(kept) > 0 and [row["train/skipped"] for row in rows] == [1, 1]
    assert job.error_lines == [
        f"warning: step {step}: of {number} responses nothing was masked: no update" for step, number in enumerate(kept, start=1)
    ]


def test_resampling_fills_the_step(server: ForkServer, settings: Any, tmp_path: Path):
    changes = {"rollout.resample": "true", "rollout.num_response_per_task": 2}
    job = server.run("rl.py", settings("rl", tmp_path / "run", changes))
    assert job.code == 0, job.err
    for row in read_metrics(tmp_path / "run"):
        kept = row["rollout/num_groups"] - row["rollout/dropped_groups"]
        assert kept == 4 or row["rollout/num_groups"] == 14, "neither enough groups nor all tasks"


@pytest.mark.slow
def test_the_missing_model_is_made(server: ForkServer, settings: Any, jobs_dir: Path, tmp_path: Path):
    """model.prepare_config: the finetuning job that makes the model, run where the model is not there."""
    recipe = tmp_path / "sft.yaml"
    recipe.write_text(
        f"experiment: {{project: {tmp_path}/sft}}\n"
        "model: {pretrained_model: tiny-random, model_base: sdar}\n"
        f"dataset: {{optimization_data: {jobs_dir}/train.json, data_type: exact}}\n"
        "rollout: {max_token: 8}\nreward: {overlong_margin: 0}\n"
        "training: {mixed_precision: 'no', max_steps: 3, batch_size: 4}\n"
    )
    changes = {"model.prepare_config": recipe, "model.pretrained_model": f"{tmp_path}/sft/ckpt/optimized"}
    job = server.run("rl.py", settings("rl", tmp_path / "run", changes))
    assert job.code == 0, job.err
    assert "is not there yet: making it" in job.out
    assert (tmp_path / "sft" / "ckpt" / "optimized" / "model.safetensors").is_file()


@pytest.mark.parametrize("finished", [True, False])
def test_a_half_finetuned_model_is_finished_first(finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The preparation writes ckpt/optimized before its end: that it is there does not say that it is done."""
    import rl

    recipe = tmp_path / "sft.yaml"
    recipe.write_text(
        f"experiment: {{project: {tmp_path}/sft}}\nmodel: {{pretrained_model: tiny-random, model_base: sdar}}\n"
        "dataset: {optimization_data: tiny_sort_train, data_type: exact}\n"
    )
    commands: list[list[str]] = []
    monkeypatch.setattr(rl.subprocess, "run", lambda command: commands.append(command) or SimpleNamespace(returncode=0))
    monkeypatch.setattr(rl, "already_launched", lambda: False)

    def prepare(model: Path) -> int:
        commands.clear()
        rl.make_missing_model(SimpleNamespace(model=SimpleNamespace(prepare_config=str(recipe), pretrained_model=str(model))))
        return len(commands)

    made = tmp_path / "sft" / "ckpt" / "optimized"
    assert prepare(made) == 1 and commands[0][1].endswith("train/sft.py"), "nothing is there"
    made.mkdir(parents=True)
    assert prepare(made) == 0, "a checkpoint that was brought there, without a run around it"
    (tmp_path / "sft" / "config.yaml").write_text("")
    assert prepare(made) == 1, "killed before its first state"
    state = tmp_path / "sft" / "state" / "step_000030"
    state.mkdir(parents=True)
    counters = {"step": 30, "finished": finished, "num_optimizer_steps": 30, "extra": {}}
    (state / "run.json").write_text(json.dumps(counters))
    assert prepare(made) == (0 if finished else 1)
    (tmp_path / "other").mkdir()
    assert prepare(tmp_path / "other") == 0, "another model"
    assert prepare(tmp_path / "sft" / "ckpt" / "optimised") == 0, "one that the job does not make"
    assert prepare("owner/name") == 0, "one of the hub"


@pytest.mark.parametrize("links", [True, False])
def test_a_second_name_of_a_checkpoint(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its weights cost no space, and replacing the first leaves it as it is."""
    if not links:

        def no_links(source: str, target: str) -> None:
            raise OSError(errno.EPERM, "no hard links")

        monkeypatch.setattr(os, "link", no_links)
    first, second = write_checkpoint(tmp_path / "optimized", 1), write_checkpoint(tmp_path / "step-1", 0)
    link_directory(first, second)
    assert json.loads((second / "config.json").read_text()) == {"value": 1}
    assert len(list(first.glob("*.safetensors"))) == 3
    for file in first.iterdir():
        assert file.samefile(second / file.name) == (links and file.suffix == ".safetensors")
    replace_directory(write_checkpoint(tmp_path / ".optimized.partial", 2), first)
    assert json.loads((second / "config.json").read_text()) == {"value": 1}
    assert sorted(os.listdir(tmp_path)) == ["optimized", "step-1"]


def test_saving_is_timed(server: ForkServer, settings: Any, tmp_path: Path):
    """A checkpoint's seconds are in its step's metrics, a state's in those of the next step; the weights are written once."""
    run = tmp_path / "run"
    job = server.run("rl.py", settings("rl", run, {"experiment.total_step": 3, "experiment.eval_every": 3}))
    assert job.code == 0, job.err
    assert ["time/save_seconds" in row for row in read_metrics(run)] == [False, True, True]
    assert (run / "ckpt" / "optimized" / "model.safetensors").samefile(run / "ckpt" / "step-3" / "model.safetensors")


# ---- a checkpoint is never half-written


def write_checkpoint(folder: Path, value: int, num_files: int = 3) -> Path:
    """A directory whose files all hold `value`."""
    folder.mkdir(parents=True)
    for index in range(num_files):
        save_file({"x": torch.full((64,), float(value))}, folder / f"model-{index}.safetensors")
    (folder / "config.json").write_text(json.dumps({"value": value}))
    return folder


def test_a_reader_never_sees_a_broken_checkpoint(tmp_path: Path):
    """Loaded in a loop while it is replaced 300 times: every file is there and whole, at every instant."""
    folder = tmp_path / "ckpt" / "optimized"
    write_checkpoint(folder, 0)
    trouble: list[BaseException] = []
    seen: set[float] = set()
    done = threading.Event()

    def read() -> None:
        try:
            while not done.is_set():
                values = [json.loads((folder / "config.json").read_text())["value"]]
                values += [float(load_file(folder / f"model-{index}.safetensors")["x"][-1]) for index in range(3)]
                # Files are opened one after another, so that a replacement may come between: later ones are never older.
                assert values == sorted(values)
                seen.update(values)
        except BaseException as error:
            trouble.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        if not exchange(write_checkpoint(tmp_path / "one", 1), write_checkpoint(tmp_path / "two", 2)):
            pytest.skip("this file system does not exchange names in one instant")
        for value in range(1, 301):
            replace_directory(write_checkpoint(tmp_path / "ckpt" / ".optimized.partial", value), folder)
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert not trouble, trouble
    assert len(seen) > 3
    assert os.listdir(tmp_path / "ckpt") == ["optimized"]


def test_replacing_without_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(common.files, "exchange", lambda one, other: False)
    folder = write_checkpoint(tmp_path / "optimized", 0)
    for value in (1, 2):
        replace_directory(write_checkpoint(tmp_path / ".optimized.partial", value), folder)
        assert json.loads((folder / "config.json").read_text()) == {"value": value}
        assert os.listdir(tmp_path) == ["optimized"]


@pytest.mark.parametrize("new_has_come", [False, True])
def test_recovery_between_two_renames(new_has_come: bool, tmp_path: Path):
    write_checkpoint(tmp_path / ".optimized.old", 1)
    write_checkpoint(tmp_path / ("optimized" if new_has_come else ".optimized.partial"), 2)
    write_checkpoint(tmp_path / "step-2", 3)
    recover_directories(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["optimized", "step-2"]
    assert json.loads((tmp_path / "optimized" / "config.json").read_text()) == {"value": 2 if new_has_come else 1}


def test_exchange_of_paths_that_are_not_there(tmp_path: Path):
    with pytest.raises(OSError):
        exchange(write_checkpoint(tmp_path / "one", 1), tmp_path / "nowhere")

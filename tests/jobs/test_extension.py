"""What a user adds from outside, in one file (extension.py), used in runs of rl.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Callable

import pytest
from safetensors.torch import load_file, save_file

from common.metrics import read_metrics
from common.records import read_rollouts
from tests.jobs.extension import AscendingReward, rename
from tests.jobs.fork_server import ForkServer

EXTENSION = Path(__file__).with_name("extension.py")
COMMON = {"experiment.plugins": f"[{EXTENSION}]", "rollout.num_response_per_task": 8}


@pytest.fixture
def run(server: ForkServer, settings: Callable[..., list[str]], tmp_path: Path) -> Callable[..., Path]:
    """A run of two steps; returns its directory."""

    def run(changes: dict[str, Any]) -> Path:
        job = server.run("rl.py", settings("rl", tmp_path / "run", {**COMMON, **changes}))
        assert job.code == 0, job.err
        rows = read_metrics(tmp_path / "run")
        assert [row["step"] for row in rows] == [1, 2]
        assert all(row["train/skipped"] == 0 and row["train/gradient_norm"] > 0 for row in rows)
        return tmp_path / "run"

    return run


def test_a_reward(run: Callable[..., Path], jobs_dir: Path, tmp_path: Path):
    records = [{"question": record["question"]} for record in json.loads((jobs_dir / "train.json").read_text())]
    (tmp_path / "questions.json").write_text(json.dumps(records))  # this reward needs no answers
    changes = {"dataset.data_type": "ascending", "dataset.train_dataset": tmp_path / "questions.json"}
    folder = run(changes)
    tokenizer = tokenizer_of(jobs_dir)
    for rollout in read_rollouts(folder / "rollouts" / "step_000001.jsonl"):
        text = tokenizer.decode(rollout.response_ids[: rollout.num_response - (rollout.finish == "stop")])
        assert rollout.reward == (AscendingReward.share(text) if rollout.num_response < 8 else 0), text


@pytest.mark.parametrize("by", ["path", "registered name"])
def test_a_reward_function(by: str, run: Callable[..., Path]):
    folder = run({"reward.function": f"{EXTENSION}:variety" if by == "path" else "ascending"})
    rewards = {rollout.reward for rollout in read_rollouts(folder / "rollouts" / "step_000001.jsonl")}
    assert len(rewards) > 1
    if by == "path":
        assert rewards <= set(range(9)) and max(rewards) > 1


def test_a_trace_method_with_its_objective(run: Callable[..., Path]):
    folder = run({"training.method": "WholeBlocks", "training.loss_weighting": "token"})
    for row in read_metrics(folder):
        assert row["train/surprise"] > 0
        assert "train/ratio_max" not in row  # that is the clipped objective's
    trained = [r for r in read_rollouts(folder / "rollouts" / "step_000001.jsonl") if r.dropped is None]
    # Every block is one slice, so every token that may be trained is predicted once.
    assert read_metrics(folder)[0]["train/num_predictions"] == sum(r.num_response for r in trained)


def test_an_unmasking_strategy(run: Callable[..., Path]):
    changes = {"rollout.remasking_strategy": "from_the_right", "evaluation.remasking_strategy": "[from_the_right]"}
    folder = run({**changes, "experiment.eval_every": 1})
    for rollout in read_rollouts(folder / "rollouts" / "step_000001.jsonl"):
        first = len(rollout.prompt_ids)
        blocks: dict[int, list[int]] = {}
        for position, step in enumerate(rollout.step_map, start=first):
            blocks.setdefault(position // 4, []).append(step)
        assert all(steps == sorted(steps, reverse=True) and len(set(steps)) == len(steps) for steps in blocks.values())
    assert "eval/from_the_right/accuracy" in read_metrics(folder)[0]


def test_a_family(run: Callable[..., Path], server: ForkServer, settings: Any, jobs_dir: Path, tmp_path: Path):
    """The tiny checkpoint under the names of another family: read, trained, sampled and written under those names."""
    model = tmp_path / "renamed"
    shutil.copytree(jobs_dir / "model", model)
    tensors = load_file(model / "model.safetensors")
    save_file({new_name(name): tensor for name, tensor in tensors.items()}, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "renamed"}))

    folder = run({"model.pretrained_model": model, "model.model_base": "renamed"})
    written = load_file(folder / "ckpt" / "optimized" / "model.safetensors")
    assert written.keys() == {new_name(name) for name in tensors}
    assert "transformer.h.0.attn.q_proj.weight" in written
    assert json.loads((folder / "ckpt" / "optimized" / "config.json").read_text())["model_type"] == "renamed"

    # Same weights, same seed: the same rollouts and the same trained weights as under the published names.
    job = server.run("rl.py", settings("rl", tmp_path / "original", COMMON))
    assert job.code == 0, job.err
    for step in (1, 2):
        name = f"rollouts/step_00000{step}.jsonl"
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "original" / name).read_bytes()
    ours = load_file(tmp_path / "run/ckpt/optimized/model.safetensors")
    for name, tensor in load_file(tmp_path / "original/ckpt/optimized/model.safetensors").items():
        assert (ours[new_name(name)] == tensor).all()


def test_all_at_once(run: Callable[..., Path]):
    run(
        {
            "reward.function": f"{EXTENSION}:variety",
            "training.method": "WholeBlocks",
            "rollout.remasking_strategy": "from_the_right",
        }
    )


def new_name(name: str) -> str:
    from models.family import Piece

    return rename(Piece(name, "", 0, 0))


def tokenizer_of(jobs_dir: Path) -> Any:
    from models.checkpoint import load_tokenizer

    return load_tokenizer(jobs_dir / "model")

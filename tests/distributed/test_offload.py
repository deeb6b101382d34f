"""An RL run whose optimizer states, gradients and value model are off the device in every rollout is the run in which they stay,
bit for bit: alone and on two ranks, under every ZeRO stage. On a CPU storages are emptied as they are on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common.metrics import is_deterministic, read_metrics
from models.registry import FAMILIES
from models.tiny import build_tiny
from tests.distributed import training_jobs
from tests.distributed.harness import run_on_ranks
from tests.distributed.test_training import REWARD, RL_SETTINGS
from tests.train.steps import forget_accelerator

ZERO = "experiment.deepspeed_file=1_node_{}_gpus_deepspeed_zero{}"
BFLOAT16 = "training.mixed_precision=bf16"
# Some prompts are too long: others take their places.
ROUNDS = ["rollout.resample=true", "rollout.resample_max_rounds=2", "training.max_prompt_len=7"]
ALONE = {
    "adamw": [],
    "several rounds": ROUNDS,
    "shared head": ["model.value_base_model=null", "model.value_shared=true"],
}
TWO = {
    "zero1 bfloat16": [ZERO.format(2, 1), BFLOAT16],
    "zero2": [ZERO.format(2, 2)],
    "zero3 bfloat16": [ZERO.format(2, 3), BFLOAT16],
}
CHOICES = ("never", "always")
NUM_WEIGHTS = sum(p.numel() for p in build_tiny(FAMILIES.get("sdar"), 0, vocab_size=28).decoder.parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("offload")
    (folder / "reward.py").write_text(REWARD)
    tasks = [{"question": f"s{n}=", "ground_truth_answer": "0"} for n in (10, 532)]
    (folder / "held_out.json").write_text(json.dumps(tasks))
    return folder


def command_line(folder: Path, directory: str, choice: str, overrides: list[str]) -> list[str]:
    files = [f"reward.function={folder / 'reward.py'}:remainder", f"dataset.eval_dataset={folder / 'held_out.json'}"]
    moved = [f"training.offload_optimizer={choice}", f"model.value_offload={choice}"]
    return [*RL_SETTINGS, *files, *moved, "experiment.save_state_every=2", f"experiment.project={folder / directory}", *overrides]


def jobs(folder: Path, modes: dict[str, list[str]], ranks: int, broken_off: str) -> dict[str, dict[str, Any]]:
    """Every mode with both choices, and one that is broken off."""

    def argv(mode: str, choice: str, name: str, *more: str) -> list[str]:
        return command_line(folder, f"{ranks} {mode} {name}", choice, [*modes[mode], *more])

    lines: dict[str, dict[str, Any]] = {f"{mode}, {c}": {"argv": argv(mode, c, c)} for mode in modes for c in CHOICES}
    longer = ["experiment.total_step=4", "experiment.eval_every=1"]
    # Behind a step without a state of its own, whose evaluation has offloaded the policy.
    broken = {"argv": argv(broken_off, "always", "broken off", *longer), "broken_off_after": 3}
    whole = {"argv": argv(broken_off, "never", "unbroken", *longer)}
    return lines | {f"{broken_off}, broken off": broken, f"{broken_off}, unbroken": whole}


@pytest.fixture(scope="module")
def runs(folder) -> dict[int, list[dict[str, dict[str, Any]]]]:
    """By number of ranks, what every rank found."""
    alone = training_jobs.rl_runs(jobs(folder, ALONE, 1, "adamw"))
    forget_accelerator()
    two = run_on_ranks("tests.distributed.training_jobs:rl_runs", 2, {"runs": jobs(folder, TWO, 2, "zero3 bfloat16")})
    return {1: [alone], 2: two}


def deterministic(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if is_deterministic(key) and key != "wall_seconds"} for row in rows]


def assert_same_bits(first: dict[str, Any], second: dict[str, Any]) -> None:
    for kept in ("weights", "checkpoint"):
        assert first[kept].keys() == second[kept].keys()
        assert all(torch.equal(tensor, second[kept][name]) for name, tensor in first[kept].items()), kept


CASES = [*((1, mode) for mode in ALONE), *((2, mode) for mode in TWO)]


@pytest.mark.parametrize("ranks, mode", CASES, ids=lambda x: str(x).replace(" ", "_"))
def test_a_run_that_offloads_is_the_one_that_does_not(folder, runs, ranks, mode):
    stayed, moved = (read_metrics(folder / f"{ranks} {mode} {choice}") for choice in CHOICES)
    assert len(moved) == 3 and deterministic(moved) == deterministic(stayed)
    assert any(key.startswith("eval/") for key in moved[1]) and moved[0]["train/num_updates"] == 2
    for result in runs[ranks]:
        assert_same_bits(result[f"{mode}, never"], result[f"{mode}, always"])
    # Before the first step plain AdamW has no states.
    assert all(row["time/offload_seconds"] > 0 and row["memory/offloaded_gib"] > 0 for row in moved[1:])
    assert not any("time/offload_seconds" in row or "memory/offloaded_gib" in row for row in stayed)


def test_several_rounds_there_were(folder, runs):
    """Else that run shows nothing."""
    rows = read_metrics(folder / "1 several rounds always")
    assert max(row["rollout/num_groups"] for row in rows) > 6


@pytest.mark.parametrize("ranks, mode", [(1, "adamw"), (2, "zero3 bfloat16")])
def test_an_offloading_run_goes_on_where_it_was_broken_off(folder, runs, ranks, mode):
    broken, whole = (read_metrics(folder / f"{ranks} {mode} {name}") for name in ("broken off", "unbroken"))
    assert len(broken) == 4 and deterministic(broken) == deterministic(whole)
    for result in runs[ranks]:
        assert_same_bits(result[f"{mode}, broken off"], result[f"{mode}, unbroken"])


def test_a_run_that_is_interrupted_while_it_is_offloaded_goes_on(folder, runs, monkeypatch):
    """Ctrl-C between sampling and update: what is on the disk is of before."""
    import rl

    interrupted = []

    class Interrupted(rl.RLRun):
        def score(self, *arguments: Any) -> list[Any]:
            if self.run.step == 2 and not interrupted:
                assert self.run.trainer.is_offloaded and self.run.value.trainer.is_offloaded
                interrupted.append(True)
                raise KeyboardInterrupt
            return super().score(*arguments)

    monkeypatch.setattr(rl, "RLRun", Interrupted)
    argv = command_line(folder, "interrupted", "always", [])
    with pytest.raises(BaseException) as ended:
        rl.main(argv)
    assert isinstance(ended.value, (KeyboardInterrupt, SystemExit)) and interrupted
    forget_accelerator()
    rl.main(argv)
    forget_accelerator()
    assert deterministic(read_metrics(folder / "interrupted")) == deterministic(read_metrics(folder / "1 adamw never"))


@pytest.mark.parametrize("ranks, mode, per_weight", [(1, "shared head", 4 + 8), (2, "zero1 bfloat16", 2 + 4 + 12 / 2)])
def test_the_offloaded_bytes_by_hand(folder, runs, ranks, mode, per_weight):
    """Per weight: the reference, and AdamW's moments; under ZeRO-1 the reference, the float32 sum of gradients, and half of masters
    and moments. That run's value model, as large but for its head, has no reference, but is gone whole, its weights too."""
    row = read_metrics(folder / f"{ranks} {mode} always")[-1]
    weights = NUM_WEIGHTS * per_weight
    if mode != "shared head":
        weights += (NUM_WEIGHTS - 28 * 64) * per_weight
    assert row["memory/offloaded_gib"] * 2**30 == pytest.approx(weights, rel=0.01)

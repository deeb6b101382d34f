"""A gradient that is not finite costs its own step alone, in every mode; weights that are not finite are never written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import probe
from tests.distributed.harness import run_on_ranks
from tests.distributed.nonfinite_jobs import BROKEN_STEP
from tests.distributed.test_accumulation import BFLOAT16, MODES, check
from tests.train.steps import error

BROKEN = 1
"""The step of the tiny net; the others are before and behind it."""


def by_hand(max_grad_norm: float | None) -> list[dict[str, Any]]:
    """As of test_accumulation, the broken step left out."""
    from tests.distributed import test_accumulation

    steps, rates = probe.make_steps(2), probe.LEARNING_RATES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "make_steps", lambda ranks: [s for i, s in enumerate(steps) if i != BROKEN])
        patch.setattr(probe, "LEARNING_RATES", tuple(r for i, r in enumerate(rates) if i != BROKEN))
        return test_accumulation.by_hand(max_grad_norm)


def check_broken(records: list[dict[str, Any]], max_grad_norm: float | None = probe.MAX_GRAD_NORM) -> None:
    before, broken, behind = records
    assert not math.isfinite(broken["norm"])
    assert broken["num_steps"] == before["num_steps"] == 1 and all(record["finite"] for record in records)
    assert broken["weights"].keys() == before["weights"].keys()
    assert all(torch.equal(broken["weights"][name], value) for name, value in before["weights"].items())
    expected = by_hand(max_grad_norm)
    check([before, behind], expected, weights_too=bool(behind["weights"]))


@pytest.fixture(scope="module")
def nets_of_two_ranks() -> list[dict[str, Any]]:
    modes = MODES | {f"{name}, bfloat16": arguments for name, arguments in BFLOAT16.items()}
    modes = {name: arguments | {"broken_step": BROKEN} for name, arguments in modes.items()}
    return run_on_ranks("tests.distributed.probe:run_modes", 2, {"modes": modes})


def test_alone_the_step_is_left_out(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    check_broken(probe.run_mode(None, broken_step=BROKEN))
    probe.forget_accelerator()


@pytest.mark.parametrize("mode", MODES)
def test_on_two_ranks_the_step_is_left_out(nets_of_two_ranks, mode):
    for result in nets_of_two_ranks:
        check_broken(result[mode], MODES[mode].get("max_grad_norm", probe.MAX_GRAD_NORM))


@pytest.mark.parametrize("mode", BFLOAT16)
def test_bfloat16_weights_stay_as_they_are(nets_of_two_ranks, mode):
    for result in nets_of_two_ranks:
        before, broken, behind = result[f"{mode}, bfloat16"]
        assert not math.isfinite(broken["norm"]) and broken["num_steps"] == 1 and behind["num_steps"] == 2
        assert all(torch.equal(broken["weights"][name], value) for name, value in before["weights"].items())
        assert behind["finite"]
        # Nothing is left of the broken one.
        assert behind["norm"] == pytest.approx(by_hand(probe.MAX_GRAD_NORM)[1]["norm"], rel=0.03)


# ---- whole runs

RUN = [
    "config=configs/rl_tiny.yaml",
    "model.pretrained_model=tiny-random",
    "model.prepare_config=null",
    "model.value_base_model=tiny-random",
    "evaluation.if_eval=false",
    "experiment.total_step=4",
    "experiment.save_every=2",
    "experiment.save_state_every=1",
    "rollout.num_task_per_step=6",
    "rollout.num_response_per_task=4",
    "rollout.deterministic=true",
    "training.num_updates_per_step=2",
    "training.max_tokens_per_microbatch=300",
    "optimizer.params.learning_rate=3e-3",
    "optimizer.params.epsilon=1e-3",  # else AdamW would blow up rounding, see test_training
]
ZERO = {stage: f"experiment.deepspeed_file=1_node_2_gpus_deepspeed_zero{stage}" for stage in (2, 3)}
OF_TWO = {"ddp": [], "zero2": [ZERO[2]], "zero2 bfloat16": [ZERO[2], "training.mixed_precision=bf16"]}
WEIGHTS = {"ddp weight": [], "zero3 weight": [ZERO[3]]}
REWARD = """
def remainder(task, text, rollout):
    return -(sum(map(ord, text)) % 7)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "reward.py").write_text(REWARD)
    return folder


@pytest.fixture(scope="module")
def runs(folder) -> dict[str, list[dict[str, Any]]]:
    """By name, of every rank."""

    def run(name: str, overrides: list[str], breaks: str) -> dict[str, Any]:
        own = [f"reward.function={folder / 'reward.py'}:remainder", f"experiment.project={folder / name}"]
        return {"argv": [*RUN, *own, *overrides], "breaks": breaks}

    job = "tests.distributed.nonfinite_jobs:rl_runs"
    alone = run_on_ranks(job, 1, {"runs": {"one": run("one", [], "loss")}})
    of_two = {name: run(name, overrides, "loss") for name, overrides in OF_TWO.items()}
    of_two |= {name: run(name, overrides, "weight") for name, overrides in WEIGHTS.items()}
    results = run_on_ranks(job, 2, {"runs": of_two})
    return {"one": [alone[0]["one"]]} | {name: [result[name] for result in results] for name in of_two}


@pytest.mark.parametrize("name", ["one", *OF_TWO])
def test_a_run_goes_on_behind_a_loss_that_is_not_finite(folder, runs, name):
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    for group in ("train", "value"):
        assert [row[f"{group}/num_skipped_updates"] for row in rows] == [0, 0, 1, 0]
        assert [row[f"{group}/num_updates"] for row in rows] == [2, 2, 2, 2]
    assert all(isinstance(row["gap/logprob_max"], float) for row in rows), "the first update was skipped, not the gap"
    for group in ("train", "value"):
        assert all(isinstance(row[f"{group}/{key}"], float) for row in rows for key in ("loss", "gradient_norm"))
    for own, one in zip(runs[name], [runs["one"][0]] * len(runs[name]), strict=True):
        assert own["error"] is None and own["num_steps"] == [2, 4, 5, 7]
        assert all(bool(w.isfinite().all()) for step in own["weights"] for w in step.values())
        moved = [error(later, earlier) for earlier, later in zip(own["weights"], own["weights"][1:])]
        assert min(moved) > 1e-4
        if "bfloat16" not in name:
            assert max(error(a, b) for a, b in zip(own["weights"], one["weights"], strict=True)) < 1e-5


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_broken_weight_is_not_written_over_a_good_state(folder, runs, name):
    for own in runs[name]:
        assert own["error"].startswith(f"step {BROKEN_STEP}: weights of the policy model are NaN or infinite, so nothing was ")
        assert f"the last good state is {folder / name / 'state' / 'step_000002'}:" in own["error"]
    assert [path.name for path in (folder / name / "state").iterdir()] == ["step_000002"]
    assert sorted(path.name for path in (folder / name / "ckpt").iterdir()) == ["optimized", "optimized_value", "step-2"]

"""train/sft_sdar.py as a user starts it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.metrics import read_metrics
from tests.jobs.fork_server import ForkServer

SCRIPT = "train/sft_sdar.py"


def test_ends_where_enough_is_solved(server: ForkServer, settings: Any, tmp_path: Path):
    """The checkpoint solves some of the tasks from the start, so the first evaluation ends the run; started again it says so."""
    changes = {"training.stop_at_solve_rate": 0.01, "training.max_steps": 40, "optimizer.params.learning_rate": 0}
    arguments = settings("sft", tmp_path / "run", changes)
    job = server.run(SCRIPT, arguments)
    assert job.code == 0, job.err
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[1]["eval/low_confidence_dynamic/accuracy"] >= 0.01
    assert (tmp_path / "run" / "ckpt" / "optimized" / "model.safetensors").is_file()
    again = server.run(SCRIPT, arguments)
    assert again.code == 0 and again.out == job.out.splitlines(keepends=True)[-1]


def test_a_run_that_ended_solved_goes_on_for_a_higher_rate(server: ForkServer, settings: Any, tmp_path: Path):
    changes = {"training.stop_at_solve_rate": 0.01, "training.max_steps": 4, "optimizer.params.learning_rate": 0}
    job = server.run(SCRIPT, settings("sft", tmp_path / "run", changes))
    assert job.code == 0 and [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2], job.err
    longer = changes | {"training.max_steps": 6, "experiment.start_from_scratch": "false"}
    refused = server.run(SCRIPT, settings("sft", tmp_path / "run", longer))
    assert refused.code == 2 and "a higher stop_at_solve_rate where it was reached" in refused.err
    job = server.run(SCRIPT, settings("sft", tmp_path / "run", longer | {"training.stop_at_solve_rate": 1.0}))
    assert job.code == 0 and [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6], job.err


def test_long_prompts_are_dropped_with_a_word(server: ForkServer, settings: Any, jobs_dir: Path, tmp_path: Path):
    records = json.loads((jobs_dir / "train.json").read_text())
    records[3]["question"] = "s" + "1" * 30 + "="
    (tmp_path / "data.json").write_text(json.dumps(records))
    changes = {"dataset.optimization_data": tmp_path / "data.json", "training.max_prompt_len": 16}
    job = server.run(SCRIPT, settings("sft", tmp_path / "run", changes))
    assert job.code == 0, job.err
    assert "1 of 14 records dropped: prompt longer than training.max_prompt_len=16" in job.out


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_decides(seed: int, server: ForkServer, settings: Any, tmp_path: Path):
    losses = []
    for number in range(2):
        changes = {"training.seed": seed if number == 0 else 0}
        assert server.run(SCRIPT, settings("sft", tmp_path / f"run{number}", changes)).code == 0
        losses.append([row["train/loss"] for row in read_metrics(tmp_path / f"run{number}")])
    assert (losses[0] == losses[1]) == (seed == 0)

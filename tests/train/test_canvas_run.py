"""A whole RL run of a full-attention model, broken off and gone on with: it ends where the unbroken one ends, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import training_jobs
from tests.train.steps import FULL_ATTENTION, forget_accelerator

SETTINGS = [
    "config=configs/rl_tiny.yaml",
    "model.pretrained_model=tiny-random",
    "model.prepare_config=null",
    "experiment.total_step=3",
    "experiment.eval_every=3",
    "experiment.save_state_every=1",
    "rollout.num_task_per_step=4",
    "rollout.num_response_per_task=3",
    "rollout.use_cache=false",
    "training.max_rows_per_response=3",
    "training.num_updates_per_step=2",
    "training.beta=0.02",
    "training.loss_weighting=reference",
    "training.max_tokens_per_microbatch=120",
    "optimizer.params.learning_rate=3e-3",
]
METHODS = {
    "llada": ["training.method=random_masking", "training.mask_times_per_sample=4", "model.value_shared=true"],
    "dream": ["training.method=TraceRL", "model.value_base_model=tiny-random"],
}


def metrics(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl, without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time", "rate/", "memory/", "wall"))} for row in rows]


@pytest.mark.parametrize("family", FULL_ATTENTION)
def test_a_run_that_was_broken_off_ends_where_the_other_does(family, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text("def remainder(task, text, rollout):\n    return -(sum(map(ord, text)) % 7)\n")
    tasks = [{"question": f"s{n}=", "ground_truth_answer": "0"} for n in (10, 532, 9071)]
    (tmp_path / "held_out.json").write_text(json.dumps(tasks))
    files = [f"reward.function={reward}:remainder", f"dataset.eval_dataset={tmp_path / 'held_out.json'}"]

    def run(name: str, broken_off_after: int | None = None) -> dict[str, Any]:
        argv = [*SETTINGS, *METHODS[family], f"model.model_base={family}", *files, f"experiment.project={tmp_path / name}"]
        return training_jobs.rl_run(argv, broken_off_after)

    whole, parts = run("whole"), run("parts", broken_off_after=2)
    forget_accelerator()
    assert parts["broken off"] and whole["num_steps"] == parts["num_steps"] == 6
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    assert all(torch.equal(parts["weights"][name], weight) for name, weight in whole["weights"].items())
    rows = metrics(tmp_path / "whole")
    assert rows[0]["train/num_updates"] == 2 and rows[2]["value/explained_variance"] != 0
    assert all(row["gap/logprob_max"] < 1e-4 for row in rows), "along the sampled steps, also where random masks are trained"

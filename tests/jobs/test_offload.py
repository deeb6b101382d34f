"""Finetuning whose optimizer states are on the host in every evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.metrics import is_deterministic, read_metrics
from tests.jobs.fork_server import ForkServer


def test_a_finetuning_run_that_offloads_is_the_one_that_does_not(server: ForkServer, settings: Any, tmp_path: Path):
    found = {}
    for choice in ("never", "always"):
        changes = {"training.max_steps": 4, "training.eval_every": 1, "training.offload_optimizer": choice}
        job = server.run("train/sft_sdar.py", settings("sft", tmp_path / choice, changes))
        assert job.code == 0, job.err
        found[choice] = read_metrics(tmp_path / choice)
    assert [row["step"] for row in found["always"]] == [1, 2, 3, 4]
    assert all(row["memory/offloaded_gib"] > 0 and "eval/low_confidence_dynamic/accuracy" in row for row in found["always"])
    assert not any("memory/offloaded_gib" in row for row in found["never"])
    kept = [[{key: value for key, value in row.items() if is_deterministic(key)} for row in rows] for rows in found.values()]
    assert kept[0] == kept[1]
    weights = [(tmp_path / choice / "ckpt/optimized/model.safetensors").read_bytes() for choice in found]
    assert weights[0] == weights[1]

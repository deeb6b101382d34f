"""The comparison of modes of parallelism: its figures by hand, and (slow) two modes of a run of two steps."""

from __future__ import annotations

import json

import pytest

from benchmarks import parallel_modes
from benchmarks.parallel_modes import MODES, furthest, last_evaluation, summary, table
from common.deepspeed_files import deepspeed_file_names


def run(accuracy: float, error: float) -> dict[str, float]:
    return {"accuracy": accuracy, "standard_error": error, "seconds": 10.0}


def test_means_and_distances_by_hand():
    # By tasks sqrt(3 * 0.03^2) / 3 = 0.0173; by seeds 0 and 0.1 / sqrt(3) = 0.0577.
    close = [run(0.9, 0.03)] * 3
    wide = [run(0.7, 0.03), run(0.8, 0.03), run(0.9, 0.03)]
    assert summary(close) == (pytest.approx(0.9), pytest.approx(0.03 / 3**0.5))
    assert summary(wide) == (pytest.approx(0.8), pytest.approx(0.1 / 3**0.5))
    one, other, gap = furthest({"a": close, "b": wide, "c": close})
    assert (one, other) == ("a", "b") and gap == pytest.approx(0.1 / (0.0009 / 3 + 0.01 / 3) ** 0.5)
    assert "| b | 0.700 | 0.800 | 0.900 | 0.800 (0.058) | 10 |" in table({"b": wide}, [1, 2, 3])


def test_the_last_evaluation_counts():
    rows = [{"step": n, "eval/dynamic/accuracy": rate, "eval/dynamic/standard_error": 0.1} for n, rate in [(1, 0.2), (2, 0.6)]]
    assert last_evaluation([*rows, {"step": 3, "train/loss": 1.0}]) == {"accuracy": 0.6, "standard_error": 0.1}


def test_the_files_of_the_modes_exist():
    files = {file.format(2) for file in MODES.values() if file and "{}" in file}
    assert len(files) == 2 and files <= set(deepspeed_file_names())


@pytest.mark.slow
def test_two_modes_of_a_short_run(tmp_path, capsys):
    settings = ["experiment.total_step=2", "rollout.num_task_per_step=4", "rollout.deterministic=true"]
    common = [
        "--seeds",
        "3",
        "--modes",
        "one process,zero3",
        "--workers",
        "1",
        "--folder",
        str(tmp_path),
        "--out",
        f"{tmp_path}/o.json",
    ]
    results = parallel_modes.main([*common, "--set", *settings, "--set-sft", "training.max_steps=20"])
    assert json.loads((tmp_path / "o.json").read_text())["results"] == results
    assert list(results) == ["one process", "zero3"] and "furthest apart" in capsys.readouterr().out
    assert len(results["zero3"]) == 1 and (tmp_path / "zero3_3" / "ckpt" / "optimized").is_dir()

"""The benchmark of whole RL steps runs on two ranks of a CPU, and its figures are those of sums made by hand."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks import rl_step
from tests.distributed.harness import ROOT, clean_environment

SMALL = ["--shape", "tiny", "--device", "cpu", "--tasks", "2", "--samples", "2", "--prompt", "8", "--response", "12"]


def test_two_ranks_under_zero3(tmp_path):
    """Weights are gathered, sampled with, trained, gathered again: engine and trainer agree at every step."""
    out = tmp_path / "out.json"
    options = ["--gpus", "2", "--scaling", "strong", "--zero", "3", "--budget", "128", "--steps", "2", "--out", str(out)]
    line = [sys.executable, "-m", "benchmarks.rl_step", *SMALL, *options]
    run = subprocess.run(line, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    written = json.loads(out.read_text())
    [result] = written["results"]
    assert (result["gpus"], result["zero"], result["scaling"], result["responses"]) == (2, 3, "strong", 8)
    assert 0 < result["gap_logprob_mean"] < 1e-5, "the engine sampled with other weights than the trainer's"
    seconds = result["seconds"]
    assert sum(seconds[phase] for phase in rl_step.PHASES) <= seconds["step"] * 1.5 and min(seconds.values()) > 0
    assert len(result["idle_share"]) == 2 and all(0 <= share < 1 for share in result["idle_share"])
    assert result["step_efficiency"] == 1 and result["estimated_gib"]["update"] > 0
    assert "--zero 3" in written["command"] and "efficiency" in run.stdout


def test_requests_are_drawn_per_step():
    arguments = rl_step.argparse.Namespace(seed=0, prompt=40, shape="tiny", response=50, samples=3)
    first, again, other = (rl_step.step_requests(arguments, 5, step) for step in (1, 1, 2))
    assert first == again and [r.prompt_ids for r in first] != [r.prompt_ids for r in other]
    assert all(len(r.max_tokens) == 3 and 4 <= min(r.max_tokens) and max(r.max_tokens) <= 50 for r in first)
    assert all(10 <= len(r.prompt_ids) <= 40 for r in first)


def test_summary_and_efficiency_by_hand():
    def step(seconds: float, tokens: int, idle: list[float]) -> dict:
        phases = {"weights": 0.5, "rollout": seconds / 2, "reward": 0.0, "update": seconds / 4, "step": seconds}
        peaks = {"rollout": 1.0, "update": seconds}
        return {"seconds": phases, "idle_share": idle, "tokens": tokens, "packed_tokens": 3 * tokens, "gap": 0.1, "peak_gib": peaks}

    one = rl_step.summarize([step(4, 800, [0.0]), step(8, 800, [0.0]), step(4, 400, [0.0])])
    assert one["seconds"]["step"] == 4 and one["tokens_per_second"] == 100 and one["peak_gib"]["update"] == 8
    two = rl_step.summarize([step(4, 720, [0.1, 0.0])])
    results = [{"scaling": "weak", "gpus": 2, **two}, {"scaling": "weak", "gpus": 1, **one}]
    rl_step.add_efficiency(results)
    assert results[1]["step_efficiency"] == 1
    assert results[0]["step_efficiency"] == pytest.approx((720 / 4 / 2) / 100)
    assert results[0]["rollout_efficiency"] == pytest.approx((720 / 2 / 2) / 200)
    assert results[0]["update_efficiency"] == pytest.approx((3 * 720 / 1 / 2) / 1200)

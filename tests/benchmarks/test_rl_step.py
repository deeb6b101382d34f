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
    options = ["--gpus", "2", "--scaling", "strong", "--zero", "3", "--budget", "128", "--steps", "2", "--recompute", "true"]
    line = [sys.executable, "-m", "benchmarks.rl_step", *SMALL, *options, "--out", str(out)]
    run = subprocess.run(line, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    written = json.loads(out.read_text())
    [result] = written["results"]
    assert (result["gpus"], result["zero"], result["scaling"], result["responses"]) == (2, 3, "strong", 8)
    assert result["recomputed_layers"] == result["layers"] == 2
    assert 0 < result["gap_logprob_mean"] < 1e-5, "the engine sampled with other weights than the trainer's"
    seconds = result["seconds"]
    assert sum(seconds[phase] for phase in rl_step.PHASES) <= seconds["step"] * 1.5 and min(seconds.values()) > 0
    assert len(result["idle_share"]) == 2 and all(0 <= share < 1 for share in result["idle_share"])
    assert result["step_efficiency"] == 1 and result["estimated_gib"]["update"] > 0
    assert "--zero 3" in written["command"] and "efficiency" in run.stdout
    assert result["fused_kernels"] is True, "training.fused_kernels has not reached the rank"
    assert len(result["seconds_of_steps"]) == 3 and "step 3: weights" in run.stderr


def test_requests_are_drawn_per_step():
    arguments = rl_step.argparse.Namespace(seed=0, prompt=40, shape="tiny", response=50, samples=3, tasks=5)
    first, again, other = (rl_step.step_requests(arguments, 5, step) for step in (1, 1, 2))
    assert first == again and [r.prompt_ids for r in first] != [r.prompt_ids for r in other]
    assert all(len(r.max_tokens) == 3 and 4 <= min(r.max_tokens) and max(r.max_tokens) <= 50 for r in first)
    assert all(10 <= len(r.prompt_ids) <= 40 for r in first)
    assert len({r.max_tokens for r in first}) > 1


def test_weak_scaling_has_the_same_work_for_every_gpu():
    arguments = rl_step.argparse.Namespace(seed=0, prompt=40, shape="tiny", response=50, samples=3, tasks=4)
    one, three = rl_step.step_requests(arguments, 4, 2), rl_step.step_requests(arguments, 12, 2)
    assert three[:4] == one and len({tuple(r.prompt_ids) for r in three}) == 12
    for part in (three[4:8], three[8:]):
        assert [(len(r.prompt_ids), r.max_tokens) for r in part] == [(len(r.prompt_ids), r.max_tokens) for r in one]


def test_summary_and_efficiency_by_hand():
    def step(seconds: float, tokens: int, idle: list[float]) -> dict:
        phases = {"weights": 0.5, "rollout": seconds / 2, "reward": 0.0, "update": seconds / 4, "step": seconds}
        peaks = {"rollout": 1.0, "update": seconds}
        counts = {"tokens": tokens, "packed_tokens": 3 * tokens, "graphs": 2}
        return {"seconds": phases, "idle_share": idle, **counts, "gap": 0.1, "peak_gib": peaks}

    one = rl_step.summarize([step(4, 800, [0.0]), step(8, 800, [0.0]), step(4, 400, [0.0])])
    assert one["seconds"]["step"] == 4 and one["tokens_per_second"] == 100 and one["peak_gib"]["update"] == 8
    assert one["graphs_captured"] == 6
    two = rl_step.summarize([step(4, 720, [0.1, 0.0])])
    results = [{"scaling": "weak", "gpus": 2, **two}, {"scaling": "weak", "gpus": 1, **one}]
    rl_step.add_efficiency(results)
    assert results[1]["step_efficiency"] == 1
    assert results[0]["step_efficiency"] == pytest.approx((720 / 4 / 2) / 100)
    assert results[0]["rollout_efficiency"] == pytest.approx((720 / 2 / 2) / 200)
    assert results[0]["update_efficiency"] == pytest.approx((3 * 720 / 1 / 2) / 1200)


def fake_points(monkeypatch, fail_at: int | None = None) -> None:
    """In place of the processes of a point: 100 tokens a second on one GPU, 90 on each of several."""

    def run_ranks(command: list[str], gpus: int) -> int:
        if gpus == fail_at:
            return 3
        rate = 100.0 if gpus == 1 else 90.0 * gpus
        rates = {f"{name}tokens_per_second": rate for name in ("", "rollout_", "update_packed_")}
        seconds = dict.fromkeys([*rl_step.PHASES, "step"], 1.0)
        facts = {"scaling": "weak", "gpus": gpus, "zero": 2, "idle_share": [0.0] * gpus, "gap_logprob_mean": 0.0}
        memory = {"peak_gib": {"update": 1.0}, "estimated_gib": {"update": 1.0}}
        found = {"device": "none", "torch": "0", "result": {**facts, **rates, **memory, "seconds": seconds}}
        rl_step.Path(command[-1]).write_text(json.dumps(found))
        return 0

    monkeypatch.setattr(rl_step, "run_ranks", run_ranks)


def test_a_point_that_fails_loses_no_other(monkeypatch, tmp_path):
    fake_points(monkeypatch, fail_at=4)
    with pytest.raises(SystemExit) as ended:
        rl_step.main(["--gpus", "1,2,4", "--out", str(tmp_path / "o.json")])
    assert ended.value.code == 3
    results = json.loads((tmp_path / "o.json").read_text())["results"]
    assert [r["gpus"] for r in results] == [1, 2] and results[1]["step_efficiency"] == pytest.approx(0.9)


def test_points_of_other_calls_are_joined(monkeypatch, tmp_path, capsys):
    fake_points(monkeypatch)
    one, two, all_ = (str(tmp_path / f"{name}.json") for name in ("one", "two", "all"))
    rl_step.main(["--gpus", "1", "--out", one])
    assert rl_step.main(["--gpus", "2", "--out", two])[0]["step_efficiency"] == 1, "its own fewest GPUs"
    rl_step.main(["--gpus", "4", "--join", one, two, "--out", all_])
    written = json.loads((tmp_path / "all.json").read_text())
    assert {r["gpus"]: r["step_efficiency"] for r in written["results"]} == {1: 1.0, 2: 0.9, 4: 0.9}
    assert written["command"].count("benchmarks.rl_step") == 3 and "weak, 2 GPUs: efficiency step 90.0%" in capsys.readouterr().out

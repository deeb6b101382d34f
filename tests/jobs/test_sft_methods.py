"""Every way of finetuning, as a user starts it: the shipped tiny files learn, held-out data are looked at, several ranks agree."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from common.metrics import read_metrics
from data.prepare_sft import main
from tests.distributed.harness import ROOT, clean_environment
from tests.jobs.conftest import content, listing
from tests.jobs.fork_server import ForkServer, Job

TINY = ["sft_tiny", "sft_tiny_trace", "sft_tiny_coupled", "sft_tiny_bound"]
SCRIPT = "train/sft_sdar.py"


def sft(server: ForkServer, name: str, project: Path, *overrides: str) -> Job:
    return server.run(SCRIPT, [f"config=configs/{name}.yaml", f"experiment.project={project}", *overrides])


@pytest.mark.parametrize("name", TINY)
def test_the_loss_falls(server: ForkServer, tmp_path: Path, name: str):
    short = ["training.max_steps=60", "training.eval_every=30", "experiment.save_state_every=60", "training.validation_share=0.05"]
    without_tasks = ["training.stop_at_solve_rate=null", "dataset.eval_dataset=null"]
    job = sft(server, name, tmp_path / "run", *short, *without_tasks)
    assert job.code == 0, job.err
    rows = read_metrics(tmp_path / "run")
    losses = [row["train/nll"] for row in rows]
    held_out = [row["eval/validation_nll"] for row in rows if "eval/validation_nll" in row]
    print(f"{name}: {mean(losses[:5]):.3f} -> {mean(losses[-5:]):.3f} nats a token, held out {held_out}")
    assert mean(losses[-5:]) < 0.4 * mean(losses[:5])
    assert len(held_out) == 2 and held_out[1] < 0.6 * held_out[0] and held_out[1] < 1.0
    assert [row["step"] for row in rows if "eval/validation_loss" in row] == [30, 60]


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_the_whole_run_learns_the_task(server: ForkServer, tmp_path: Path, name: str):
    assert sft(server, name, tmp_path / "run").code == 0
    key = "eval/low_confidence_dynamic/accuracy"
    rates = [row[key] for row in read_metrics(tmp_path / "run") if key in row]
    assert rates[0] < 0.1 and rates[-1] > (0.4 if name == "sft_tiny" else 0.75), rates


def test_validation_data_of_its_own(server: ForkServer, settings: Any, jobs_dir: Path, tmp_path: Path):
    changes = {"dataset.validation_data": jobs_dir / "test.json", "dataset.eval_dataset": "null", "training.eval_every": 3}
    job = server.run(SCRIPT, settings("sft", tmp_path / "run", changes))
    assert job.code == 0, job.err
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "eval/validation_loss" in row] == [3, 4]


def test_a_killed_run_goes_on_with_its_validation_but_not_with_other_data(
    server: ForkServer, settings: Any, jobs_dir: Path, tmp_path: Path
):
    data, killer = tmp_path / "data.json", Path(__file__).with_name("killer.py")
    records = json.loads((jobs_dir / "train.json").read_text())
    data.write_text(json.dumps(records))
    changes = {"experiment.plugins": f"[{killer}]", "dataset.optimization_data": data, "training.complementary_mask": "true"}
    changes |= {"training.validation_share": 0.2, "training.loss_weight_by_ratio": "true"}
    unbroken = server.run(SCRIPT, settings("sft", tmp_path / "unbroken", changes))
    assert unbroken.code == 0, unbroken.err
    arguments = settings("sft", tmp_path / "run", changes)
    env = {"KILL_AT": "update:3", "KILL_MARKER": str(tmp_path / "killed")}
    assert server.run(SCRIPT, arguments, env).code == -signal.SIGKILL
    before = listing(tmp_path / "run")
    data.write_text(json.dumps([*records[:-1], {"question": "s9876=", "ground_truth_answer": "6789"}]))
    refused = server.run(SCRIPT, arguments)
    assert refused.code == 2 and "data.json has changed since this run was saved: put the old file back" in refused.err
    assert listing(tmp_path / "run") == before
    data.write_text(json.dumps(records))
    again = server.run(SCRIPT, arguments, env)
    assert again.code == 0, again.err
    expected, found = content(tmp_path / "unbroken"), content(tmp_path / "run")
    assert found == expected and any("eval/validation_loss" in row for row in found["metrics.jsonl"])


def test_a_trace_run_wants_step_maps(server: ForkServer, settings: Any, tmp_path: Path):
    job = server.run(SCRIPT, settings("sft", tmp_path / "run", {"training.method": "trace"}))
    assert job.code == 2 and len(job.error_lines) == 1
    assert "got 'trace', but record train:0 has no step_map: `python -m data.prepare_sft --sample-steps MODEL`" in job.err
    assert not (tmp_path / "run").exists()


# ---- launchers, several ranks, several jobs


def command(*arguments: object) -> str:
    """Run a program from the repo's root to its end; what it printed."""
    job = subprocess.run([*map(str, arguments)], cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=240)
    assert job.returncode == 0, f"{job.stdout}\n{job.stderr}"
    return job.stdout


SHORT = ["training.max_steps=4", "training.stop_at_solve_rate=null", "dataset.eval_dataset=null", "training.eval_every=2"]


@pytest.mark.slow
def test_accelerate_launch_and_two_ranks_are_the_run_of_one_process(server: ForkServer, tmp_path: Path):
    """The documented command line, and two ranks of our own launcher: loss and validation loss are those of one process."""
    changes = [*SHORT, "training.validation_share=0.02", "training.max_tokens_per_microbatch=300"]
    assert sft(server, "sft_tiny_coupled", tmp_path / "one", *changes).code == 0
    start = ["config=configs/sft_tiny_coupled.yaml", *changes]
    launcher = [Path(sys.executable).with_name("accelerate"), "launch", "--config_file", "accelerate_configs/cpu.yaml"]
    command(*launcher, "train/sft_trado.py", *start, "model.model_base=trado", f"experiment.project={tmp_path / 'launched'}")
    command(sys.executable, SCRIPT, *start, f"experiment.project={tmp_path / 'two'}", "experiment.num_processes=2")
    one = read_metrics(tmp_path / "one")
    assert len(one) == 4 and "eval/validation_loss" in one[1]
    for name in ("launched", "two"):
        rows = read_metrics(tmp_path / name)
        for row, right in zip(rows, one, strict=True):
            assert row.keys() == right.keys()
            for key in ("train/nll", "train/loss", "train/gradient_norm", "eval/validation_loss", "eval/validation_nll"):
                assert key not in right or row[key] == pytest.approx(right[key], rel=1e-4), (name, key)


@pytest.mark.slow
def test_finetuning_then_rl_then_evaluation_through_files_alone(server: ForkServer, tmp_path: Path):
    """Data are prepared from chats, step maps are sampled by a first model, a second one learns along them, RL goes on with it and
    eval.py measures: what one job hands the next is a file."""
    assert sft(server, "sft_tiny", tmp_path / "first", "training.max_steps=110").code == 0
    rows = json.loads((ROOT / "data" / "tiny_sort_train.json").read_text())[:1200]
    turns = [("human", "question"), ("gpt", "ground_truth_answer")]
    chats = [{"conversations": [{"from": who, "value": row[field]} for who, field in turns]} for row in rows]
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    steps = ["--plain", "--held-out", "0.05", "--sample-steps", tmp_path / "first/ckpt/optimized"]
    said = command(sys.executable, "-m", "data.prepare_sft", tmp_path / "chats.json", "--out", tmp_path / "steps.json", *steps)
    assert "steps.json: 1140 records" in said and "steps_held_out.json: 60 records" in said
    data = [f"dataset.optimization_data={tmp_path}/steps.json", f"dataset.validation_data={tmp_path}/steps_held_out.json"]
    job = sft(server, "sft_tiny_trace", tmp_path / "sft", *data, "training.validation_share=0", "training.max_steps=80")
    assert job.code == 0, job.err
    model = f"model.pretrained_model={tmp_path}/sft/ckpt/optimized"
    rl = [f"experiment.project={tmp_path}/rl", model, "model.prepare_config=null", "experiment.total_step=160"]
    job = server.run("rl.py", ["config=configs/rl_tiny.yaml", *rl], timeout_seconds=240)
    assert job.code == 0, job.err
    solved = {}
    for name in ("sft", "rl"):
        own = [f"experiment.project={tmp_path}/eval_{name}", f"model.pretrained_model={tmp_path}/{name}/ckpt/optimized"]
        job = server.run("eval.py", ["config=configs/tiny_eval.yaml", *own])
        assert job.code == 0, job.err
        results = json.loads((tmp_path / f"eval_{name}" / "results" / "tiny_sort_test.json").read_text())
        solved[name] = {result["name"]: result["accuracy"] for result in results}
    print(solved)
    sampled = "low_confidence_dynamic-top_k0"
    assert 0.25 < solved["sft"][sampled] < solved["rl"][sampled] - 0.2


def test_rollouts_are_training_data(server: ForkServer, settings: Any, jobs_dir: Path, tmp_path: Path):
    """The right answers of an RL run, along the steps in which they were sampled."""
    job = server.run("rl.py", settings("rl", tmp_path / "rl", {"experiment.total_step": 1}))
    assert job.code == 0, job.err
    rollouts = next((tmp_path / "rl" / "rollouts").glob("*.jsonl"))
    main([str(rollouts), "--out", str(tmp_path / "right.json"), "--only-correct"])
    number = sum(json.loads(line)["correct"] is True for line in rollouts.read_text().splitlines())
    assert len(json.loads((tmp_path / "right.json").read_text())) <= number > 0
    changes = {"dataset.optimization_data": tmp_path / "right.json", "training.method": "trace", "dataset.eval_dataset": "null"}
    job = server.run(SCRIPT, settings("sft", tmp_path / "run", changes))
    assert job.code == 0, job.err
    assert all(row["train/nll"] > 0 for row in read_metrics(tmp_path / "run"))

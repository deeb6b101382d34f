"""eval.py as a user starts it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Callable

import pytest
import yaml

from common.records import read_rollouts
from common.run_dir import RunDir
from tests.jobs.conftest import listing
from tests.jobs.fork_server import ForkServer

DECODINGS = ["low_confidence_dynamic-top_k0", "low_confidence_static-top_k0", "low_confidence_dynamic-top_k1"]


@pytest.fixture(scope="module")
def evaluated(server: ForkServer, settings: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    project = tmp_path_factory.mktemp("eval") / "run"
    return project, server.run("eval.py", settings("eval", project))


def results_of(project: Path) -> list[dict[str, Any]]:
    return json.loads((project / "results" / "test.json").read_text())


def test_what_it_leaves(evaluated: tuple[Path, Any]):
    project, job = evaluated
    assert job.code == 0 and job.err == "", job.err
    table = (project / "results" / "test.txt").read_text()
    assert table in job.out
    assert [line.split()[0] for line in table.splitlines()[2:]] == DECODINGS
    results = results_of(project)
    assert [result["name"] for result in results] == DECODINGS
    for result in results:
        rollouts = read_rollouts(project / "results" / f"test.{result['name']}.jsonl")
        assert len(rollouts) == result["num_responses"] == 6 * 4
        right = {}
        for rollout in rollouts:
            right.setdefault(rollout.task_id, []).append(rollout.correct)
        assert result["accuracy"] == pytest.approx(sum(map(sum, right.values())) / 24)
        assert result["pass_at_k"] == pytest.approx(sum(map(any, right.values())) / 6)
        assert result["mean_length"] == pytest.approx(sum(r.num_response for r in rollouts) / 24)
        assert result["settings"]["top_k"] == int(result["name"][-1])
        assert result["settings"]["max_token"] == 8 and result["settings"]["pretrained_model"].endswith("/model")


def test_greedy_answers_are_all_alike(evaluated: tuple[Path, Any]):
    greedy = results_of(evaluated[0])[2]
    assert greedy["accuracy"] == greedy["pass_at_k"]


def test_the_settings_are_kept(evaluated: tuple[Path, Any]):
    project, _ = evaluated
    kept = yaml.safe_load((project / "results" / "test.config.yaml").read_text())
    assert kept["evaluation"]["max_token"] == 8
    assert kept == yaml.safe_load((project / "config.yaml").read_text())


@pytest.mark.slow
def test_two_processes_find_the_same(evaluated: tuple[Path, Any], server: ForkServer, settings: Any, tmp_path: Path):
    """Requests are dealt out to the ranks; what a sequence draws does not depend on where it is drawn."""
    job = server.run("eval.py", settings("eval", tmp_path / "run", {"experiment.num_processes": 2}))
    assert job.code == 0, job.err
    for one, two in zip(results_of(evaluated[0]), results_of(tmp_path / "run"), strict=True):
        assert {key: one[key] for key in one if "second" not in key} == {key: two[key] for key in two if "second" not in key}
    for name in DECODINGS:
        file = Path("results") / f"test.{name}.jsonl"
        ours, theirs = read_rollouts(evaluated[0] / file), read_rollouts(tmp_path / "run" / file)
        assert [r.response_ids for r in ours] == [r.response_ids for r in theirs]


def test_both_engines_find_the_same(evaluated: tuple[Path, Any], server: ForkServer, settings: Any, tmp_path: Path):
    """On a CPU the paged engine runs the references of its kernels."""
    plugin = {"experiment.plugins": f"[{Path(__file__).with_name('kernel_references.py')}]"}
    job = server.run("eval.py", settings("eval", tmp_path / "run", {"rollout.engine": "triton", **plugin}))
    assert job.code == 0, job.err
    for name in DECODINGS:
        file = Path("results") / f"test.{name}.jsonl"
        ours, theirs = read_rollouts(tmp_path / "run" / file), read_rollouts(evaluated[0] / file)
        assert [(r.response_ids, r.step_map) for r in ours] == [(r.response_ids, r.step_map) for r in theirs]


def test_into_the_directory_of_a_training_run(server: ForkServer, settings: Any, tmp_path: Path):
    """The run's own settings stay, so that it can still go on."""
    project = tmp_path / "run"
    assert server.run("rl.py", settings("rl", project)).code == 0
    config, state = (project / "config.yaml").read_text(), listing(project / "state")
    model = {"model.pretrained_model": project / "ckpt" / "optimized"}
    assert server.run("eval.py", settings("eval", project, model)).code == 0
    assert (project / "config.yaml").read_text() == config and listing(project / "state") == state
    again = server.run("rl.py", settings("rl", project))
    assert again.code == 0 and again.out.startswith("finished: ")


def test_only_the_same_evaluation_writes_over_itself(server: ForkServer, settings: Any, jobs_dir: Path, tmp_path: Path):
    project, other = tmp_path / "run", tmp_path / "other_model"
    shutil.copytree(jobs_dir / "model", other)
    short = {"evaluation.num_response_per_task": 1, "evaluation.remasking_strategy": "[sequential]", "evaluation.top_k": "[1]"}
    assert server.run("eval.py", settings("eval", project, short)).code == 0
    before = listing(project)
    for change, words in [
        ({"model.pretrained_model": other}, f"model.pretrained_model: '{jobs_dir}/model' there, '{other}' here)"),
        ({"evaluation.top_k": "[0]"}, "evaluation.top_k: [1] there, [0] here)"),
        ({"evaluation.top_k": "[0]", "training.seed": 3}, "evaluation.top_k: [1] there, [0] here and 1 more)"),
        ({"evaluation.top_k": "[0]", "experiment.start_from_scratch": "false"}, "evaluation.top_k: [1] there, [0] here)"),
    ]:
        job = server.run("eval.py", settings("eval", project, {**short, **change}))
        assert job.code == 2 and len(job.error_lines) == 1 and job.out == ""
        assert job.err.startswith(f"error: experiment.project: {project} holds results of test by another config ({words}: choose")
    assert listing(project) == before
    # The same one, with what may differ, and from a directory that was moved.
    moved = project.rename(tmp_path / "moved")
    same = {**short, "system.ssh_port": 23, "evaluation.max_active": 3, "model.pretrained_model": f"{jobs_dir}/model/"}
    again = server.run("eval.py", settings("eval", moved, same))
    assert again.code == 0, again.err
    assert listing(moved).keys() == before.keys()
    # Another task set is another result, beside it.
    shutil.copy(jobs_dir / "test.json", tmp_path / "second.json")
    second = {**short, "model.pretrained_model": other, "dataset.eval_dataset": tmp_path / "second.json"}
    assert server.run("eval.py", settings("eval", moved, second)).code == 0
    for name, model in [("test", same["model.pretrained_model"]), ("second", other)]:
        assert json.loads((moved / "results" / f"{name}.json").read_text())[0]["settings"]["pretrained_model"] == str(model)
        assert yaml.safe_load((moved / "results" / f"{name}.config.yaml").read_text())["model"]["pretrained_model"] == str(model)
    # Results that say nothing of where they are from.
    (moved / "results" / "second.config.yaml").unlink()
    unknown = server.run("eval.py", settings("eval", moved, second))
    assert unknown.code == 2 and "results of second by settings that are not known (no second.config.yaml)" in unknown.err


def test_beside_other_jobs(server: ForkServer, settings: Any, tmp_path: Path):
    """One that trains in the directory, or makes other results, is no hindrance; one that makes the same is."""
    directory = RunDir(tmp_path / "run")
    short = {"evaluation.num_response_per_task": 1, "evaluation.remasking_strategy": "[sequential]", "evaluation.top_k": "[1]"}
    training, other, same = directory.lock, directory.results_lock("other"), directory.results_lock("test")
    training.acquire()
    other.acquire()
    same.acquire()
    refused = server.run("eval.py", settings("eval", directory.path, short))
    assert refused.code == 2 and f"{directory.path} (results of test) is in use by process {os.getpid()} on " in refused.err
    same.release()
    ended = server.run("eval.py", settings("eval", directory.path, short))
    assert ended.code == 0, ended.err
    training.release()
    other.release()
    assert sorted(path.name for path in directory.path.iterdir()) == ["config.yaml", "results"]


@pytest.mark.parametrize("script, config", [("rl.py", "rl_tiny"), ("eval.py", "tiny_eval"), ("train/sft_sdar.py", "sft_tiny")])
def test_print_config(script: str, config: str, server: ForkServer, tmp_path: Path):
    arguments = [f"config=configs/{config}.yaml", f"experiment.project={tmp_path}/run", "training.seed=3"]
    job = server.run(script, [*arguments, "--print-config"])
    assert job.code == 0 and job.err == ""
    shown = yaml.safe_load(job.out)
    assert shown["training"]["seed"] == 3 and shown["experiment"]["project"] == f"{tmp_path}/run"
    assert not (tmp_path / "run").exists()
    # What is printed is a config of its own.
    (tmp_path / "again.yaml").write_text(job.out)
    again = server.run(script, [f"config={tmp_path}/again.yaml", "--print-config"])
    assert again.code == 0 and yaml.safe_load(again.out) == shown


@pytest.mark.parametrize("script", ["rl.py", "eval.py", "train/sft_sdar.py"])
def test_help(script: str, server: ForkServer):
    job = server.run(script, ["--help"])
    assert job.code == 0 and job.err == ""
    assert "training.eps: float = 0.2" in job.out and "experiment.project" in job.out

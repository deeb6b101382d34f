"""The comparison of modes of parallelism: its figures by hand, and (slow) two modes of a run of two steps."""

from __future__ import annotations

import json

import pytest

from benchmarks import parallel_modes
from benchmarks.parallel_modes import MODES, Gpus, furthest, last_evaluation, late_rate, summary, table
from common.deepspeed_files import deepspeed_file_names


def run(accuracy: float, error: float) -> dict[str, float]:
    return {"accuracy": accuracy, "standard_error": error, "late_solve_rate": accuracy / 2, "seconds": 10.0}


def test_means_and_distances_by_hand():
    # By tasks sqrt(3 * 0.03^2) / 3 = 0.0173; by seeds 0 and 0.1 / sqrt(3) = 0.0577.
    close = [run(0.9, 0.03)] * 3
    wide = [run(0.7, 0.03), run(0.8, 0.03), run(0.9, 0.03)]
    assert summary(close) == (pytest.approx(0.9), pytest.approx(0.03 / 3**0.5))
    assert summary(wide) == (pytest.approx(0.8), pytest.approx(0.1 / 3**0.5))
    one, other, gap = furthest({"a": close, "b": wide, "c": close})
    assert (one, other) == ("a", "b") and gap == pytest.approx(0.1 / (0.0009 / 3 + 0.01 / 3) ** 0.5)
    assert "| b | 0.700 | 0.800 | 0.900 | 0.800 (0.058) | 0.400 | 10 |" in table({"b": wide}, [1, 2, 3])
    assert "| b | 0.700 | - | 0.900 | 0.800 (0.100) | 0.400 | 10 |" in table({"b": [wide[0], None, wide[2]]}, [1, 2, 3])


def test_the_last_evaluation_counts():
    rows = [{"step": n, "eval/dynamic/accuracy": rate, "eval/dynamic/standard_error": 0.1} for n, rate in [(1, 0.2), (2, 0.6)]]
    assert last_evaluation([*rows, {"step": 3, "train/loss": 1.0}]) == {"accuracy": 0.6, "standard_error": 0.1}


def test_the_last_third_of_steps():
    rows = [{"step": n, "rollout/solve_rate": rate} for n, rate in enumerate([0.0, 0.1, 0.2, 0.3, 0.5, 0.9])]
    assert late_rate([*rows, {"step": 9, "eval/dynamic/accuracy": 1.0}]) == {"late_solve_rate": pytest.approx(0.7)}
    assert late_rate(rows[1:2]) == {"late_solve_rate": 0.1} and late_rate([{"step": 1}]) == {}


def test_the_files_of_the_modes_exist():
    files = {file.format(2) for file in MODES.values() if file and "{}" in file}
    assert len(files) == 2 and files <= set(deepspeed_file_names())


def test_jobs_go_where_the_fewest_processes_are():
    gpus, held = Gpus(["0", "2", "3", "5"]), []

    def take(number: int) -> str:
        held.append(gpus.take(number))
        return held[-1].__enter__()["CUDA_VISIBLE_DEVICES"]

    assert [take(2), take(1), take(2)] == ["0,2", "3", "5,0"]  # now 2, 1, 1, 1 processes
    assert [take(2), take(1)] == ["2,3", "5"]  # 2, 2, 2, 2
    held[0].__exit__(None, None, None)  # 1, 1, 2, 2
    assert take(2) == "0,2"
    with Gpus([]).take(2) as environment:
        assert environment == {}


def test_the_gpus_of_this_process_alone_are_used(monkeypatch):
    monkeypatch.setattr(parallel_modes, "visible_gpus", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,4")
    assert list(Gpus.visible().processes) == ["6", "4"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert list(Gpus.visible().processes) == ["0", "1"]


class FakeJobs:
    """In place of `call`: writes the metrics of a run whose accuracy is its seed / 10; fails as often as it is told."""

    def __init__(self, failures: dict[str, int]) -> None:
        self.failures, self.seen = failures, []

    def __call__(self, script, *arguments, quiet, environment, log):
        settings = dict(argument.split("=", 1) for argument in arguments)
        project = settings["experiment.project"]
        name = project.rsplit("/", 1)[1]
        self.seen.append((name, script, settings, environment))
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("what it said\n")
        if self.failures.get(name, 0):
            self.failures[name] -= 1
            raise SystemExit(1)
        row = {"step": 1, "eval/dynamic/accuracy": int(settings["training.seed"]) / 10, "eval/dynamic/standard_error": 0.1}
        parallel_modes.Path(project).mkdir(parents=True, exist_ok=True)
        (parallel_modes.Path(project) / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        return 7.0


def run_fakes(monkeypatch, tmp_path, failures: dict[str, int]) -> tuple[FakeJobs, list[str]]:
    jobs = FakeJobs(failures)
    monkeypatch.setattr(parallel_modes, "call", jobs)
    monkeypatch.setattr(parallel_modes, "visible_gpus", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    options = ["--seeds", "3,5", "--modes", "one process,zero2", "--workers", "3"]
    return jobs, [*options, "--folder", str(tmp_path / "f"), "--out", str(tmp_path / "o.json")]


def test_a_job_that_fails_is_started_again(monkeypatch, tmp_path, capsys):
    """And every job has its own GPUs, the finetuning one alone, and all the same caches."""
    jobs, options = run_fakes(monkeypatch, tmp_path, {"sft_3": 1, "zero2_5": 1})
    parallel_modes.main(options)
    written = json.loads((tmp_path / "o.json").read_text())
    assert [r["accuracy"] for r in written["finetuning"]] == [0.3, 0.5]
    assert {mode: [r["accuracy"] for r in runs] for mode, runs in written["results"].items()} == {
        "one process": [0.3, 0.5],
        "zero2": [0.3, 0.5],
    }
    assert len(jobs.seen) == 8 and "what it said" in capsys.readouterr().out
    for name, _, settings, environment in jobs.seen:
        gpus = environment["CUDA_VISIBLE_DEVICES"].split(",")
        assert len(gpus) == int(settings["experiment.num_processes"]) == (2 if name.startswith("zero2") else 1)
        assert not name.startswith("sft") or "model.pretrained_model" not in settings
    assert len({environment["TRITON_CACHE_DIR"] for *_, environment in jobs.seen}) == 1
    again = parallel_modes.main([*options, "--modes", "one process,zero2,ddp"])
    assert [name for name, *_ in jobs.seen[8:]] == ["ddp_3", "ddp_5"], "what has ended is not run again"
    assert again["zero2"][1]["accuracy"] == 0.5 and again["zero2"][1]["seconds"] == 7


def test_a_job_that_fails_twice_loses_no_other(monkeypatch, tmp_path, capsys):
    _, options = run_fakes(monkeypatch, tmp_path, {"sft_3": 2})
    with pytest.raises(SystemExit, match="2 of 4 runs have failed"):
        parallel_modes.main(options)
    written = json.loads((tmp_path / "o.json").read_text())
    assert {mode: [r and r["accuracy"] for r in runs] for mode, runs in written["results"].items()} == {
        "one process": [None, 0.5],
        "zero2": [None, 0.5],
    }
    assert "| zero2 | - | 0.500 |" in capsys.readouterr().out


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

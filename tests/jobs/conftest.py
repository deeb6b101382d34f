from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from common.metrics import is_deterministic, read_metrics
from common.run_lock import SUFFIX
from tests.distributed.harness import ROOT
from tests.jobs.fork_server import ForkServer

VARYING_RESULTS = ("seconds", "tokens_per_second")


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def jobs_dir(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once: data sets of a few tasks (train.json, test.json), and a tiny checkpoint that solves some of them (model/)."""
    folder = tmp_path_factory.mktemp("jobs")
    for name, number in [("train", 14), ("test", 6)]:
        records = json.loads((ROOT / "data" / f"tiny_sort_{name}.json").read_text())[:number]
        (folder / f"{name}.json").write_text(json.dumps(records))
    changes = ["training.max_steps=80", "training.stop_at_solve_rate=null", "dataset.eval_dataset=null"]
    job = server.run("train/sft_sdar.py", ["config=configs/sft_tiny.yaml", f"experiment.project={folder}/sft", *changes])
    assert job.code == 0, job.err
    (folder / "sft" / "ckpt" / "optimized").rename(folder / "model")
    return folder


@pytest.fixture(scope="session")
def settings(jobs_dir: Path) -> Callable[..., list[str]]:
    """Command-line arguments of a job of seconds: settings(job, project, **{"section.key": value})."""

    def arguments(job: str, project: Path, changes: dict[str, Any] | None = None) -> list[str]:
        common = {
            "config": {"rl": "configs/rl_tiny.yaml", "eval": "configs/tiny_eval.yaml", "sft": "configs/sft_tiny.yaml"}[job],
            "experiment.project": project,
            "model.pretrained_model": jobs_dir / "model",
            "dataset.eval_dataset": jobs_dir / "test.json",
        }
        own: dict[str, Any] = {
            "rl": {
                "dataset.train_dataset": jobs_dir / "train.json",
                "model.prepare_config": "null",
                "experiment.total_step": 2,
                "experiment.save_every": 2,
                "experiment.eval_every": 2,
                "experiment.save_state_every": 1,
                "rollout.num_task_per_step": 4,
                "rollout.num_response_per_task": 4,
            },
            "sft": {
                "dataset.optimization_data": jobs_dir / "train.json",
                "training.max_steps": 4,
                "training.batch_size": 4,
                "training.eval_every": 2,
                "training.stop_at_solve_rate": "null",
            },
            "eval": {},
        }[job]
        return [f"{key}={value}" for key, value in {**common, **own, **(changes or {})}.items()]

    return arguments


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and directory below `folder`, but locks (common/run_lock.py): what shows that nothing was written. Of directories
    their names alone: a lock that comes and goes in one changes its time."""

    def times(path: Path) -> tuple[int, int]:
        stat = path.stat()
        return (-1, -1) if path.is_dir() else (stat.st_size, stat.st_mtime_ns)

    return {str(path.relative_to(folder)): times(path) for path in sorted(folder.rglob("*")) if path.suffix != SUFFIX}


def content(run: Path) -> dict[str, Any]:
    """All that a run has left and that must not depend on whether it was interrupted, by file name."""
    import torch

    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_dir() or name in ("config.yaml", "report.html"):
            continue
        if name == "metrics.jsonl":
            found[name] = [{key: value for key, value in row.items() if is_deterministic(key)} for row in read_metrics(run)]
        elif name.startswith("results/") and path.suffix == ".json":
            results = json.loads(path.read_text())
            found[name] = [{key: value for key, value in result.items() if key not in VARYING_RESULTS} for result in results]
        elif name.startswith("results/") and path.suffix == ".txt":
            found[name] = [line.split()[:-1] for line in path.read_text().splitlines()]
        elif name.startswith("state/") and path.suffix in (".bin", ".pkl"):
            found[name] = comparable(torch.load(path, weights_only=False))
        else:
            found[name] = path.read_bytes()
    return found


def comparable(value: Any) -> Any:
    """Tensors and arrays as their bytes, so that == compares bit for bit."""
    if hasattr(value, "numpy"):
        value = value.detach().numpy()
    if hasattr(value, "tobytes"):
        return str(value.dtype), tuple(value.shape), value.tobytes()
    if isinstance(value, dict):
        return {key: comparable(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [comparable(one) for one in value]
    return value

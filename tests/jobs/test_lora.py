"""LoRA as a job: the adapter learns, goes through files (evaluation, merged weights, going on), and resumes bit for bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from safetensors.torch import load_file

import models.registry  # noqa: F401
from common.metrics import read_metrics
from models.checkpoint import load_pretrained
from models.value import load_value_model
from tests.jobs.conftest import content
from tests.jobs.fork_server import ForkServer
from tests.jobs.test_resume import COMMON, SCRIPTS

CONFIG = "config=configs/rl_tiny_lora.yaml"


@pytest.fixture(scope="module")
def sft(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What sft_tiny.yaml ends with."""
    project = tmp_path_factory.mktemp("sft") / "run"
    job = server.run("train/sft_sdar.py", ["config=configs/sft_tiny.yaml", f"experiment.project={project}"])
    assert job.code == 0, job.err
    return project / "ckpt" / "optimized"


@pytest.fixture(scope="module")
def short_run(server: ForkServer, sft: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rl_tiny_lora.yaml, shorter."""
    project = tmp_path_factory.mktemp("rl") / "run"
    changes = ["experiment.total_step=100", "experiment.eval_every=100"]
    job = server.run("rl.py", [CONFIG, f"experiment.project={project}", f"model.pretrained_model={sft}", *changes])
    assert job.code == 0, job.err
    return project


def test_the_adapter_learns(short_run: Path):
    rows = read_metrics(short_run)
    rates = [row["rollout/solve_rate"] for row in rows]
    first, last = sum(rates[:10]) / 10, sum(rates[-10:]) / 10
    print(f"solve rate of the first and last 10 of {len(rates)} steps: {first:.2f}, {last:.2f}")
    assert last > first + 0.1
    assert max(row["gap/logprob_max"] for row in rows) < 1e-4, "the engine samples with the adapter"


def evaluate(server: ForkServer, model: Path, project: Path) -> list[dict[str, Any]]:
    settings = ["config=configs/tiny_eval.yaml", f"experiment.project={project}", f"model.pretrained_model={model}"]
    settings += ["evaluation.remasking_strategy=[low_confidence_dynamic]", "evaluation.top_k=[1]"]
    job = server.run("eval.py", [*settings, "evaluation.num_response_per_task=1"])
    assert job.code == 0, job.err
    [file] = (project / "results").glob("*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_evaluation_of_adapter_and_of_merged_weights(server: ForkServer, sft: Path, short_run: Path, tmp_path: Path):
    """The adapter's folder and the merged weights answer alike, and better than the base."""
    folders = {"base": sft, "adapter": short_run / "ckpt" / "optimized", "merged": short_run / "ckpt" / "optimized-merged"}
    answers = {name: evaluate(server, folder, tmp_path / name) for name, folder in folders.items()}
    texts = {name: [answer["response_ids"] for answer in own] for name, own in answers.items()}
    assert texts["adapter"] == texts["merged"] != texts["base"]
    solved = {name: sum(answer["reward"] for answer in own) / len(own) for name, own in answers.items()}
    print(f"greedy: {solved}")
    assert solved["adapter"] > solved["base"]


@pytest.mark.parametrize("rank", [8, "null"])
def test_going_on_from_an_adapter(rank: Any, server: ForkServer, sft: Path, short_run: Path, tmp_path: Path):
    """With its rank the adapter goes on, on the same base; without one it is merged, and all weights train."""
    adapter = short_run / "ckpt" / "optimized"
    changes = ["experiment.total_step=2", "experiment.save_every=2", "evaluation.if_eval=false", f"training.lora.rank={rank}"]
    job = server.run("rl.py", [CONFIG, f"experiment.project={tmp_path}/run", f"model.pretrained_model={adapter}", *changes])
    assert job.code == 0, job.err
    before, after = (read_metrics(folder)[0]["rollout/solve_rate"] for folder in (short_run, tmp_path / "run"))
    assert after > before + 0.1, "not the adapter's solve rate"
    again = load_pretrained(str(tmp_path / "run" / "ckpt" / "optimized"), "sdar", torch.float32)
    if rank == 8:
        assert again.adapter.base == str(sft)
    else:
        assert again.adapter is None and (tmp_path / "run" / "ckpt" / "optimized" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "changes, message",
    [
        (["training.lora.target_modules=[q_proj,qproj]"], "'qproj' is no linear layer of sdar (did you mean q_proj?): choose"),
        (["training.lora.target_modules=[]"], "training.lora.target_modules: got an empty list: choose from q_proj, k_proj"),
        (["training.lora.rank=-1"], "training.lora.rank: got -1, must be 0 or more"),
        (["training.lora.alpha=0"], "training.lora.alpha: got 0.0, must be above 0"),
        (["training.lora.dropout=1"], "training.lora.dropout: got 1.0, must be from 0 to below 1"),
        (["training.lora.dropout=0.1"], "training.lora.dropout: got 0.1, must be 0 for RL"),
        (["training.lora.rnk=3"], "training.lora.rnk: unknown setting on the command line (did you mean training.lora.rank?)"),
        (["model.pretrained_model=tiny-random"], "training.lora.rank: got 8, but model.pretrained_model is tiny-random"),
        (["training.lora.rank=4"], "training.lora.rank: got 4, the adapter in"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_settings(changes: list[str], message: str, server: ForkServer, short_run: Path, tmp_path: Path):
    project = [f"experiment.project={tmp_path}/run", f"model.pretrained_model={short_run}/ckpt/optimized"]
    job = server.run("rl.py", [CONFIG, *project, *changes])
    assert job.code == 2 and message in job.err and len(job.error_lines) == 1, job.err
    assert not (tmp_path / "run").exists()


LORA = {"training.lora.rank": 4, "training.lora.save_merged": "true", "optimizer.params.learning_rate": 1e-2}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rl": ("rl", {**COMMON, **LORA}),
    # A critic with an adapter of its own on the same base.
    "value": ("rl", {**COMMON, **LORA, "model.value_base_model": "{base}", "optimizer.params.value_learning_rate": 1e-3}),
    "sft": (
        "sft",
        {
            **{key: COMMON[key] for key in COMMON if key not in ("training.num_updates_per_step", "experiment.total_step")},
            **LORA,
            "training.lora.dropout": 0.2,
            "training.max_steps": 6,
            "experiment.save_state_every": 2,
            "dataset.data_type": "exact",
        },
    ),
}


@pytest.mark.parametrize(
    "variant, kill_at",
    [
        ("value", "updated:4"),
        ("sft", "updated:4"),
        pytest.param("rl", "updated:4", marks=pytest.mark.slow),
        pytest.param("rl", "checkpoint_half_written:6", marks=pytest.mark.slow),
    ],
)
def test_killed_and_started_again(
    variant: str, kill_at: str, server: ForkServer, settings: Callable[..., list[str]], jobs_dir: Path, tmp_path: Path
):
    job, own = VARIANTS[variant]
    own = {key: str(value).format(base=jobs_dir / "model") for key, value in own.items()}

    def start(project: Path, **environment: str) -> Any:
        return server.run(SCRIPTS[job], settings(job, project, own), environment)

    assert start(tmp_path / "unbroken").code == 0
    killing = {"KILL_AT": kill_at, "KILL_MARKER": f"{tmp_path}/killed"}
    assert start(tmp_path / "run", **killing).code == -signal.SIGKILL
    again = start(tmp_path / "run", **killing)
    assert again.code == 0, again.err
    expected, found = content(tmp_path / "unbroken"), content(tmp_path / "run")
    assert found.keys() == expected.keys() and "ckpt/optimized/adapter_model.safetensors" in found
    for name in expected:
        assert found[name] == expected[name], name
    if variant == "value":
        folder = tmp_path / "run" / "ckpt" / "optimized_value"
        model, value = load_value_model(str(folder), "sdar", torch.float32)
        assert model.adapter.base == str(jobs_dir / "model")
        assert value.head.weight.abs().max() > 0, "its head is not the trained one"
        merged, same = load_value_model(f"{folder}-merged", "sdar", torch.float32)
        assert merged.adapter is None and torch.equal(same.head.weight, value.head.weight)
        assert sum("lora_B" in name for name in load_file(folder / "adapter_model.safetensors")) == 14


def test_a_value_head_on_the_adapted_trunk(server: ForkServer, settings: Callable[..., list[str]], tmp_path: Path):
    changes = {**LORA, "model.value_shared": "true"}
    job = server.run("rl.py", settings("rl", tmp_path / "run", changes))
    assert job.code == 0, job.err
    rows = read_metrics(tmp_path / "run")
    assert all("value/explained_variance" in row for row in rows)
    assert (tmp_path / "run" / "ckpt" / "optimized" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_whole_tiny_run(server: ForkServer, sft: Path, tmp_path: Path):
    """rl_tiny_lora.yaml as it ships."""
    project = [f"experiment.project={tmp_path}/run", f"model.pretrained_model={sft}"]
    job = server.run("rl.py", [CONFIG, *project], timeout_seconds=900)
    assert job.code == 0, job.err
    key = "eval/low_confidence_dynamic/accuracy"
    accuracy = [row[key] for row in read_metrics(tmp_path / "run") if key in row]
    print(f"held-out solve rate, sampled: {accuracy}")
    assert accuracy[-1] > 0.85 and accuracy[-1] > accuracy[0]

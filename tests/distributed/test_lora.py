"""A LoRA run on two ranks, under DDP and ZeRO, is that of one process: metrics, adapter, checkpoint, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoint import load_pretrained, save_pretrained
from tests.distributed import training_jobs
from tests.distributed.harness import run_on_ranks
from tests.distributed.test_training import MODES, command_line, folder, metrics  # noqa: F401 (a fixture)
from tests.train.steps import error, forget_accelerator, tiny_model, weights

LORA = [
    "training.lora.rank=4",
    "model.value_base_model=null",
    "training.lora.save_merged=true",
    "training.gradient_checkpointing_enable=true",
    "training.kl_to=old",
    "optimizer.params.learning_rate=2e-2",
]


@pytest.fixture(scope="module")
def arguments(folder: Path):  # noqa: F811
    """The command line of a run of that name."""
    base = tiny_model(3, vocab_size=28)
    save_pretrained(base, weights(base), folder / "base")
    return lambda name, *overrides: command_line(folder, name, f"model.pretrained_model={folder / 'base'}", *LORA, *overrides)


@pytest.fixture(scope="module")
def of_one_process(arguments) -> dict[str, Any]:
    result = training_jobs.rl_run(arguments("one"))
    forget_accelerator()
    return result


@pytest.fixture(scope="module")
def of_two_ranks(arguments) -> list[dict[str, dict[str, Any]]]:
    runs = {name: {"argv": arguments(name, *overrides)} for name, overrides in MODES.items()}
    for mode in ("zero2", "zero3"):
        name = f"{mode} broken off"
        runs[name] = {"argv": arguments(name, *MODES[mode]), "broken_off_after": 2}
    runs["bfloat16"] = {"argv": arguments("bfloat16", *MODES["zero3"], "training.mixed_precision=bf16", "training.beta=0")}
    return run_on_ranks("tests.distributed.training_jobs:rl_runs", 2, {"runs": runs})


@pytest.mark.parametrize("mode", MODES)
def test_a_run_on_two_ranks_is_that_of_one_process(folder, of_one_process, of_two_ranks, mode):  # noqa: F811
    right, found = metrics(folder, "one"), metrics(folder, mode)
    assert len(found) == len(right) == 3
    for first, second in zip(found, right, strict=True):
        assert first == pytest.approx(second, rel=5e-3, abs=1e-3)
    start = weights(load_pretrained(str(folder / "base"), "sdar", torch.float32))
    for result in of_two_ranks:
        own = result[mode]["weights"]
        assert error({name: own[name] for name in start}, start) == 0, "the base has moved"
        adapter = {name: w for name, w in own.items() if name not in start}
        assert len(adapter) == 28 and all(".adapters." in name for name in adapter)
        assert result[mode]["num_processes"] == 2
        gap = error(adapter, {name: of_one_process["weights"][name] for name in adapter})
        moved = min(float(w.abs().max()) for name, w in adapter.items() if name.endswith(".B"))
        print(f"{mode}: adapter {gap:.1e} of the largest entry apart; every B has moved by {moved:.1e} at least")
        assert gap < 1e-4 and moved > 1e-3
        assert error(result[mode]["checkpoint"], own) == 0, "the checkpoint is not what was trained"
    merged = weights(load_pretrained(str(folder / mode / "ckpt" / "optimized-merged"), "sdar", torch.float32))
    name = "layers.0.attention.out"
    added = adapter[f"{name}.adapters.o_proj.B"] @ adapter[f"{name}.adapters.o_proj.A"] * 2
    assert (merged[f"{name}.weight"] - start[f"{name}.weight"] - added).abs().max() < 1e-6


def test_bfloat16(folder, of_two_ranks):  # noqa: F811
    start = weights(load_pretrained(str(folder / "base"), "sdar", torch.bfloat16))
    for result in of_two_ranks:
        own = {name: w.float() for name, w in result["bfloat16"]["weights"].items()}
        assert error({name: own[name] for name in start}, start) == 0, "the base has moved"
        adapter = {name: w for name, w in own.items() if name not in start}
        assert error({name: result["bfloat16"]["checkpoint"][name] for name in adapter}, adapter) == 0
        assert min(float(w.abs().max()) for name, w in own.items() if name.endswith(".B")) > 1e-3
    for row in metrics(folder, "bfloat16"):
        assert row["gap/logprob_mean"] < 0.02, "the engine sampled with other weights than the trainer's"


@pytest.mark.parametrize("mode", ["zero2", "zero3"])
def test_a_run_goes_on_where_it_was_broken_off(folder, of_two_ranks, mode):  # noqa: F811
    assert metrics(folder, f"{mode} broken off") == metrics(folder, mode)
    for result in of_two_ranks:
        assert error(result[f"{mode} broken off"]["weights"], result[mode]["weights"]) == 0


@pytest.mark.parametrize("mode", MODES)
def test_the_state_does_not_hold_the_base(folder, of_two_ranks, mode):  # noqa: F811
    [state] = (folder / mode / "state").iterdir()
    names: set[str] = set()
    for file in state.rglob("trained_*.bin"):
        names |= torch.load(file).keys()
    assert names and all(".adapters." in name for name in names), sorted(names)[:3]

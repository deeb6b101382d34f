"""The numbers of an evaluation by hand."""

from __future__ import annotations

import ast
from types import SimpleNamespace

import pytest
import torch

import models.checkpoint as checkpoint
from common import dist
from common.records import ScoredRollout
from configs.load import ROOT, load_config
from configs.schema import Evaluation
from eval import named_variants, run, solve_rates


def scored(task_id, correct):
    return ScoredRollout(task_id, 0, [1], [2], [1], [0.0], [0.0], 1, "stop", 1, 0, 4, reward=float(bool(correct)), correct=correct)


def test_accuracy_standard_error_and_pass_at_k():
    rollouts = [scored("a", True), scored("a", False), scored("b", True), scored("b", True), scored("c", False), scored("c", False)]
    rates = solve_rates(rollouts, ["a", "b", "c", "too long"], k=2)
    # Rates 0.5, 1, 0, 0: mean 0.375, variance (0.125^2 + 0.625^2 + 2 * 0.375^2) / 3.
    assert rates["accuracy"] == pytest.approx(0.375)
    assert rates["standard_error"] == pytest.approx((0.6875 / 3 / 4) ** 0.5)
    assert rates["pass_at_k"] == 0.5


def test_a_reward_without_a_verdict_gives_no_accuracy():
    assert solve_rates([scored("a", None)], ["a"], 1) == {"accuracy": None, "standard_error": None, "pass_at_k": None}


def test_every_decoding_has_a_name_of_its_own():
    evaluation = Evaluation(remasking_strategy=["sequential"] * 3, top_k=[1, 0, 1], block_size=[4])
    named = named_variants(evaluation)
    assert list(named) == ["sequential-top_k1", "sequential-top_k0", "sequential-top_k1-2"]
    assert [v.top_k for v in named.values()] == [1, 0, 1]


def test_precision_and_threads_are_set_as_in_training(monkeypatch):
    """Before the model is read: training.enable_tf32, one thread on a CPU."""
    called = []

    def read_nothing(*arguments, **options):
        raise InterruptedError

    # Not the main process, which would write.
    accelerator = SimpleNamespace(device=torch.device("cpu"), is_local_main_process=True, is_main_process=False, num_processes=1)
    monkeypatch.setattr(dist, "make_accelerator", lambda config, trains: accelerator)
    monkeypatch.setattr(dist, "set_numerics", lambda config, device: called.append((config, device.type)))
    monkeypatch.setattr(checkpoint, "load_pretrained", read_nothing)
    config = load_config("eval", ["config=configs/tiny_eval.yaml"])
    with pytest.raises(InterruptedError):
        run(config, [])
    assert called == [(config, "cpu")]


@pytest.mark.parametrize("room, other", [("train", "sample"), ("sample", "train")])
def test_sampling_and_training_do_not_know_each_other(room, other):
    """They meet in rl.py and eval.py."""
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert all(name.split(".")[0] != other for name in names), f"{file}: line {node.lineno}"

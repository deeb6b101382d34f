"""Gradient norms by published name: against autograd and rows cut by hand, under the names of the checkpoint that is written."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from common import dist
from common.metrics import MetricsLog, read_gradient_norms
from models.checkpoint import save_pretrained
from models.lora import prepare_for_training
from models.value import VALUE_HEAD
from tests.train.steps import requests_of_every_remainder, rl_config, sample, scored, tiny_model
from train.documents import number
from train.gradient_norms import row_norms
from train.loop import Tables
from train.objectives import OBJECTIVES
from train.packing import build_pack
from train.policy import build_policy, policy_trainer
from train.rl import PolicyUpdate
from train.shared_value import SharedValueUpdate
from train.value import ValueUpdate

EVERY = "logging.gradient_norms_every=1"
MODELS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    # family, changes of the tiny model, settings
    "sdar": ("sdar", {"qk_norm": True}, []),
    "tied head": ("sdar", {"tie_word_embeddings": True}, []),
    "biases": ("dream", {}, []),
    "llada": ("llada", {}, []),
    "lora": ("sdar", {}, ["training.lora.rank=3", "training.lora.target_modules=[q_proj,v_proj,up_proj,down_proj]"]),
}


@pytest.fixture(scope="module")
def rollouts_of():
    """By family."""
    settings = dict(block_size=4, max_tokens=12, strategy="low_confidence_dynamic", threshold=0.4)
    requests = requests_of_every_remainder(4, seed=8, num_samples=3)
    found = {family: scored(sample(tiny_model(7, family), requests, **settings)) for family in ("sdar", "dream", "llada")}
    for rollout in (r for rollouts in found.values() for r in rollouts):
        rollout.reward = rollout.advantage
    return found


def prepared(name: str, *overrides: str) -> tuple[Any, Any]:
    """The model and the config."""
    family, changes, settings = MODELS[name]
    config = rl_config(EVERY, "rollout.max_token=12", *settings, *overrides, family=family)
    model = tiny_model(7, family, **changes)
    prepare_for_training(model, config.training.lora, "base", config.training.seed)
    if model.adapter is not None:  # B is 0 at first, and with it the gradient of A
        generator = torch.Generator().manual_seed(1)
        for parameter in model.decoder.parameters():
            if parameter.requires_grad:
                parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model, config


def names_in(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            names |= set(handle.keys())
    return names


def root_of_squares(norms: dict[str, float]) -> float:
    return math.fsum(norm**2 for norm in norms.values()) ** 0.5


@pytest.mark.parametrize("name", MODELS)
def test_norms_by_hand(accelerator, rollouts_of, name, tmp_path):
    """Many micro-batches and clipping in the trainer; autograd on one pack, and the rows of every name written out, here."""
    model, config = prepared(name, "training.max_tokens_per_microbatch=200", "training.max_grad_norm=1e-3")
    trainer = policy_trainer(model, config, accelerator)
    update = PolicyUpdate(trainer, config, model.fill_id)
    documents = update.documents(rollouts_of[MODELS[name][0]], 1)
    size = len(number(documents))
    assert len(trainer.micro_batches(documents)) > 2
    weights = np.random.default_rng(0).normal(size=size) / size
    # All from the weights before the step.
    twin, _ = prepared(name)
    policy = build_policy(twin, config, 1.0)
    pack = build_pack(documents, twin.mask_id, 1, twin.family.logit_shift, False)
    loss = -(policy(pack)[0] * torch.from_numpy(weights[pack.prediction]).float()).sum()
    trained = {n: p for n, p in twin.decoder.named_parameters() if p.requires_grad}
    gradients = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))

    result = trainer.step(documents, Tables(np.zeros(size), weights, np.zeros(size)), OBJECTIVES.get("likelihood"), 0.0)
    (row,) = trainer.gradient_norms.take()
    assert trainer.gradient_norms.take() == [] and row["optimizer_step"] == 1
    assert root_of_squares(row["norms"]) == pytest.approx(result.gradient_norm, rel=1e-5)
    assert result.gradient_norm > config.training.max_grad_norm, "not clipped: nothing shows that it is measured before"

    save_pretrained(model, dict(model.decoder.named_parameters()), tmp_path / "saved")
    assert row["norms"].keys() == names_in(tmp_path / "saved")
    by_hand = hand_made(name, gradients)
    for published, norm in by_hand.items():
        assert row["norms"][published] == pytest.approx(float(norm), rel=1e-5, abs=1e-9), published
    whole = root_of_squares({n: float(g.double().norm()) for n, g in gradients.items()})
    assert whole == pytest.approx(result.gradient_norm, rel=1e-5)


def hand_made(name: str, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the last layer, and of embedding and head: 4 heads of queries, 2 of keys and values, of 16; 192 rows of gate and of up."""
    layer, norms = "layers.1", {}
    if name == "lora":
        for target, part, place in [("q_proj", "self_attn", "attention.qkv"), ("down_proj", "mlp", "mlp.down")]:
            for kind in "AB":
                own = gradients[f"{layer}.{place}.adapters.{target}.{kind}"]
                norms[f"base_model.model.model.layers.1.{part}.{target}.lora_{kind}.weight"] = own.norm()
        return norms
    qkv, gate_up = gradients[f"{layer}.attention.qkv.weight"], gradients[f"{layer}.mlp.gate_up.weight"]
    assert qkv.shape == (128, 64) and gate_up.shape == (384, 64)
    q, k, v, gate, up = qkv[:64], qkv[64:96], qkv[96:], gate_up[:192], gate_up[192:]
    if name == "llada":
        block = "model.transformer.blocks.1"
        parts = {"q_proj": q, "k_proj": k, "v_proj": v, "ff_proj": gate, "up_proj": up}
        norms = {f"{block}.{part}.weight": rows.norm() for part, rows in parts.items()}
        norms[f"{block}.ff_out.weight"] = gradients[f"{layer}.mlp.down.weight"].norm()
        return norms | {
            "model.transformer.wte.weight": gradients["embed.weight"].norm(),
            "model.transformer.ff_out.weight": gradients["lm_head.weight"].norm(),
        }
    block = "model.layers.1"
    norms = {f"{block}.self_attn.{part}_proj.weight": rows.norm() for part, rows in {"q": q, "k": k, "v": v}.items()}
    norms |= {f"{block}.mlp.{part}_proj.weight": rows.norm() for part, rows in {"gate": gate, "up": up}.items()}
    norms[f"{block}.input_layernorm.weight"] = gradients[f"{layer}.attention_norm.weight"].norm()
    norms["model.embed_tokens.weight"] = gradients["embed.weight"].norm()
    if name == "biases":
        bias = gradients[f"{layer}.attention.qkv.bias"]
        parts = {"q": bias[:64], "k": bias[64:96], "v": bias[96:]}
        norms |= {f"{block}.self_attn.{part}_proj.bias": rows.norm() for part, rows in parts.items()}
    if name == "sdar":
        norms[f"{block}.self_attn.k_norm.weight"] = gradients[f"{layer}.attention.k_norm.weight"].norm()
    if name == "tied head":
        assert "lm_head.weight" not in gradients
    else:
        norms["lm_head.weight"] = gradients["lm_head.weight"].norm()
    return norms


@pytest.mark.parametrize("settings", [[], ["training.lora.rank=3"]], ids=["whole", "lora"])
def test_the_value_model(accelerator, rollouts_of, settings, tmp_path):
    """Its own optimizer steps, under the names of its own checkpoint."""
    base = tiny_model(7)
    save_pretrained(base, dict(base.decoder.named_parameters()), tmp_path / "base")
    names = ["model.pretrained_model", "model.value_base_model"]
    critic = [*(f"{name}={tmp_path / 'base'}" for name in names), "training.num_updates_per_step=2"]
    config = rl_config(EVERY, "rollout.max_token=12", *critic, *settings)
    model = tiny_model(7)
    prepare_for_training(model, config.training.lora, "base", config.training.seed)
    value = ValueUpdate(config, dist.value_accelerator(accelerator))
    value.trainer.module.model.head.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    update = PolicyUpdate(policy_trainer(model, config, accelerator), config, model.fill_id, value=value)
    metrics = update(rollouts_of["sdar"], 1)
    value.save_checkpoint(tmp_path / "value")
    for trainer, key in [(update.trainer, "train/gradient_norm"), (value.trainer, "value/gradient_norm")]:
        rows = trainer.gradient_norms.take()
        assert [row["optimizer_step"] for row in rows] == [1, 2]
        assert np.mean([root_of_squares(row["norms"]) for row in rows]) == pytest.approx(metrics[key], rel=1e-5)
    names = names_in(tmp_path / "value")
    assert rows[0]["norms"].keys() == names and any(name.endswith(VALUE_HEAD) for name in names)


def test_a_shared_value_head(accelerator, rollouts_of):
    config = rl_config(EVERY, "rollout.max_token=12", "model.value_shared=true")
    model = tiny_model(7)
    trainer = policy_trainer(model, config, accelerator)
    update = PolicyUpdate(trainer, config, model.fill_id, value=SharedValueUpdate(trainer, config))
    metrics = update(rollouts_of["sdar"], 1)
    (row,) = trainer.gradient_norms.take()
    assert row["norms"][VALUE_HEAD] > 0 and root_of_squares(row["norms"]) == pytest.approx(metrics["train/gradient_norm"], rel=1e-5)


@pytest.mark.parametrize("every, measured", [(None, []), (2, [2, 4])])
def test_every_so_many_optimizer_steps(accelerator, rollouts_of, every, measured, monkeypatch):
    """Off, no gradient is looked at."""
    calls, original = [], dist.full_gradients
    monkeypatch.setattr(dist, "full_gradients", lambda *arguments: calls.append(None) or original(*arguments))
    config = rl_config(f"logging.gradient_norms_every={every or 'null'}", "rollout.max_token=12", "training.num_updates_per_step=5")
    model = tiny_model(7)
    trainer = policy_trainer(model, config, accelerator)
    PolicyUpdate(trainer, config, model.fill_id)(rollouts_of["sdar"], 1)
    assert trainer.num_steps == 5
    assert [row["optimizer_step"] for row in trainer.gradient_norms.take()] == measured and len(calls) == len(measured)


def test_row_norms_of_many_entries_and_of_bfloat16():
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(3000, 500, generator=generator) * 10 ** torch.empty(3000, 1).uniform_(-6, 2, generator=generator)
    norm = gradient.double().norm()
    assert float(row_norms(gradient).norm() / norm) == pytest.approx(1, rel=1e-7)
    rounded = gradient.bfloat16()
    assert float(row_norms(rounded).norm() / rounded.double().norm()) == pytest.approx(1, rel=1e-7)
    assert row_norms(torch.tensor([3.0, -4.0])).tolist() == [3.0, 4.0]


def test_the_file(tmp_path, capsys):
    """Lines are cut back with those of the metrics; what is not finite is null and named."""
    log = MetricsLog(tmp_path, SimpleNamespace())
    for step in (1, 2, 3):
        log.write_gradient_norms(step, "policy", 2 * step, {"a.weight": step / 3, "b.weight": 0.0})
        log.write(step, {"train/loss": 1.0})
    whole = (tmp_path / "gradient_norms.jsonl").read_bytes()
    with open(tmp_path / "gradient_norms.jsonl", "ab") as file:
        file.write(b'{"step": 4, "norm')  # killed while writing
    resumed = MetricsLog(tmp_path, SimpleNamespace())
    assert (tmp_path / "gradient_norms.jsonl").read_bytes() == whole
    resumed.truncate_after(2)
    rows = [{"step": n, "model": "policy", "optimizer_step": 2 * n, "norms": {"a.weight": n / 3, "b.weight": 0.0}} for n in (1, 2)]
    assert read_gradient_norms(tmp_path) == rows
    assert capsys.readouterr() == ("", "")
    resumed.write_gradient_norms(3, "policy", 6, {"a.weight": math.nan, "b.weight": math.inf, "c.weight": 1.0})
    assert read_gradient_norms(tmp_path)[2]["norms"] == {"a.weight": None, "b.weight": None, "c.weight": 1.0}
    expected = "warning: step 3: gradients of 2 of 3 tensors of the policy are not finite, first a.weight's\n"
    assert capsys.readouterr().err == expected
    MetricsLog(tmp_path / "other", SimpleNamespace(), is_main=False).write_gradient_norms(1, "policy", 1, {"a": 1.0})
    assert not (tmp_path / "other").exists()

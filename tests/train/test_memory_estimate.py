"""The estimate against measured peaks, against a real model's tensors, and against the engines' own constants; what it refuses."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.shapes import SHAPES
from common.errors import UserError
from configs.load import load_config
from models.decoder import rope_cos_sin
from models.family import DecoderConfig
from models.lora import LoRA, attach
from models.lora_targets import resolve_targets
from models.registry import FAMILIES
from models.tiny import build_tiny
from sample import canvas_cache, capacity, paged_block, paged_state, pages
from tests.distributed.harness import ROOT, clean_environment
from train import loop, memory_estimate, memory_items, run
from train.memory_estimate import check_fits, setup_of
from train.memory_items import GIB, Setup, estimate, num_parameters, states, total_bytes

EIGHT_B = SHAPES["sdar-8b"]
SDAR = FAMILIES.get("sdar")
H200 = 139.8 * GIB


def update_bytes(s: Setup) -> float:
    """What torch counts."""
    return sum(item.update for item in estimate(s))


# ---- measured on one H200


def plain(layers: int, **changes) -> Setup:
    """Forward and backward alone, no optimizer: the benchmarks."""
    shape = dataclasses.replace(EIGHT_B, num_layers=layers)
    return Setup(shape, itemsize=2, gpus=1, zero=0, moments=0, samples=False, **changes)


@pytest.mark.parametrize("recomputes", [False, True])
def test_the_peak_of_a_packed_update(recomputes):
    """Two kinds of responses, packs of a budget of 16,384 tokens of which the largest was full (the packs of then were filled one
    after the other); 16,000 predictions in four of them."""
    baseline = json.loads((ROOT / "benchmarks/baselines/train_step_sdar-8b.json").read_text())
    assert baseline["results"]
    for result in baseline["results"]:
        s = plain(result["layers"], recomputes=recomputes, tokens=16_384, predictions=5_000)
        measured = result["packed_recompute_peak_gib" if recomputes else "packed_plain_peak_gib"]
        assert update_bytes(s) / GIB == pytest.approx(measured, rel=0.1)


def test_the_peak_of_one_long_response():
    """One micro-batch, so that gradients appear during the backward."""
    points = json.loads((ROOT / "benchmarks/baselines/sft_long.json").read_text())["points"]
    assert len(points) == 3
    for point in points:
        s = plain(point["layers"], tokens=point["tokens"], predictions=point["tokens"] // 4, accumulates=False)
        measured = point["beside"] + 2 * 2 * (num_parameters(s.shape) - norms(s.shape))
        assert update_bytes(s) == pytest.approx(measured, rel=0.1)


def norms(c: DecoderConfig) -> int:
    """sft_long does not count them."""
    return c.num_layers * (2 * c.hidden_size + 2 * c.head_dim) + c.hidden_size


# ---- against the real thing


@pytest.mark.parametrize("name", ["sdar", "dream", "llada"])
def test_parameters_are_those_of_the_decoder(name):
    model = build_tiny(FAMILIES.get(name))
    assert num_parameters(model.decoder.config) == sum(p.numel() for p in model.decoder.parameters())
    lora = LoRA("base", rank=3, alpha=6, targets=targets_of(name))
    attach(model.decoder, model.family, lora)
    trained = sum(p.numel() for p in model.decoder.parameters() if p.requires_grad)
    assert memory_items.adapter_parameters(model.family, model.decoder.config, 3, ["all-linear"]) == trained


def targets_of(name: str) -> tuple[str, ...]:
    return resolve_targets(FAMILIES.get(name), ["all-linear"])


def test_published_sizes():
    assert num_parameters(SHAPES["sdar-8b"]) == pytest.approx(8.19e9, rel=1e-3)
    assert num_parameters(SHAPES["sdar-1.7b"]) == pytest.approx(1.72e9, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trains", [True, False])
def test_what_a_layer_keeps_is_what_autograd_holds(dtype, trains):
    """Bytes of all storages that a layer's backward holds, weights, masks and rotary tables aside. The attention here is a stand-in
    that keeps what a fused one does: q, k, v and its output (and no log-sum)."""
    decoder = build_tiny(SDAR, dtype=dtype, intermediate_size=160).decoder
    c, layer, n = decoder.config, decoder.layers[0], 256
    if not trains:
        attach(decoder, SDAR, LoRA("base", rank=2, alpha=2, targets=targets_of("sdar")))
    x = torch.randn(n, c.hidden_size, dtype=dtype, requires_grad=True)
    cos, sin = rope_cos_sin(torch.arange(n), c.head_dim, 1e4, dtype)
    own = {p.untyped_storage().data_ptr() for p in [*layer.parameters(), cos, sin]}
    held: dict[int, torch.UntypedStorage] = {}

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.numel() > n * c.num_heads:  # not a norm's number per row or head
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        y = layer(x, cos, sin, 0, lambda layer, q, k, v: Fused.apply(q, k, v))
    kept = sum(storage.nbytes() for storage in held.values()) / n
    expected = memory_items.kept_per_token(c, dtype.itemsize, trains) - 4 * c.num_heads
    assert kept == expected
    assert y.requires_grad


def test_fused_kernels_keep_less_by_hand():
    """What models/kernels/{norms,rotary,swiglu}.py save, per token of the 8B shape in bfloat16; and the head without its copies."""
    norms, attention, mlp = 2 * 2 * 8192, 2 * (4096 + 2048) + 2 * (4096 + 1024) + 8192 + 4 * 32, 3 * 2 * 12_288
    assert memory_items.kept_per_token(EIGHT_B, 2, fused=True) == norms + attention + mlp
    chunk, vocabulary = 4 * 2048 * 151_936, 151_936 * 4096
    assert memory_items.head_bytes(EIGHT_B, 2, 2048, fused=True) == 4 * vocabulary + 2 * chunk
    assert memory_items.head_bytes(EIGHT_B, 2, 2048) == 4 * vocabulary + 9 * chunk // 2
    assert memory_items.head_bytes(EIGHT_B, 2, 256) == (4 + 2) * vocabulary
    assert memory_items.head_bytes(EIGHT_B, 2, 2048, trains=False, fused=True) == 2 * chunk


class Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.zeros_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


def test_constants_of_the_other_rooms():
    assert memory_items.PAGE == pages.PAGE
    assert memory_items.PREFILL_TOKENS == paged_block.PREFILL_TOKENS
    assert memory_items.RESULT_POSITIONS == paged_state.RESULT_POSITIONS
    assert memory_items.LOGITS == capacity.LOGITS
    assert memory_items.CANVAS_LOGITS_BYTES == canvas_cache.LOGITS_BYTES
    assert memory_items.TILE == loop.TILE


# ---- by hand


def test_states_of_every_stage_by_hand():
    """1,000 parameters in bfloat16, all trained, four GPUs, AdamW; 100 of them in the largest tensor."""

    def of(zero: int, **changes):
        s = Setup(SHAPES["tiny"], itemsize=changes.pop("itemsize", 2), gpus=4, zero=zero, **changes)
        return states(s, 1000, 1000, 100)

    one, two, three = of(1), of(2), of(3)
    assert (one.weights, one.gradients, one.optimizer, one.fresh) == (2000, 4000, 3000, 2)
    assert (two.weights, two.gradients, two.gradients_at_rest, two.optimizer, two.fresh) == (2000, 1000, 0, 3000, 0)
    assert (three.weights, three.gradients, three.gradients_at_rest, three.optimizer) == (500, 1000, 1000, 3000)
    assert two.step == 1000 and of(2, moments=0).step == 0 and of(2, moments=0).optimizer == 1000
    host = of(2, offload_optimizer=True)
    assert (host.optimizer, host.gradients, host.weights) == (0, 1000, 2000)
    ddp = of(0, itemsize=4)
    assert (ddp.weights, ddp.gradients, ddp.gradients_at_rest, ddp.optimizer) == (4000, 4000, 4000, 8000)


def test_more_gpus_and_cheaper_settings_take_less():
    base = Setup(EIGHT_B, 2, gpus=2, zero=2)
    order = [Setup(EIGHT_B, 2, gpus=1, zero=2), base, dataclasses.replace(base, gpus=4), dataclasses.replace(base, gpus=8)]
    sizes = [total_bytes(s) for s in order]
    assert sizes == sorted(sizes, reverse=True)
    large = dataclasses.replace(base, tokens=32_768, predictions=16_000, recomputes=False)
    names = [name for name, other in memory_estimate.alternatives(large) if total_bytes(other) < total_bytes(large)]
    # ZeRO-3 does not pay here: an engine with weights of its own comes with it.
    assert "training.gradient_checkpointing_enable=true" in names and "training.max_tokens_per_microbatch=2048" in names
    assert "training.lora.rank=32" in names and "8 GPUs with ZeRO-3" in names and "ZeRO-3 (experiment.deepspeed_file)" not in names


def test_a_value_model_and_a_reference_are_counted():
    base = Setup(EIGHT_B, 2, gpus=8, zero=2)
    critic = num_parameters(EIGHT_B, has_head=False)
    both = dataclasses.replace(base, value=EIGHT_B, has_reference=True)
    extra = update_bytes(both) - update_bytes(base)
    assert extra == pytest.approx(critic * (2 + 12 / 8 + 4 / 8) + 2 * num_parameters(EIGHT_B))
    resting = dataclasses.replace(both, value_rests=True)
    rollout = [sum(item.rollout for item in estimate(s)) for s in (both, resting)]
    assert rollout[0] - rollout[1] == pytest.approx(critic * (2 + 12 / 8))
    assert update_bytes(resting) == update_bytes(both)


# ---- what is refused, and how


def test_what_cannot_fit_is_refused_with_what_would_fit():
    with pytest.raises(UserError) as refusal:
        check_fits(Setup(EIGHT_B, 2, gpus=1, zero=1), H200)
    message = str(refusal.value)
    assert "\n" not in message and "optimizer states 92" in message
    assert "training.lora.rank=32" in message and "2 GPUs with ZeRO-3" in message and "experiment.check_memory=false" in message
    with pytest.raises(UserError, match="What fits: training.gradient_checkpointing_enable=true"):
        check_fits(Setup(EIGHT_B, 2, gpus=8, zero=2, tokens=65_536, predictions=30_000, recomputes=False), H200)
    check_fits(Setup(EIGHT_B, 2, gpus=2, zero=2), H200)
    check_fits(Setup(EIGHT_B, 2, gpus=8, zero=3), 80 * GIB)


def test_a_tight_one_is_warned_of(capsys):
    s = Setup(EIGHT_B, 2, gpus=8, zero=2)
    check_fits(s, total_bytes(s) * 1.1)
    assert not capsys.readouterr().err
    check_fits(s, total_bytes(s) * 0.95)
    assert "memory" in capsys.readouterr().err


@pytest.mark.parametrize("name, zero, adapter", [("rl_sdar", 3, False), ("rl_lora", 2, True), ("rl_trado_with_value", 3, False)])
def test_the_setup_of_a_config(name, zero, adapter):
    config = load_config("rl", [f"config=configs/{name}.yaml"])
    s = setup_of(config, "rl", SDAR, EIGHT_B, 8, H200, EIGHT_B if config.model.value_base_model else None)
    assert (s.zero, s.itemsize, s.gpus, bool(s.adapter)) == (zero, 2, 8, adapter)
    assert s.tokens == config.training.max_tokens_per_microbatch and s.response == config.rollout.max_token
    check_fits(s, H200)
    with pytest.raises(UserError):
        check_fits(s, 12 * GIB)


def test_finetuning_samples_only_to_evaluate():
    """Under ZeRO-3 the evaluator's engine has weights of its own."""

    def names(*overrides: str) -> set[str]:
        config = load_config("sft", ["config=configs/sft_sdar.yaml", *overrides])
        return {item.name for item in estimate(setup_of(config, "sft", SDAR, EIGHT_B, 8, H200))}

    assert "the engine's own weights" not in names("dataset.eval_dataset=null")
    assert "the engine's own weights" in names("dataset.eval_dataset=MATH500")


def test_a_start_on_a_gpu_says_the_table_and_refuses(monkeypatch, capsys):
    """Run.check_memory with a GPU that is not there; the model's weights need not be either."""
    config = load_config("rl", ["config=configs/rl_sdar.yaml", "experiment.deepspeed_file=1_node_1_gpus_deepspeed_zero2"])
    model = SimpleNamespace(family=SDAR, decoder=SimpleNamespace(config=EIGHT_B))
    accelerator = SimpleNamespace(device=torch.device("cuda"), num_processes=1)
    job = SimpleNamespace(config=config, accelerator=accelerator, is_main=True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=int(H200)))
    with pytest.raises(UserError, match="memory: about 1[67]. GiB"):
        run.Run.check_memory(job, model, samples=True)
    assert "optimizer states" in capsys.readouterr().out
    config.experiment.check_memory = False
    run.Run.check_memory(job, model, samples=True)


def test_the_command(tmp_path):
    """Without a GPU and without torch."""
    (tmp_path / "config.json").write_text(json.dumps({**SDAR.config_json(EIGHT_B), "model_type": "sdar"}))
    line = [sys.executable, "-m", "train.memory_estimate", "config=configs/rl_sdar.yaml", f"model.pretrained_model={tmp_path}"]
    probe = "import sys; import train.memory_estimate as m; m.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    environment = clean_environment()
    good = subprocess.run(
        [sys.executable, "-c", probe, *line[3:], "gpus=8", "gpu_gib=139"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert good.returncode == 0, good.stderr
    assert "8 GPUs, ZeRO-3" in good.stdout and "of 139.0" in good.stdout
    bad = subprocess.run([*line, "gpus=1", "gpu_gib=80"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert bad.returncode == 2 and len(bad.stderr.splitlines()) == 1 and "What fits" in bad.stderr

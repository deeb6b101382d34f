"""The estimate against measured peaks, against a real model's tensors, and against the engines' own constants; what it refuses."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType

from benchmarks.shapes import SHAPES
from common.errors import UserError
from configs.load import load_config
from models import attention, lora, row_length
from models.decoder import rope_cos_sin
from models.family import DecoderConfig
from models.lora import LoRA, attach
from models.lora_targets import resolve_targets
from models.registry import FAMILIES
from models.tiny import build_tiny
from sample import canvas_cache, kv_cache, paged_block, paged_cache, paged_state, pages
from tests.distributed.harness import ROOT, clean_environment
from tests.models.test_recomputation import Fused
from tests.train.steps import forget_accelerator, rl_config
from train import loop, memory_engine, memory_estimate, memory_items, memory_setup, run
from train.layout import Layout
from train.memory_estimate import check_fits, main, read_shape, setup_of
from train.memory_items import GIB, MARGIN, choose_recomputed, estimate, states, total_bytes, update_bytes
from train.memory_setup import Setup, num_parameters
from train.packing import assign, num_tokens
from train.sft_data import as_response

EIGHT_B = SHAPES["sdar-8b"]
SDAR = FAMILIES.get("sdar")
H200 = 139.8 * GIB


def torch_bytes(s: Setup) -> float:
    """What torch counts."""
    return sum(item.update for item in estimate(s))


# ---- measured on one H200


def plain(layers: int, **changes) -> Setup:
    """Forward and backward alone, no optimizer: the benchmarks."""
    shape = dataclasses.replace(EIGHT_B, num_layers=layers)
    return Setup(shape, itemsize=2, gpus=1, zero=0, moments=0, samples=False, **changes)


PEAKS = [("packed_peak_gib", True, 0), ("packed_recompute_peak_gib", True, None), ("packed_plain_torch_peak_gib", False, 0)]


@pytest.mark.parametrize("field, fused, recomputed_layers", PEAKS)
def test_the_peak_of_a_packed_update(field, fused, recomputed_layers):
    """Packs are filled evenly: the largest has 1% more tokens than the mean."""
    baseline = json.loads((ROOT / "benchmarks/baselines/train_step_sdar-8b.json").read_text())
    results = [r for r in baseline["results"] if "packed_plain_torch_peak_gib" in r]  # not those of parts of an update
    assert results
    for r in results:
        num_trained = r["responses"] * r["mean_response"]
        tokens = r["packed_tokens_per_response_token"] * num_trained / r["num_packs"] / (1 - r["filler_share"])
        s = plain(r["layers"], fused=fused, recomputed_layers=recomputed_layers, tokens=round(tokens))
        s = dataclasses.replace(s, predictions=round(num_trained / r["num_packs"]))
        assert torch_bytes(s) / GIB == pytest.approx(r[field], rel=0.1)


def test_the_peak_of_one_long_response():
    """One micro-batch, so that gradients appear during the backward."""
    points = json.loads((ROOT / "benchmarks/baselines/sft_long.json").read_text())["points"]
    assert len(points) == 3
    for point in points:
        s = plain(point["layers"], tokens=point["tokens"], predictions=point["tokens"] // 4, accumulates=False)
        measured = point["beside"] + 2 * 2 * (num_parameters(s.shape) - norms(s.shape))
        assert torch_bytes(s) == pytest.approx(measured, rel=0.1)


def norms(c: DecoderConfig) -> int:
    """sft_long does not count them."""
    return c.num_layers * (2 * c.hidden_size + 2 * c.head_dim) + c.hidden_size


# ---- against the real thing


@pytest.mark.parametrize("name", ["sdar", "dream", "llada"])
def test_parameters_are_those_of_the_decoder(name):
    model = build_tiny(FAMILIES.get(name))
    assert num_parameters(model.decoder.config) == sum(p.numel() for p in model.decoder.parameters())
    attach(model.decoder, model.family, LoRA("base", rank=3, alpha=6, targets=targets_of(name)))
    trained = sum(p.numel() for p in model.decoder.parameters() if p.requires_grad)
    assert memory_setup.adapter_parameters(model.family, model.decoder.config, 3, ["all-linear"]) == trained


def targets_of(name: str) -> tuple[str, ...]:
    return resolve_targets(FAMILIES.get(name), ["all-linear"])


def test_published_sizes():
    assert num_parameters(SHAPES["sdar-8b"]) == pytest.approx(8.19e9, rel=1e-3)
    assert num_parameters(SHAPES["sdar-1.7b"]) == pytest.approx(1.72e9, rel=1e-3)


ADAPTED = {
    "": (),
    "all-linear": ("attention.qkv.weight", "attention.out.weight", "mlp.gate_up.weight", "mlp.down.weight"),
    "q_proj v_proj": ("attention.qkv.weight",),
    "k_proj o_proj": ("attention.qkv.weight", "attention.out.weight"),
    "o_proj": ("attention.out.weight",),
    "gate_proj": ("mlp.gate_up.weight",),
    "up_proj down_proj": ("mlp.gate_up.weight", "mlp.down.weight"),
}
"""Layers with adapters, by the targets; without any all weights train."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets, drops", [("", False), *((t, drops) for t in ADAPTED if t for drops in (False, True))])
def test_what_a_layer_keeps_is_what_autograd_holds(dtype, targets, drops, monkeypatch):
    """Bytes of all storages that a layer's backward holds, weights, masks and rotary tables aside. The attention here is a stand-in
    that keeps what a fused one does: q, k, v and its output (and no log-sum). Dropout is the function that a GPU has, with a mask
    of bytes."""
    adapted = ADAPTED[targets]
    monkeypatch.setattr(lora.F, "dropout", lambda x, share: torch.native_dropout(x, share, True)[0])
    decoder = build_tiny(SDAR, dtype=dtype, intermediate_size=160).decoder
    c, layer, n = decoder.config, decoder.layers[0], 256
    if adapted:
        assert memory_setup.adapted_weights(SDAR, targets.split()) == adapted
        attach(decoder, SDAR, LoRA("base", rank=2, alpha=2, targets=resolve_targets(SDAR, targets.split())))
        for linear in lora.lora_layers(decoder).values():
            linear.dropout = 0.05 if drops else 0.0
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
    expected = memory_items.kept_per_token(c, dtype.itemsize, adapted=adapted, drops=drops) - 4 * c.num_heads
    assert kept == expected
    assert y.requires_grad


def test_fused_kernels_keep_less_by_hand():
    """What models/kernels/{norms,rotary,swiglu}.py save, per token of the 8B shape in bfloat16; and the head without its copies."""
    norms, attention, mlp = 2 * 2 * 8192, 2 * (4096 + 2048) + 2 * (4096 + 1024) + 8192 + 4 * 32, 3 * 2 * 12_288
    assert memory_items.kept_per_token(EIGHT_B, 2, fused=True) == norms + attention + mlp
    adapted = ("attention.qkv.weight",)  # who reads neither the result of the other norm nor the product of silu(gate) and up
    assert memory_items.kept_per_token(EIGHT_B, 2, True, adapted) == norms + attention + mlp - 2 * (4096 + 12_288)
    chunk, vocabulary = 4 * 2048 * 151_936, 151_936 * 4096
    assert memory_items.head_bytes(EIGHT_B, 2, 5000, 2048, fused=True) == 4 * vocabulary + 3 * chunk // 2
    assert memory_items.head_bytes(EIGHT_B, 2, 5000, 2048) == 4 * vocabulary + 4 * chunk
    assert memory_items.head_bytes(EIGHT_B, 2, 5000, 256) == (4 + 2) * vocabulary
    assert memory_items.head_bytes(EIGHT_B, 2, 5000, 2048, trains=False, fused=True) == 3 * chunk // 2
    assert memory_items.head_bytes(EIGHT_B, 2, 2048, 2048, trains=False, fused=True) == 3 * chunk // 2
    assert memory_items.head_bytes(EIGHT_B, 2, 1024, 2048, trains=False, fused=True) == 3 * chunk // 4


def test_constants_of_the_other_rooms():
    assert memory_engine.PAGE == pages.PAGE
    assert memory_engine.PREFILL_TOKENS == paged_block.PREFILL_TOKENS
    assert memory_engine.SMALL_STEP == paged_block.SMALL_STEP
    assert memory_engine.RESULT_POSITIONS == paged_state.RESULT_POSITIONS
    assert memory_engine.LOGITS == paged_block.LOGITS
    assert memory_engine.CANVAS_LOGITS_BYTES == canvas_cache.LOGITS_BYTES
    assert memory_engine.ROWS_AT_A_TIME == canvas_cache.ROWS_AT_A_TIME
    assert memory_engine.MEMORY_SHARE == paged_cache.MEMORY_SHARE == kv_cache.MEMORY_SHARE
    assert row_length.TILE == loop.TILE
    lengths = [1, 100, 128, 129, 1024, 1152, 12_416, 16_384, 16_512, 55_808, 65_536, 100_000]
    assert [memory_items.padded_length(n) for n in lengths] == [attention.padded_length(n) for n in lengths]


# ---- by hand


def test_states_of_every_stage_by_hand():
    """1,000 parameters in bfloat16, all trained, four GPUs, AdamW; 100 of them in the largest tensor."""

    def of(zero: int, **changes):
        s = Setup(SHAPES["tiny"], itemsize=changes.pop("itemsize", 2), gpus=4, zero=zero, **changes)
        return states(s, 1000, 1000, 100)

    one, two, three = of(1), of(2), of(3)
    assert (one.weights, one.gradients, one.optimizer, one.fresh) == (2000, 4000, 3000, 2)
    assert (two.weights, two.gradients, two.gradients_in_rollout, two.optimizer, two.fresh) == (2000, 1000, 0, 3000, 0)
    assert (three.weights, three.gradients, three.gradients_in_rollout, three.optimizer) == (500, 1000, 1000, 3000)
    assert two.step == 1000 and of(2, moments=0).step == 0 and of(2, moments=0).optimizer == 1000
    host = of(2, offload_optimizer=True)
    assert (host.optimizer, host.gradients, host.weights) == (0, 1000, 2000)
    for zero, bytes_each in ((1, 0), (2, 4), (3, 2)):  # a copy of the bucket in float32; a bucket of twice the width
        more = of(zero, reduces_in_float32=True)
        assert more.buffers - of(zero).buffers == bytes_each * 5e8
        assert dataclasses.replace(more, buffers=0) == dataclasses.replace(of(zero), buffers=0)
        assert of(zero, itemsize=4, reduces_in_float32=True) == of(zero, itemsize=4)
    ddp = of(0, itemsize=4)
    assert (ddp.weights, ddp.gradients, ddp.gradients_in_rollout, ddp.optimizer) == (4000, 8000, 4000, 8000)
    assert of(0, itemsize=4, accumulates=False).gradients == 4000
    one = states(Setup(SHAPES["tiny"], itemsize=4, gpus=1, zero=0), 1000, 1000, 100)
    assert (one.gradients, one.gradients_in_rollout, one.fresh) == (4000, 0, 0)


def test_more_gpus_and_cheaper_settings_take_less():
    base = Setup(EIGHT_B, 2, gpus=2, zero=2)
    order = [Setup(EIGHT_B, 2, gpus=1, zero=2), base, dataclasses.replace(base, gpus=4), dataclasses.replace(base, gpus=8)]
    sizes = [total_bytes(s) for s in order]
    assert sizes == sorted(sizes, reverse=True)
    large = dataclasses.replace(base, tokens=32_768, predictions=16_000, recomputed_layers=20)
    names = [name for name, other in memory_estimate.alternatives(large) if total_bytes(other) < total_bytes(large)]
    # ZeRO-3 does not pay here: an engine with weights of its own comes with it.
    assert "training.gradient_checkpointing_enable=true" in names and "training.max_tokens_per_microbatch=2048" in names
    assert "training.lora.rank=32" in names and "8 GPUs with ZeRO-3" in names and "ZeRO-3 (experiment.deepspeed_file)" not in names


def test_a_value_model_and_a_reference_are_counted():
    base = Setup(EIGHT_B, 2, gpus=8, zero=2)
    critic = num_parameters(EIGHT_B, has_head=False)
    both = dataclasses.replace(base, value=EIGHT_B, has_reference=True)
    extra = torch_bytes(both) - torch_bytes(base)
    assert extra == pytest.approx(critic * (2 + 12 / 8 + 4 / 8) + 2 * num_parameters(EIGHT_B))
    offloaded = dataclasses.replace(both, value_offloaded_in_rollout=True)
    rollout = [sum(item.rollout for item in estimate(s)) for s in (both, offloaded)]
    assert rollout[0] - rollout[1] == pytest.approx(critic * (2 + 12 / 8))
    assert torch_bytes(offloaded) == torch_bytes(both)
    # ZeRO-3: a bucket of the value model's own, which holds its largest tensor, the embedding, and goes to the host with the rest.
    three = dataclasses.replace(both, zero=3)
    buckets = 2 * 151_936 * 4096 + 4 * 151_936 * 4096 / 8
    item = next(item for item in estimate(three) if item.name == "value model")
    assert item.update == item.rollout == pytest.approx(critic * (2 / 8 + 12 / 8 + 4 / 8) + buckets)
    assert buckets / GIB == pytest.approx(1.45, abs=0.01)
    offloaded = dataclasses.replace(three, value_offloaded_in_rollout=True)
    assert next(item.rollout for item in estimate(offloaded) if item.name == "value model") == 0
    # ZeRO-2: a bucket at a time, the wider one.
    small = dataclasses.replace(SHAPES["tiny"], vocab_size=151_936)
    one = {item.name: item.update for item in estimate(Setup(small, 2, gpus=8, zero=2, value=EIGHT_B))}
    assert one["DeepSpeed's buckets"] == buckets
    ddp = dataclasses.replace(both, zero=0, itemsize=4, value_offloaded_in_rollout=True)  # whose buckets are out of reach
    assert {item.name: item.rollout for item in estimate(ddp)}["value model"] == 4 * critic


# ---- how many layers are recomputed


CHOOSING = {
    "ZeRO-2": Setup(EIGHT_B, 2, gpus=2, zero=2, fused=True),
    "ZeRO-1, gradients beside their sum": Setup(SHAPES["sdar-1.7b"], 2, gpus=1, zero=1, tokens=65_536, predictions=30_000),
    "ZeRO-3, a value model": Setup(EIGHT_B, 2, gpus=8, zero=3, value=EIGHT_B, tokens=65_536, predictions=30_000, fused=True),
    "adapter, nothing sampled": Setup(
        EIGHT_B, 2, gpus=1, zero=2, adapter=40_000_000, adapted=ADAPTED["all-linear"], samples=False, tokens=32_768
    ),
}


@pytest.mark.parametrize("name", CHOOSING)
def test_the_fewest_layers_that_fit_are_recomputed(name):
    """Against all numbers of layers one by one, for GPUs of all sizes; more memory never means more recomputation."""
    s = CHOOSING[name]
    needed = [update_bytes(dataclasses.replace(s, recomputed_layers=n)) for n in range(s.shape.num_layers + 1)]
    assert needed[-1] == update_bytes(s) < needed[0]
    before, seen = s.shape.num_layers, set()
    for gib in range(10, 700, 5):
        chosen = choose_recomputed(s, gib * GIB)
        number = chosen.num_recomputed
        assert dataclasses.replace(chosen, recomputed_layers=None) == s
        fitting = [n for n, size in enumerate(needed) if size <= 0.9 * gib * GIB]
        assert number == (fitting[0] if fitting else s.shape.num_layers) <= before
        before = number
        seen.add(number)
    assert {0, s.shape.num_layers} < seen and len(seen) > 5


def test_activations_by_moment_by_hand():
    """10 layers, 120 tokens filled up to 128 for attention, ZeRO-1: gradients in bfloat16 appear from the last layer on."""
    shape = dataclasses.replace(SHAPES["tiny"], num_layers=10)
    # q and the output 4 heads of 16, k and v 2.
    kept = 120 * memory_items.kept_per_token(shape, 2) + 8 * 2 * 2 * (64 + 32)
    working, hidden = 120 * memory_items.backward_per_token(shape, 2), 120 * 2 * 64
    vocabulary, layer = 2 * 160 * 64, 2 * memory_setup.layer_parameters(shape)

    def of(recomputed_layers: int | None, **changes) -> dict[str, tuple[float, float, float]]:
        s = Setup(shape, 2, gpus=1, zero=1, tokens=120, predictions=50, recomputed_layers=recomputed_layers, **changes)
        return memory_items.moments_of_update(s, states(s, num_parameters(shape), num_parameters(shape), 160 * 64))

    none, some, every = of(0), of(3), of(None)
    assert "last recomputed layer" not in none
    assert none["last layer"] == (vocabulary, 10 * kept + working, 0)
    assert none["first layer"] == (vocabulary + 9 * layer, kept + working, 0)
    assert some["last layer"] == (vocabulary, 7 * kept + 3 * hidden + working, 0)
    assert some["last recomputed layer"] == (vocabulary + 7 * layer, 3 * hidden + kept + working, 0)
    assert some["first layer"] == every["first layer"] == (vocabulary + 9 * layer, hidden + kept + working, 0)
    assert every["last recomputed layer"] == (vocabulary, 10 * hidden + kept + working, 0)
    assert none["head"][1] - some["head"][1] == 3 * (kept - hidden)
    assert of(10) == every
    fused = 120 * memory_items.kept_per_token(shape, 2, fused=True)
    assert of(0, fused=True, attention="full")["first layer"][1] == fused + working
    assert of(0, fused=True)["first layer"][1] == fused + working + 8 * 2 * 2 * (64 + 32) + 120 * 2 * 32  # and a copy of v


def test_a_value_model_keeps_as_many_layers_as_the_policy():
    s = Setup(EIGHT_B, 2, gpus=1, zero=1, recomputed_layers=26)  # of 36: 10 are kept
    assert [s.recomputed_of(depth) for depth in (36, 28, 10, 4, 40)] == [26, 18, 0, 0, 30]
    assert [dataclasses.replace(s, recomputed_layers=None).recomputed_of(depth) for depth in (36, 28, 40)] == [36, 28, 40]


def test_a_value_model_may_have_the_fullest_moment():
    """One of 8B beside a policy of 1.7B: its layers keep more, so more of them are recomputed; one of the policy's size changes
    nothing but by its states."""
    small = SHAPES["sdar-1.7b"]
    s = Setup(small, 2, gpus=8, zero=2, fused=True, recomputed_layers=0)

    def activations(s: Setup) -> float:
        return next(item.update for item in estimate(s) if item.name.startswith("activations"))

    assert activations(dataclasses.replace(s, value=small)) == activations(s)
    large = dataclasses.replace(s, value=EIGHT_B)
    # The last layer's backward, 28 of 36 layers kept. A pack that is full still has a copy of v for attention.
    of_layer = memory_items.kept_per_token(EIGHT_B, 2, fused=True) + 2 * 8 * 128
    by_hand = 28 * of_layer + 8 * 2 * 4096 + memory_items.backward_per_token(EIGHT_B, 2)
    assert activations(large) == s.tokens * by_hand > activations(s)
    stays = num_parameters(EIGHT_B, has_head=False) * (2 + 12 / 8 + 4 / 8)
    gpu_bytes = (update_bytes(s) + stays) / MARGIN + GIB  # would do, were it not for its activations
    assert 0 < choose_recomputed(large, gpu_bytes).num_recomputed <= small.num_layers


def test_all_ranks_go_by_the_smallest_gpu(monkeypatch):
    sizes = [80, 139, 141]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=sizes[1]))
    monkeypatch.setattr(run.dist, "gather_objects", lambda accelerator, own: [own if own == size else size for size in sizes])
    assert run.gpu_memory(SimpleNamespace(device=torch.device("cuda"))) == 80
    assert run.gpu_memory(SimpleNamespace(device=torch.device("cpu"))) is None


def test_a_run_recomputes_what_was_chosen(tmp_path, monkeypatch, capsys):
    """On a CPU that is said to be a GPU just too small to keep all; the critic likewise."""

    def start(*overrides: str) -> run.Run:
        forget_accelerator()
        models = ["model.pretrained_model=tiny-random", "model.value_base_model=tiny-random"]
        job = run.Run(rl_config(*models, f"experiment.project={tmp_path / 'run'}", *overrides), 4, 1.0, samples=True)
        job.close()
        return job

    def recomputed(job: run.Run) -> list[int]:
        return [model.decoder.recomputed_layers for model in (job.model, job.value.model)]

    auto = "training.gradient_checkpointing_enable=auto"
    assert recomputed(start(auto)) == [0, 0] and "memory" not in capsys.readouterr().out
    monkeypatch.setattr(run, "gpu_memory", lambda accelerator: 80 * GIB)
    roomy = start(auto)
    assert recomputed(roomy) == [0, 0] and "(auto): 0 of 2, the fewest" in capsys.readouterr().out
    monkeypatch.setattr(run, "gpu_memory", lambda accelerator: int(update_bytes(roomy.setup) / MARGIN) - 2)
    assert recomputed(start(auto)) == [1, 1]
    said = capsys.readouterr().out
    assert "1 of 2 layers recomputed" in said and "(auto): 1 of 2, the fewest" in said
    for setting, expected in ("true", [2, 2]), ("false", [0, 0]):
        assert recomputed(start(f"training.gradient_checkpointing_enable={setting}")) == expected
        assert "(auto)" not in capsys.readouterr().out
    forget_accelerator()


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_what_is_offloaded_is_not_there_while_sampling(zero):
    """By the table of docs/scaling.md: 8 GPUs, bfloat16, AdamW; what the update takes is the same."""
    s = Setup(EIGHT_B, 2, gpus=8, zero=zero)
    offloaded = dataclasses.replace(s, optimizer_offloaded_in_rollout=True)
    n = num_parameters(EIGHT_B)
    saved = sum(item.rollout for item in estimate(s)) - sum(item.rollout for item in estimate(offloaded))
    vocabulary = 151_936 * 4096  # the largest tensor, and more than a bucket
    buckets = 2 * vocabulary + 4 * vocabulary / 8 if zero == 3 else 0
    assert saved == pytest.approx(n * {1: 4 + 12 / 8, 2: 12 / 8, 3: 2 / 8 + 4 / 8 + 12 / 8}[zero] + buckets)
    assert update_bytes(offloaded) == update_bytes(s)


def test_a_longer_prompt_than_a_prefill_takes_is_computed_in_one_forward():
    """Of a block model; each row of the 8B shape has the widest activations of a layer, in bfloat16."""
    s = Setup(EIGHT_B, 2, gpus=8, zero=2)
    workspace = lambda prompt: memory_engine.engine_bytes(dataclasses.replace(s, prompt=prompt))[2]  # noqa: E731
    assert workspace(16_384) == workspace(784)
    row = 2 * (6 * EIGHT_B.intermediate_size + 4 * 32 * 128 + 8 * 4096)
    assert workspace(20_000) - workspace(784) == (20_000 - 16_384) * row


def test_who_is_offloaded_is_chosen_by_what_the_engine_wants():
    """8B on eight GPUs under ZeRO-2, a value model of the same size beside it, 64 sequences of up to 2,784 tokens in flight."""
    s = Setup(EIGHT_B, 2, gpus=8, zero=2, value=EIGHT_B, max_active=64)
    n, critic = num_parameters(EIGHT_B), num_parameters(EIGHT_B, has_head=False)
    graphs, _, workspace = memory_engine.engine_bytes(s)
    # 36 layers of 8 heads of 128, keys and values; ceil(2,788 / 64) pages and one more for each.
    wants = graphs + (64 * 45 * 64 * 2 * 36 * 8 * 128 * 2 + workspace) / 0.9
    assert memory_engine.engine_wants(s) == pytest.approx(wants)
    for num_active in (128, 256):  # results and logits are of all, the cache need not be
        more = dataclasses.replace(s, max_active=num_active)
        graphs, _, workspace = memory_engine.engine_bytes(more)
        assert memory_engine.engine_wants(more) - graphs - workspace / 0.9 == pytest.approx(
            128 * 45 * 64 * 2 * 36 * 8 * 128 * 2 / 0.9
        )
    blocks_of_64 = dataclasses.replace(s, block_size=64, response=s.response - 60)  # the same pages; 8,192 rows of a step
    graphs, cache, workspace = memory_engine.engine_bytes(blocks_of_64)
    step = (8192 - 2048) * 2 * (6 * EIGHT_B.intermediate_size + 4 * 32 * 128 + 8 * 4096)
    assert memory_engine.engine_wants(blocks_of_64) == pytest.approx(graphs + (64 * cache + workspace + step) / 0.9)
    fixed = memory_items.outside(s) + 2 * n + wants
    value, optimizer = critic * (2 + 12 / 8), n * 12 / 8
    for gpu_bytes, who in (
        (fixed + value + optimizer + GIB, (False, False)),
        (fixed + value + optimizer - GIB, (True, False)),
        (fixed + optimizer + GIB, (True, False)),
        (fixed + optimizer - GIB, (True, True)),
    ):
        chosen = memory_items.choose_offloaded(s, gpu_bytes, value=True, optimizer=True)
        assert (chosen.value_offloaded_in_rollout, chosen.optimizer_offloaded_in_rollout) == who
    assert not memory_items.choose_offloaded(s, fixed, value=True, optimizer=False).optimizer_offloaded_in_rollout
    referred = dataclasses.replace(s, has_reference=True)  # offloaded last
    for gpu_bytes, is_offloaded in ((fixed + 2 * n + GIB, False), (fixed + 2 * n - GIB, True)):
        chosen = memory_items.choose_offloaded(referred, gpu_bytes, value=True, optimizer=True)
        assert chosen.value_offloaded_in_rollout and chosen.optimizer_offloaded_in_rollout
        assert chosen.reference_offloaded_in_rollout == is_offloaded
        sampling = {item.name: item.rollout for item in estimate(chosen)}
        assert sampling["frozen reference"] == (0 if is_offloaded else 2 * n)
    finetuning = dataclasses.replace(s, samples=False)
    assert not memory_items.choose_offloaded(finetuning, fixed, value=True, optimizer=True).optimizer_offloaded_in_rollout


def test_what_an_engine_of_canvases_wants():
    """Its forwards are over so many rows, unless a canvas is longer; what is stored is of every canvas."""
    s = Setup(EIGHT_B, 2, gpus=8, zero=2, attention="full", prompt=1000, response=1048, max_active=8)
    _, stored, workspace = memory_engine.engine_bytes(s)
    activations = workspace - memory_engine.CANVAS_LOGITS_BYTES

    def wants(**changes) -> float:
        return 0.9 * memory_engine.engine_wants(dataclasses.replace(s, **changes)) - memory_engine.CANVAS_LOGITS_BYTES

    assert wants() == pytest.approx(8 * (stored + activations))
    assert wants(max_active=64) == pytest.approx(64 * stored + 16 * activations)
    assert wants(max_active=64, caches=False) == pytest.approx(16 * activations)


# ---- what is refused, and how


def test_what_cannot_fit_is_refused_with_what_would_fit():
    with pytest.raises(UserError) as refusal:
        check_fits(Setup(EIGHT_B, 2, gpus=1, zero=1), H200)
    message = str(refusal.value)
    assert "\n" not in message and "optimizer states 92" in message
    assert "training.lora.rank=32" in message and "2 GPUs with ZeRO-3" in message and "experiment.check_memory=false" in message
    with pytest.raises(UserError, match="What fits: training.gradient_checkpointing_enable=true"):
        check_fits(Setup(EIGHT_B, 2, gpus=8, zero=2, tokens=65_536, predictions=30_000, recomputed_layers=0), H200)
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


@pytest.mark.parametrize(
    "family, job, method",
    [("sdar", "rl", "TraceRL"), ("sdar", "sft", "semi-ar"), ("sdar", "sft", "trace"), ("llada", "rl", "TraceRL")]
    + [("llada", "sft", "random_masking"), ("dream", "sft", "semi-ar"), ("dream", "sft", "ar")],
)
def test_the_largest_pack_is_that_of_the_longest_text(family, job, method):
    """A slice and a canvas are never cut, however small the budget of tokens; nor is the text of `ar`."""
    lengths = ["training.max_prompt_len=40", "training.max_gen_length=602", "training.max_tokens_per_microbatch=256"]
    start = [f"config=configs/{job}_tiny.yaml", f"model.model_base={family}", f"training.method={method}"]
    config = load_config(job, [*start, *lengths])
    training, layout = config.training, Layout(FAMILIES.get(family).attention, config.training)
    steps = np.random.default_rng(0).permutation(602) + 1
    if job == "rl":
        fill = -642 % 4
        ids, steps = [7] * (602 + fill), [*steps, *[0] * fill]
        response = layout.sampled(SimpleNamespace(prompt_ids=[7] * 40, response_ids=ids, step_map=steps, num_response=602), 0)
    else:
        response = as_response([7] * 40, [7] * 602, list(steps), 0, layout)
    document = layout.document(0, response, np.random.default_rng(1))
    (packs,) = assign([document], training.max_tokens_per_microbatch, num_ranks=1)
    largest = max(num_tokens(documents, share_prompts=False) for documents in packs)
    s = setup_of(config, job, FAMILIES.get(family), SHAPES["tiny"], 1, H200)
    assert s.tokens == row_length.whole_tiles(largest) > 512
    assert s.longest == 642


def test_a_smaller_budget_is_proposed_where_packs_become_smaller():
    for kind in ("block", "full"):
        s = Setup(EIGHT_B, 2, gpus=8, zero=2, attention=kind, tokens=5120, longest=4200)
        names = [name for name, _ in memory_estimate.alternatives(s) if "microbatch" in name]
        assert names == [f"training.max_tokens_per_microbatch={budget}" for budget in (4096, 2048)]
        assert not [name for name, _ in memory_estimate.alternatives(dataclasses.replace(s, longest=5120)) if "microbatch" in name]


def test_dropout_is_counted_where_there_is_an_adapter():
    """All-linear at the 8B shape in bfloat16: masks of 3 * 4,096 + 12,288 bytes, and the attention's output a second time."""

    def kept(*overrides: str) -> int:
        config = load_config("sft", ["config=configs/sft_sdar.yaml", *overrides])
        s = setup_of(config, "sft", SDAR, EIGHT_B, 8, H200)
        return memory_items.kept_per_token(EIGHT_B, 2, s.fused, s.adapted, s.drops)

    adapter = "training.lora.rank=8"
    assert kept(adapter, "training.lora.dropout=0.05") - kept(adapter) == 3 * 4096 + 12_288 + 2 * 4096


def test_finetuning_samples_only_to_evaluate():
    """Under ZeRO-3 the evaluator's engine has weights of its own."""

    def names(*overrides: str) -> set[str]:
        config = load_config("sft", ["config=configs/sft_sdar.yaml", *overrides])
        return {item.name for item in estimate(setup_of(config, "sft", SDAR, EIGHT_B, 8, H200))}

    assert "the engine's own weights" not in names("dataset.eval_dataset=null")
    assert "the engine's own weights" in names("dataset.eval_dataset=MATH500")


def test_what_is_sampled_is_that_of_the_evaluations_too():
    """The longest and the largest of what the job really samples; finetuning has no rollout."""

    def sampled(job: str, *overrides: str) -> tuple[int, int, bool]:
        lengths = ["rollout.max_token=1000", "evaluation.max_token=3000", "evaluation.block_size=[4,8]"]
        config = load_config(job, [f"config=configs/{job}_sdar.yaml", *lengths, *overrides])
        s = setup_of(config, job, SDAR, EIGHT_B, 8, H200)
        return s.response, s.block_size, s.samples

    assert sampled("rl") == sampled("sft", "dataset.eval_dataset=MATH500") == (3000, 8, True)
    assert sampled("rl", "evaluation.if_eval=false") == (1000, 4, True)
    assert sampled("rl", "rollout.max_token=4000") == (4000, 8, True)
    assert sampled("sft", "rollout.max_token=4000", "dataset.eval_dataset=MATH500") == (3000, 8, True)
    assert not sampled("sft", "dataset.eval_dataset=null")[2]

    def caches(job: str, rollout: str, evaluation: str) -> bool:
        kinds = [f"rollout.cache={rollout}", f"evaluation.cache={evaluation}", "dataset.eval_dataset=MATH500"]
        config = load_config(job, [f"config=configs/{job}_llada.yaml", *kinds])
        return setup_of(config, job, FAMILIES.get("llada"), EIGHT_B, 8, H200).caches

    assert caches("rl", "prefix", "none") and caches("rl", "none", "dual") and not caches("rl", "none", "none")
    assert caches("sft", "none", "dual") and not caches("sft", "prefix", "none")


def on_one_gpu(zero_stage: int, optimizer: str = "none", weights: str = "none") -> SimpleNamespace:
    """An accelerator under DeepSpeed."""
    plugin = SimpleNamespace(zero_stage=zero_stage, offload_optimizer_device=optimizer, offload_param_device=weights)
    state = SimpleNamespace(deepspeed_plugin=plugin)
    kind = DistributedType.DEEPSPEED
    return SimpleNamespace(device=torch.device("cuda"), num_processes=1, distributed_type=kind, state=state)


def test_the_stage_is_that_of_the_accelerator():
    """Under `accelerate launch` its file wins over the config's."""
    model = SimpleNamespace(family=SDAR, decoder=SimpleNamespace(config=EIGHT_B))
    overrides = ["experiment.check_memory=false", "experiment.deepspeed_file=1_node_1_gpus_deepspeed_zero2"]
    config = load_config("rl", ["config=configs/rl_sdar.yaml", *overrides])
    for own in [(1, "none", "none"), (2, "cpu", "none"), (3, "none", "none"), (3, "cpu", "cpu")]:
        job = SimpleNamespace(config=config, accelerator=on_one_gpu(*own), is_main=False, gpu_bytes=int(H200))
        job.offload = SimpleNamespace()
        run.Run.check_memory(job, model, samples=True)
        stage, optimizer, weights = own
        s = job.setup
        assert (s.zero, s.offload_optimizer, s.offload_weights) == (stage, optimizer == "cpu", weights == "cpu")
    assert setup_of(config, "rl", SDAR, EIGHT_B, 1, H200).zero == 2


def test_a_start_on_a_gpu_says_the_table_and_refuses(capsys):
    """Run.check_memory with a GPU that is not there; the model's weights need not be either."""
    config = load_config("rl", ["config=configs/rl_sdar.yaml", "experiment.deepspeed_file=1_node_1_gpus_deepspeed_zero2"])
    model = SimpleNamespace(family=SDAR, decoder=SimpleNamespace(config=EIGHT_B))
    accelerator = on_one_gpu(2)
    job = SimpleNamespace(config=config, accelerator=accelerator, is_main=True, gpu_bytes=int(H200), offload=SimpleNamespace())
    with pytest.raises(UserError, match="memory: about 1[67]. GiB"):
        run.Run.check_memory(job, model, samples=True)
    said = capsys.readouterr().out
    assert "optimizer states" in said
    assert said.endswith("(auto): 36 of 36, and still the update takes more than 90% of the GPU's 139.8 GiB\n")
    config.experiment.check_memory = False
    run.Run.check_memory(job, model, samples=True)
    assert job.setup.num_recomputed == 36


def test_the_hub_is_asked_once(monkeypatch, tmp_path):
    """Without a network a download would try for half a minute and say so in eleven lines."""
    import huggingface_hub

    asked = []

    def no_network(url: str) -> None:
        asked.append(url)
        raise OSError("no route to host\nand more")

    def download(name: str, file: str, local_files_only: bool = False) -> str:
        assert local_files_only, "nothing is fetched where the hub does not answer"
        if not (tmp_path / file).is_file():
            raise OSError("not in the cache")
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", no_network)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    message = r"^a/b: no config.json to be had \(no route to host\): give one as model=path/to/config.json$"
    with pytest.raises(UserError, match=message):
        read_shape("a/b", SDAR)
    assert asked == ["https://huggingface.co/a/b/resolve/main/config.json"]
    (tmp_path / "config.json").write_text(json.dumps(SDAR.config_json(EIGHT_B)))
    assert read_shape("a/b", SDAR) == EIGHT_B, "the cache has it"


def test_the_command_explains_itself(capsys):
    main(["config=configs/rl_sdar.yaml", "--help"])
    said = capsys.readouterr().out
    assert all(f"\n  {word}" in said for word in ["config=FILE", "gpus=1", "gpu_gib=80", "job=rl", "model=PATH"])
    assert "training.eps" not in said


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

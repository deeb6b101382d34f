"""The rollout benchmark runs at a tiny size on a CPU, and its limits are those of sums made by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import canvas_rollout, canvas_update, rollout
from benchmarks.kernel_times import covered, group_of, summarize
from benchmarks.limits import (
    Ceilings,
    Work,
    block_work,
    cache_bytes_per_token,
    chance_of,
    random_block,
    random_block_work,
)
from benchmarks.shapes import SHAPES, random_decoder
from models.registry import FAMILIES
from sample.canvas_kernels import KernelCanvasEngine
from sample.engine import Request, SamplingSettings, build_engine
from tests.distributed.harness import ROOT, clean_environment
from tests.sample.test_canvas_graphs import RememberedGraphs

H200 = Ceilings(4.3e12, 790e12)


# ---- limits


def test_the_work_of_a_forward_by_hand():
    """SDAR-4B, 128 sequences of 1,000 tokens, one token a forward.

    A layer's products: q, k, v and out, 2560 x (32 + 8 + 8 + 32) x 128, and 3 x 2560 x 9728 of the MLP: 100.9 million weights, 36
    layers; 151,936 x 2,560 of the head. Of four forwards of a block one carries the block before it: 5 rows a forward instead of 4.
    4, 3, 2 and 1 rows are masked: 2.5 on average. A token's keys and values: 2 x 36 layers x 8 heads x 128 x 2 bytes.
    """
    work = block_work(SHAPES["sdar-4b"], 128, 1000, 1, 4)
    layers, head = 36 * (2560 * 80 * 128 + 3 * 2560 * 9728), 151_936 * 2560
    assert (work.rows, work.head_rows, work.tokens) == (640, 320, 128)
    assert work.weight_bytes == 2 * (layers + head) == pytest.approx(8.04e9, rel=1e-3)
    assert work.flops == 2 * 640 * layers + 2 * 320 * head == pytest.approx(4.90e12, rel=1e-3)
    assert work.cache_bytes == 128_000 * 147_456 and cache_bytes_per_token(SHAPES["sdar-4b"], 2) == 147_456
    assert work.seconds(H200) == pytest.approx(4.90e12 / 790e12 + 18.87e9 / 4.3e12, rel=1e-3)  # products bound by FLOPs
    two = block_work(SHAPES["sdar-4b"], 128, 1000, 2, 4)  # a block in two forwards: 4 and 2 rows are masked
    assert (two.rows, two.head_rows, two.tokens) == (768, 384, 256)
    three = block_work(SHAPES["sdar-4b"], 1, 1000, 3, 4)  # 3 tokens, then 1
    assert (three.rows, three.head_rows, three.tokens) == (6, 2.5, 2)


def test_random_reveals_by_hand():
    """A block of two: its first forward reveals both with p^2, so it takes 1 + (1 - p^2) forwards, with 2 and 1 masked tokens."""
    assert random_block(2, 0.6) == (pytest.approx(1.64), pytest.approx(2.64))
    assert random_block(4, 0.0) == (4, 4 + 3 + 2 + 1) and random_block(4, 1.0) == (1, 4)  # one token a forward; all at once
    for size, reveal in [(4, 2), (4, 1.2), (32, 3)]:
        assert size / random_block(size, chance_of(size, reveal))[0] == pytest.approx(reveal)
    static, random = block_work(SHAPES["sdar-4b"], 128, 1000, 4, 4), random_block_work(SHAPES["sdar-4b"], 128, 1000, 1.0, 4)
    assert random == static  # a block a forward


@pytest.mark.parametrize(
    "shape, active, reveal, expected",
    [
        ("sdar-4b", 128, 1, 12_000),
        ("sdar-4b", 128, 2, 21_500),
        ("sdar-8b", 128, 1, 7_900),
        ("sdar-8b", 128, 2, 13_800),
        ("sdar-4b", 1, 1, 525),  # the weights are read once a token
        ("sdar-8b", 1, 1, 281),
    ],
)
def test_the_limits_of_the_design(shape: str, active: int, reveal: int, expected: int):
    assert block_work(SHAPES[shape], active, 1000, reveal, 4).tokens_per_second(H200) == pytest.approx(expected, rel=0.01)


def test_the_work_of_a_canvas_by_hand():
    """LLaDA-8B, 2 canvases of 200 + 256 tokens, blocks of 32, 2 tokens a forward: 16 forwards a block. The third ends at 296."""
    config, family, canvas = SHAPES["llada-8b"], FAMILIES.get("llada"), canvas_rollout.Canvas()
    layers, head = 32 * (4 * 4096 * 4096 + 3 * 4096 * 12_288), 126_464 * 4096

    def block(name: str) -> list[Work]:
        return canvas_rollout.forwards_of_block(family, config, canvas, 2, name, 2, 2, 2)

    whole, window, *_, last = block("none")
    assert len(block("none")) == 16 and sum(f.tokens for f in block("none")) == 2 * 32
    assert (whole.rows, whole.head_rows, window.head_rows, last.head_rows) == (2 * 456, 2 * 32, 2 * 30, 2 * 2)
    assert whole.flops == 2 * (2 * 456 * layers + 2 * 32 * head) and whole.cache_bytes == 0
    assert whole.attention_flops == 2 * 456 * 456 * 4 * 4096 * 32
    assert whole.seconds(H200) == pytest.approx((whole.flops + whole.attention_flops) / 790e12)
    per_token = 2 * 32 * 4096 * 2
    for name, rows, keys in [("prefix", 256 - 64, 456), ("horizon32", 64, 328), ("horizon64", 96, 360), ("dual", 32, 456)]:
        refresh, window = block(name)[:2]
        assert refresh == whole, "a block's first forward is over the whole canvas"
        assert (window.rows, window.cache_bytes) == (2 * rows, 2 * keys * per_token)
    # The last block has nothing behind it.
    assert canvas_rollout.forwards_of_block(family, config, canvas, 7, "horizon64", 2, 2, 2)[1].rows == 2 * 32
    # One canvas with a dual cache: every forward reads the weights, and a forward reveals two tokens.
    best = canvas_rollout.limit(family, config, canvas, "dual", 2, 1, 2, H200)
    refresh_seconds = (2 * (456 * layers + 32 * head) + 456 * 456 * 4 * 4096 * 32) / 790e12
    window_seconds = (2 * (layers + head) + 456 * per_token) / 4.3e12
    assert best == pytest.approx(32 / (refresh_seconds + 15 * window_seconds), rel=0.01)


def test_a_canvas_of_dream_shows_its_first_token_alone():
    """A block of 8 in 4 steps: 1; then of 7 left the share 1 - t2/t1, 0.333: 2; of 5 the share 0.499: 2; the rest."""
    canvas = canvas_rollout.Canvas(10, 16, 8)
    forwards = canvas_rollout.forwards_of_block(FAMILIES.get("dream"), SHAPES["dream-7b"], canvas, 0, "dual", 2, 1, 2)
    assert [f.tokens for f in forwards] == [1, 2, 2, 3]
    assert [f.head_rows for f in forwards] == [1, 7, 5, 3]


# ---- what is sampled


def test_steady_prompts_are_at_every_place_of_a_block():
    requests = rollout.steady_requests("tiny", 8, 40)
    assert [len(r.prompt_ids) for r in requests] == [40, 41, 42, 43] * 2
    assert len({tuple(r.prompt_ids[:40]) for r in requests}) == 8, "nobody shares a prompt"


def test_realistic_lengths_have_a_long_tail():
    requests = rollout.realistic_requests("sdar-4b")
    lengths = np.array([r.max_tokens for r in requests])
    prompts = [len(r.prompt_ids) for r in requests]
    assert lengths.shape == (64, 16) and lengths.min() >= 16 and lengths.max() == 2000
    assert 50 <= min(prompts) < 100 and 350 < max(prompts) <= 400
    assert np.median(lengths) == pytest.approx(400, rel=0.15) and lengths.mean() > 1.3 * np.median(lengths)
    assert rollout.realistic_requests("sdar-4b")[5] == requests[5]


# ---- measurements


@pytest.mark.parametrize("kind", ["torch", "triton"])
def test_the_steady_window_is_full_and_counts_its_tokens(kind: str):
    """Of both engines; on a CPU the one of kernels runs their references."""
    decoder = random_decoder("tiny", 1, torch.float32, torch.device("cpu"))
    engine = build_engine(decoder, FAMILIES.get("sdar"), 4, kind)
    result = rollout.measure_steady(engine, "tiny", 4, context=60, reveal=2, steps=8, profiled_steps=0, warm=False)
    assert (result["steps"], result["mean_active"], result["tokens_per_forward"]) == (8, 4, 2)
    assert result["tokens_per_second"] * result["seconds"] == pytest.approx(8 * 4 * 2)
    assert result["ms_per_forward"] == pytest.approx(1e3 * result["seconds"] / 8)
    with pytest.raises(SystemExit, match="--context 30"):
        rollout.measure_steady(engine, "tiny", 4, context=30, reveal=2, steps=8, profiled_steps=0, warm=False)


def test_dynamic_decoding_reveals_as_many_on_average():
    decoder = random_decoder("tiny", 1, torch.float32, torch.device("cpu"))
    engine = build_engine(decoder, FAMILIES.get("sdar"), 64, "torch")
    result = rollout.measure_steady(engine, "tiny", 64, 140, 2, steps=40, profiled_steps=0, warm=False, strategy="dynamic")
    assert result["mean_active"] == 64 and result["tokens_per_forward"] == pytest.approx(2, rel=0.02)


def test_the_command(tmp_path: Any, capsys: Any):
    out = tmp_path / "r.json"
    options = ["--shape", "tiny", "--device", "cpu", "--engine", "torch", "--active", "1,2", "--context", "44", "--steps", "4"]
    rollout.main([*options, "--out", str(out)])
    report = json.loads(out.read_text())
    assert [(r["run"], r["active"], r["reveal"]) for r in report["results"]] == [("steady", 1, 1), ("steady", 2, 1)]
    ceilings = Ceilings(**report["ceilings"])
    for result in report["results"]:
        limit = block_work(SHAPES["tiny"], result["active"], 44, 1, 4, itemsize=4).tokens_per_second(ceilings)
        assert result["limit_tokens_per_second"] == pytest.approx(limit)
        assert result["share_of_limit"] == pytest.approx(result["tokens_per_second"] / limit)
    assert capsys.readouterr().out.count("of the limit") == 2


def test_the_realistic_run(capsys: Any):
    options = ["--shape", "tiny", "--device", "cpu", "--engine", "torch", "--active", "128", "--context", "44", "--steps", "4"]
    rollout.main([*options, "--reveal", "2", "--realistic", "--shrink", "32"])
    shown = capsys.readouterr().out
    assert "of the steady rate" in shown and shown.count("of the limit") == 2
    decoder = random_decoder("tiny", None, torch.float32, torch.device("cpu"))
    result = rollout.measure_realistic(build_engine(decoder, FAMILIES.get("sdar"), 128), "tiny", 2, 64, warm=False)
    requests = rollout.realistic_requests("tiny", shrink=64)
    tokens = sum(-(-(len(r.prompt_ids) + n) // 4) * 4 - len(r.prompt_ids) for r in requests for n in r.max_tokens)
    assert result["statistics"]["tokens"] == tokens, "a response ends at its own length"
    assert result["mean_context"] == rollout.mean_context(requests, 128, 2)
    assert result["statistics"]["sequences"] == 1024 and result["seconds"] < result["whole_seconds"]


def test_dynamic_decoding_is_of_block_models(capsys: Any):
    with pytest.raises(SystemExit):
        rollout.main(["--shape", "tiny-full", "--device", "cpu", "--strategy", "dynamic"])
    assert "--strategy dynamic: got --shape tiny-full" in capsys.readouterr().err


def test_the_context_is_that_until_a_tenth_is_left():
    """Behind prompts of 10, one response of 40 tokens and nine of 4."""
    long, short = Request("long", [0] * 10, 1, (40,)), Request("short", [0] * 10, 9, (4,) * 9)
    assert rollout.mean_context([short, long], 1, 2) == 12  # the long one has not begun
    assert rollout.mean_context([long, short], 1, 2) == pytest.approx((40 * 30 + 8 * 4 * 12) / 72)  # the last is not there
    assert rollout.mean_context([long, short], 2, 2) == pytest.approx((36 * 28 + 9 * 4 * 12) / 72)  # the long one has had 36
    requests = rollout.realistic_requests("tiny")
    waiting = [(len(r.prompt_ids), n) for r in requests for n in r.max_tokens][::-1]
    in_flight, contexts = [], []  # [context, tokens left]
    while len(waiting) + len(in_flight) > 102:
        in_flight += [list(waiting.pop()) for _ in range(min(len(waiting), 128 - len(in_flight)))]
        contexts += [context for context, _ in in_flight]
        in_flight = [[context + 2, left - 2] for context, left in in_flight if left > 2]
    assert rollout.mean_context(requests, 128, 2) == pytest.approx(np.mean(contexts), abs=1.5)


def test_canvases(tmp_path: Any, capsys: Any):
    options = ["--shape", "tiny-full", "--device", "cpu", "--active", "2", "--reveal", "2", "--shrink", "16"]
    rollout.main([*options, "--caches", "none,prefix,horizon2,dual", "--out", str(tmp_path / "r.json")])
    report = json.loads((tmp_path / "r.json").read_text())
    assert [r["cache"] for r in report["results"]] == ["none", "prefix", "horizon2", "dual"]
    for result in report["results"]:
        assert (result["prompt"], result["response"], result["block_size"]) == (12, 16, 2)
        assert result["tokens_per_forward"] == 2 and result["steps"] == (1 if result["cache"] == "none" else 8)
        assert result["tokens_per_second"] * result["seconds"] == pytest.approx(2 * 2 * result["steps"])
    with pytest.raises(SystemExit, match="--caches: got horizon"):
        canvas_rollout.cache_settings("horizon")


@pytest.mark.parametrize("shape", ["llada-8b", "dream-7b"])
@pytest.mark.parametrize("cache", ["none", "prefix", "horizon2", "dual"])
def test_the_clock_of_canvases_meets_no_capture(shape: str, cache: str):
    """What a whole answer needs was captured in the warm-up."""
    decoder = random_decoder("tiny-full", 1, torch.float32, torch.device("cpu"))
    engine = KernelCanvasEngine(decoder, canvas_rollout.family_of(shape), 2)
    engine.most_rows, engine.graphs = 4096, RememberedGraphs()
    requests = [Request(f"task {n}", [1 + n] * 50) for n in range(2)]
    settings = SamplingSettings(max_tokens=128, mask_id=decoder.config.vocab_size - 1, block_size=32, steps=64,
                                **canvas_rollout.cache_settings(cache))  # fmt: skip
    captured = canvas_rollout.warm_up(engine, requests, settings, 17, all_blocks=cache != "none")
    assert captured == len(engine.graphs.graphs) > 0
    engine.generate(requests, settings)
    assert engine.statistics.graphs == 0 and engine.graphs.num_replays > engine.statistics.engine_forwards


def test_the_update_of_canvases(tmp_path: Any):
    options = ["--shape", "tiny-full", "--device", "cpu", "--layers", "1", "--prompt", "8", "--response", "16", "--rows", "2"]
    canvas_update.main([*options, "--repeats", "1", "--budget", "100", "--out", str(tmp_path / "r.json")])
    results = json.loads((tmp_path / "r.json").read_text())
    assert [(r["recompute"], r["tokens"], r["num_packs"]) for r in results] == [(False, 384, 4), (True, 384, 4)]  # 8 x 2 x 24
    assert canvas_update.extrapolate([(2, 10.0), (4, 16.0)], 32) == 100
    layer, embeddings = 4 * 4096 * 4096 + 3 * 4096 * 12_288, 2 * 126_464 * 4096
    assert canvas_update.states_gib("llada-8b", 2) == pytest.approx(16 * (2 * layer + embeddings) / 2**30)


@pytest.mark.slow
def test_the_shared_queue_s_run(tmp_path: Any):
    options = ["--shape", "tiny", "--device", "cpu", "--ranks", "2", "--active", "8", "--shrink", "128"]
    command = [sys.executable, "-m", "benchmarks.shared_queue", *options, "--out", str(tmp_path / "r.json")]
    subprocess.run(command, check=True, cwd=ROOT, env=clean_environment(), timeout=120)
    shared, by_index = json.loads((tmp_path / "r.json").read_text())["results"]
    assert sum(shared["sequences"]) == 1024 and by_index["sequences"] == [512, 512]
    assert shared["equal_rollouts"] == 1


@pytest.mark.slow
def test_the_start_up_run(tmp_path: Any):
    options = ["--shape", "tiny", "--device", "cpu", "--engine", "torch", "--active", "1", "--context", "44", "--startup"]
    rollout.main([*options, "--out", str(tmp_path / "r.json")])
    cold, warm = json.loads((tmp_path / "r.json").read_text())["results"]
    assert (cold["kernel_cache"], warm["kernel_cache"]) == ("cold", "warm")
    assert 0 < cold["seconds_to_weights"] < cold["seconds_to_first_token"]


# ---- the split of a forward


def test_kernels_are_grouped_and_gaps_found():
    """Two steps of 100 us: 30 us of attention, 40 us of products that overlap it by 10, a copy of 5; one wait a step."""
    events = []
    for step in (0, 100):
        events += [
            {"cat": "kernel", "name": "_item_attention_kernel", "ts": step, "dur": 30},
            {"cat": "kernel", "name": "nvjet_tst_128x256_64x4", "ts": step + 20, "dur": 40},
            {"cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pinned)", "ts": step + 80, "dur": 5},
            {"cat": "cuda_runtime", "name": "cudaEventSynchronize", "ts": step + 5, "dur": 80},
            {"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": step + 90, "dur": 8},
        ]
    split = summarize(events, 2)
    assert split["groups_ms"] == pytest.approx({"products": 0.040, "attention": 0.030, "copies": 0.005})
    assert split["busy_ms"] == pytest.approx(0.065) and split["profiled_ms"] == pytest.approx(0.0925)
    assert split["gaps_ms"] == pytest.approx(0.0275) and split["gaps_share"] == pytest.approx(27.5 / 92.5)
    assert split["device_to_host_copies_per_step"] == 1 and split["waits_per_step"] == {"cudaEventSynchronize": 1}
    assert split["kernels_per_step"] == 2 and split["longest_kernels"][0]["name"].startswith("nvjet")
    assert covered([]) == 0


@pytest.mark.parametrize(
    "name, group",
    [
        ("_item_attention_kernel", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", "attention"),
        ("_combine_kernel", "attention"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "products"),
        ("_skinny_kernel", "products"),
        ("_sampler_kernel", "sampler"),
        ("plan_kernel", "sampler"),
        ("_rms_norm_kernel", "norms, rotary, SwiGLU"),
        ("_rotary_store_kernel", "norms, rotary, SwiGLU"),
        ("_silu_mul_kernel", "norms, rotary, SwiGLU"),
        ("Memcpy DtoH (Device -> Pinned)", "copies"),
        ("void at::native::index_copy_kernel_impl", "other"),
    ],
)
def test_the_groups_of_kernels(name: str, group: str):
    assert group_of(name) == group

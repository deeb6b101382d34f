"""The update benchmark compares two ways that compute the same numbers, and counts what it says it counts."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.shapes import MASK_IDS, SHAPES, matmul_parameters, random_decoder
from benchmarks.train_step import Packed, Rows, compare, draw_responses, visible_pairs
from models.attention import dense_mask

ROOT = Path(__file__).resolve().parents[2]


def arguments(**changes):
    defaults = dict(shape="tiny", layers=2, responses=3, group=2, prompt=8, response=24, ragged=False, budget=200, reference_rows=2)
    return argparse.Namespace(**{**defaults, "backend": "dense", "device": "cpu", "seed": 0, **changes})


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("reveal", [1.0, 2.0])
def test_both_ways_give_one_gradient(ragged, reveal):
    result = compare(arguments(ragged=ragged), reveal)
    assert result["gradient_error"] < 1e-5
    assert result["loss"] == pytest.approx(result["reference_loss"], abs=1e-6) and abs(result["loss"]) > 0.1


def test_steps_are_drawn_as_asked():
    [response] = draw_responses(arguments(responses=1, response=40_000), 2.0, 100)
    per_block = [len(set(block)) for block in response.step_map.reshape(-1, 4)]
    assert np.mean(per_block) == pytest.approx(2.0, abs=0.05) and max(per_block) == 4 and min(per_block) == 1
    [response] = draw_responses(arguments(responses=1), 1.0, 100)
    assert sorted(response.step_map) == list(range(1, 25))


def test_what_is_counted():
    given = arguments()
    decoder = random_decoder("tiny", 2, torch.float32, "cpu")
    responses = draw_responses(given, 2.0, 100)
    packed, rows = Packed(decoder, responses, given, MASK_IDS["tiny"]), Rows(decoder, responses, given, MASK_IDS["tiny"])
    linears = [m.weight.numel() for m in decoder.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert matmul_parameters(SHAPES["tiny"]) == sum(linears)
    assert all(visible_pairs(p) == int(dense_mask(p.token_ids).sum()) for p in packed.packs)
    assert packed.num_tokens == sum(d.num_tokens for d in packed.documents) - 8, "the first two share their prompt of eight"
    unshared = Packed(decoder, responses, given, MASK_IDS["tiny"], share_prompts=False)
    assert unshared.num_tokens == sum(d.num_tokens for d in packed.documents)
    assert rows.num_tokens == len(rows.rows) * (8 + 2 * 24)
    assert len(packed.predictions) == 3 * 24


def test_the_command(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.train_step",
        "--shape",
        "tiny",
        "--device",
        "cpu",
        "--responses",
        "2",
        "--response",
        "16",
    ]
    out = ["--prompt", "8", "--layers", "2", "--repeats", "1", "--reveal", "2", "--out", str(tmp_path / "r.json")]
    result = subprocess.run([*command, *out], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    for name in ("whole_speedup_without_old_logprobs", "pack_recompute_mfu", "head_16000_seconds"):
        assert name in result.stdout
    assert (tmp_path / "r.json").is_file()

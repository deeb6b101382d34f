"""The benchmark of long finetuning, on a CPU: it runs whole and in parts to the same gradient, and reckons rightly."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.sft_long import Fit, Point, Update, main, settings
from benchmarks.shapes import random_decoder

TINY = ["--shape", "tiny", "--backend", "dense", "--device", "cpu", "--response", "64", "--prompt", "10"]


def test_it_runs(tmp_path, capsys):
    main([*TINY, "--layers", "2", "--out", str(tmp_path / "out.json")])
    said = capsys.readouterr().out
    assert all(phase in said for phase in ("mask", "layers forward", "head forward", "backward"))
    points = json.loads((tmp_path / "out.json").read_text())["points"]
    assert [point["layers"] for point in points] == [2, 1, 2] and points[2]["tokens"] < points[0]["tokens"] == points[1]["tokens"]


@pytest.mark.parametrize("method", ["semi-ar", "trace"])
def test_parts_add_up_to_the_whole(method):
    from types import SimpleNamespace

    gradients, sizes = [], []
    for budget in (0, 100):
        arguments = SimpleNamespace(
            shape="tiny", backend="dense", device="cpu", prompt=10, block=4, method=method, masks=1, complementary=False, seed=0,
            budget=budget, head_chunk=16, keep_activations=False,
        )  # fmt: skip
        decoder = random_decoder("tiny", 1, torch.float32, "cpu")
        update = Update(decoder, arguments, 64)
        update()
        gradients.append(torch.cat([p.grad.flatten() for p in decoder.parameters()]))
        sizes.append(len(update.packs))
    assert sizes[0] == 1 < sizes[1]
    assert (gradients[0] - gradients[1]).abs().max() < 2e-6 * gradients[0].abs().max()


def test_the_fit_is_solved():
    right = Fit(a=8192.0, b=30_000.0, c=5e9)
    points = [Point(layers, tokens, int(right(layers, tokens)), 0.0) for layers, tokens in [(4, 60_000), (2, 60_000), (4, 30_000)]]
    found = Fit.of(points)
    assert (found.a, found.b, found.c) == pytest.approx((right.a, right.b, right.c), rel=1e-3)
    assert found.longest(36, found(36, 45_000)) == pytest.approx(45_000)


def test_states_of_the_whole_model():
    from types import SimpleNamespace

    rows = {name: states for name, states, _ in settings(SimpleNamespace(shape="sdar-8b"), Fit(0, 0, 0), 0.0)}
    assert rows["frozen weights (LoRA) on one GPU"] == pytest.approx(2 * 8.19e9, rel=0.01)  # parameters of Qwen3-8B
    assert rows["ZeRO-3 over 8 GPUs"] == pytest.approx(18 * 8.19e9 / 8 + 4 * (0.193e9 + 0.622e9), rel=0.01)

"""The sdar checker passes on the numbers it was made for, and notices what it is for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.golden import sdar

DATA = Path(__file__).parent / "data" / "sdar"


@pytest.mark.parametrize("engine", ["torch", "triton"])
def test_all_sets_pass(engine: str) -> None:
    results = sdar.check(DATA, engine)
    assert [r.status for r in results] == ["PASS"] * 8, [r.line() for r in results]
    assert {r.path for r in results} >= {"sdar/tied/generation", "sdar/untied/forward_b2_arbitrary"}
    assert all(r.cases > 0 for r in results)


@pytest.mark.parametrize("what", ["token", "step", "forwards", "logit"])
def test_a_wrong_number_fails(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "sdar" / "other"
    shutil.copytree(DATA / "untied", folder)
    file = folder / "generation.json"
    cases = json.loads(file.read_text())
    case = cases["cases"][-5]
    if what == "token":
        case["tokens"][-1] = (case["tokens"][-1] + 1) % 100
    elif what == "step":
        case["step_map"][0] += 1
    elif what == "forwards":
        case["num_denoising_forwards"] += 1
    else:
        name = folder / "forward_a_block_causal.safetensors"
        tensors = {k: v.clone() for k, v in load_file(name).items()}
        tensors["logits"][1, 3, 5] += 1e-3
        save_file(tensors, name)
    file.write_text(json.dumps(cases))
    failed = [r for r in sdar.check(folder.parent) if r.status == "FAIL"]
    assert [r.path for r in failed] == ["sdar/other/forward_a_block_causal" if what == "logit" else "sdar/other/generation"]

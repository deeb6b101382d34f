"""The checkers of llada, dream and mmada pass on the numbers they were made for, and notice what they are for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file, save_file

from tests.golden import canvas, dream, llada, mmada

DATA = Path(__file__).parent / "data"
FAMILIES: dict[str, tuple[ModuleType, dict[str, int]]] = {
    "llada": (llada, {"forward_full": 2, "forward_prefix_cache": 4, "generation": 88}),
    "dream": (dream, {"forward_full": 2, "forward_full (padded)": 2, "generation": 108}),
    "mmada": (mmada, {"forward": 2, "generation": 24}),
}


@pytest.mark.parametrize("engine", ["torch", "triton"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_sets_pass(family: str, engine: str) -> None:
    module, cases = FAMILIES[family]
    results = module.check(DATA / family, engine)
    assert {r.path: r.cases for r in results} == {f"{family}/{name}": number for name, number in cases.items()}
    assert all(r.status == "PASS" for r in results), [r.line() for r in results]
    said = {"llada": "24 neg_entropy cases", "dream": "21 cases with left padding", "mmada": "2 forwards of rows fewer"}
    assert said[family] in " ".join(results[-1].notes)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """dream/ with a few of its cases."""
    folder = tmp_path / "dream"
    shutil.copytree(DATA / "dream", folder)
    cases = json.loads((folder / "generation.json").read_text())["cases"][:4]
    (folder / "generation.json").write_text(json.dumps({"cases": cases}))
    return folder


@pytest.mark.parametrize("what", ["token", "step", "forwards"])
def test_a_wrong_number_of_a_case_fails(what: str, small: Path) -> None:
    cases = canvas.cases_of(small)
    if what == "token":
        cases[2]["tokens"][0][-1] = (cases[2]["tokens"][0][-1] + 1) % 100
    elif what == "step":
        steps = cases[2]["step_map"][0]
        first, last = steps.index(min(steps)), steps.index(max(steps))
        steps[first], steps[last] = steps[last], steps[first]
    else:
        cases[2]["nfe"] = 3
    (small / "generation.json").write_text(json.dumps({"cases": cases}))
    failed = [r for r in dream.check(small) if r.status == "FAIL"]
    assert [(r.path, r.max_error) for r in failed] == [("dream/generation", 1.0)]
    assert any(note.startswith(f"{cases[2]['name']}: row 0: ") for note in failed[0].notes)


def test_gaps_in_a_step_map_do_not_matter(small: Path) -> None:
    cases = canvas.cases_of(small)
    for case in cases:
        case["step_map"] = [[3 * step + 1 for step in row] for row in case["step_map"]]
    (small / "generation.json").write_text(json.dumps({"cases": cases}))
    assert all(r.status == "PASS" for r in dream.check(small))


@pytest.mark.parametrize("name, position", [("logits", (1, 3, 5)), ("logits_padded", (0, -1, 5))])
def test_a_wrong_logit_fails(name: str, position: tuple[int, ...], small: Path) -> None:
    file = small / "forward_full.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    tensors[name][position] += 1e-3
    save_file(tensors, file)
    failed = [r.path for r in dream.check(small) if r.status == "FAIL"]
    assert failed == ["dream/forward_full" + " (padded)" * (name == "logits_padded")]


def test_ours_reveals_the_most_certain_first() -> None:
    """Without the wrong sign put in, neg_entropy orders the other way round."""
    model = canvas.load(DATA / "llada", "llada")
    case = next(c for c in canvas.cases_of(DATA / "llada") if c.get("quirk") and not c["use_cache"] and len(c["prompt"]) == 1)
    engine = canvas.build_engine(model.decoder, model.family)
    first = {}
    for target in ("neg_entropy", canvas.PLUS_ENTROPY):
        settings = canvas.settings_of(case, target=target, steps=case["gen_length"])
        rollout = engine.generate([canvas.Request("t", case["prompt"][0])], settings)[0]
        block = range(case["block_length"])
        first[target] = min(block, key=lambda i: rollout.step_map[i])
        ids = canvas.torch.tensor([*case["prompt"][0], *[case["mask_id"]] * case["gen_length"]])
        p = canvas.logits(model, ids, canvas.full_attention(len(ids)))[len(case["prompt"][0]) :][: len(block)].softmax(-1)
        entropy = -(p * p.log()).sum(-1)
        assert first[target] == int(entropy.argmin() if target == "neg_entropy" else entropy.argmax())
    assert len(set(first.values())) == 2

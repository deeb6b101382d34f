"""The objective and value checkers pass on the numbers they were made for, and notice wrong ones; the command says so."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.golden import __main__ as command
from tests.golden import objective, value

DATA = Path(__file__).parent / "data"
OBJECTIVE, VALUE = DATA / "objective" / "sdar" / "untied", DATA / "value"
CANVASES = DATA / "objective"


def test_objective_sets_pass():
    results = {r.path: r for r in objective.check(OBJECTIVE, "untied", "sdar")}
    extras = {"untied/optional_leftpad", "untied/optional_unaligned"}
    assert {path for path, r in results.items() if r.status != "PASS"} == extras, [r.line() for r in results.values()]
    assert len(results) == 17 and all(r.cases > 1 for path, r in results.items() if path not in extras)


@pytest.mark.parametrize("family, note", [("llada", "3 pads .* are prompt tokens here"), ("dream", "3 pads .* are left out here")])
def test_objective_sets_of_full_attention_pass(family, note):
    results = {r.path: r for r in objective.check(CANVASES / family, family, family)}
    assert len(results) == 7 and all(r.status == "PASS" and r.cases > 7 for r in results.values()), [
        r.line() for r in results.values()
    ]
    assert [path for path, r in results.items() if r.notes] == [f"{family}/optional_leftpad"]
    assert re.search(note, results[f"{family}/optional_leftpad"].notes[0])


def test_value_sets_pass():
    results = value.check(VALUE, "value")
    assert len(results) == 22 and all(r.status == "PASS" for r in results), [r.line() for r in results]


def copy_case(source: Path, models: list[str], name: str, folder: Path, change) -> None:
    """One case and its models, with one tensor changed."""
    for model in models:
        shutil.copytree(source / model, folder / model)
    shutil.copy(source / f"{name}.json", folder)
    tensors = load_file(source / f"{name}.safetensors")
    change(tensors)
    save_file(tensors, folder / f"{name}.safetensors")


def add(name: str, amount: float):
    def change(tensors):
        tensors[name] = tensors[name] + amount * tensors[name].abs().max()

    return change


@pytest.mark.parametrize(
    "change", [add("logp_new", 1e-3), add("row_loss", 1e-3), add("loss_mean", 1e-3), add("grad_sum.lm_head.weight", 1e-3)]
)
def test_a_wrong_objective_number_fails(change, tmp_path):
    copy_case(OBJECTIVE, ["policy", "old_policy"], "tracerl_shrink1_beta0.01_k3", tmp_path, change)
    [result] = objective.check(tmp_path, "x", "sdar")
    assert result.status == "FAIL"


def shown(tensors):
    """A response token that the first row hides, shown."""
    hidden = (tensors["input_ids"][0] == 63).nonzero()[0, 0]
    tensors["input_ids"][0, hidden] = tensors["labels"][0, hidden]


@pytest.mark.parametrize("family, weight", [("llada", "model.transformer.blocks.1.attn_out.weight"), ("dream", "lm_head.weight")])
def test_a_wrong_number_of_full_attention_fails(family, weight, tmp_path):
    changes = [add("logp_old", 1e-3), add("row_loss", 1e-3), add("loss_mean", 1e-3), add(f"grad_sum.{weight}", 1e-3), shown]
    for n, change in enumerate(changes):
        (tmp_path / str(n)).mkdir()
        copy_case(CANVASES / family, ["policy", "old_policy"], "tracerl_shrink4_beta0.3_k1", tmp_path / str(n), change)
        [result] = objective.check(tmp_path / str(n), "x", family)
        assert result.status == "FAIL", change


@pytest.mark.parametrize(
    "change", [add("final.lm_head.weight", 1e-2), add("step_losses", 1e-3), add("grad_norms_before_clip", 1e-3)]
)
def test_a_wrong_number_after_several_steps_fails(change, tmp_path):
    copy_case(OBJECTIVE, ["policy", "old_policy"], "multi_step_adamw", tmp_path, change)
    [result] = objective.check(tmp_path, "x", "sdar")
    assert result.status == "FAIL"


@pytest.mark.parametrize(
    "change", [add("returns", 1e-2), add("advantages", 1e-2), add("row_loss", 1e-3), add("grad_l2.value_head.weight", 1e-3)]
)
def test_a_wrong_value_number_fails(change, tmp_path):
    copy_case(VALUE, ["value", "old_value"], "vector_shrink4_g0.99_l0.95", tmp_path, change)
    [result] = value.check(tmp_path, "x")
    assert result.status == "FAIL"


def test_the_command(tmp_path):
    """A line per set; exit code 1 where one fails; 2 where there is nothing."""
    root = tmp_path / "golden"
    folder = root / "objective" / "sdar" / "mine"
    folder.mkdir(parents=True)
    copy_case(OBJECTIVE, ["policy", "old_policy"], "tracerl_shrink4_beta0", folder, lambda tensors: None)
    (root / "lladav").mkdir()
    (root / "lladav" / "generation.json").write_text("{}")

    def run() -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "tests.golden", str(root)], capture_output=True, text=True, cwd=DATA.parents[2]
        )

    result = run()
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert lines[0].startswith("UNSUPPORTED lladav/generation cases=0")
    assert lines[1].startswith("PASS objective/sdar/mine/tracerl_shrink4_beta0 cases=4 max_error=")
    tensors = load_file(folder / "tracerl_shrink4_beta0.safetensors")
    add("row_loss", 1e-2)(tensors)
    save_file(tensors, folder / "tracerl_shrink4_beta0.safetensors")
    assert run().returncode == 1
    shutil.rmtree(root)
    assert run().returncode == 2


def test_a_part_alone(tmp_path, monkeypatch, capsys):
    """Known by its name, wherever it is started from, and with the lines that the whole has for it."""
    root = tmp_path / "golden"
    for family in ["sdar/mine", "sdar/other", "llada"]:
        source, case = (OBJECTIVE, "tracerl_shrink4_beta0") if "sdar" in family else (CANVASES / "llada", "coupled")
        (root / "objective" / family).mkdir(parents=True)
        copy_case(source, ["policy", "old_policy"], case, root / "objective" / family, lambda tensors: None)
    shutil.copytree(DATA / "mmada", root / "mmada")

    def lines(folder: Path | str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["tests.golden", str(folder)])
        assert command.main() == 0
        return [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]

    whole = lines(root)
    names = [line.split()[1] for line in whole]
    objective = ["objective/llada/coupled", *(f"objective/sdar/{name}/tracerl_shrink4_beta0" for name in ["mine", "other"])]
    assert names == ["mmada/forward", "mmada/generation", *objective]
    for part, number in [("mmada", slice(0, 2)), ("objective", slice(2, 5)), ("objective/llada", slice(2, 3))]:
        assert lines(root / part) == whole[number], part
    monkeypatch.chdir(root / "objective" / "sdar")
    assert lines(".") == lines("../sdar") == whole[3:]
    monkeypatch.setattr(sys, "argv", ["tests.golden", str(root / "mmada" / "model")])
    assert command.main() == 2 and "or one of them" in capsys.readouterr().err

"""The report page: its numbers by hand, and the curves as a real browser draws them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from common.errors import UserError
from common.metrics import MetricsLog
from common.report import curves, main, run_files, summary, write_report
from tests.browser import dump_dom, needs_browser

EVIL = "</script><b>out</b>"


@pytest.fixture
def run_dir(tmp_path):
    run = tmp_path / "my run"
    log = MetricsLog(run, SimpleNamespace())
    for step in range(1, 31):
        metrics = {
            "rollout/solve_rate": step / 40,
            "train/kl": float("nan") if step == 3 else 1e-4 * step,
            "gap/logprob_mean": 0.01 / step,
            "time/rollout_seconds": 2.0,
            "time/update_seconds": 3.0,
            "time/step_seconds": 5.0,
            "train/something_new": 1.0,
        }
        if step % 10 == 0:
            metrics["eval/MATH500/accuracy"] = 0.9 if step == 20 else 0.5
        log.write(step, metrics)
    (run / "config.yaml").write_text(f"experiment:\n  total_step: 60\ntraining:\n  method: TraceRL\nnote: '{EVIL}'\n")
    for name in ("ckpt/step-2", "ckpt/step-10", "ckpt/optimized", "ckpt/.step-11.partial"):
        (run / name).mkdir(parents=True)
    (run / "trace page#1.html").write_text("")
    return run


def test_curves_keep_their_steps_and_gaps():
    rows = [{"step": 1, "a": 1.0}, {"step": 2, "a": None, "b": 5}, {"step": 4, "a": 3.0}]
    assert curves(rows) == {"a": {"x": [1, 2, 4], "y": [1.0, None, 3.0]}, "b": {"x": [2], "y": [5]}}


def test_long_curves_are_thinned_alike_and_rare_ones_kept():
    rows = [{"step": step, "a": step, "b": -step} | ({"eval/x": 1} if step % 500 == 0 else {}) for step in range(1, 5001)]
    thinned = curves(rows, max_points=100)
    assert thinned["a"]["x"] == thinned["b"]["x"] == thinned["a"]["y"] and len(thinned["a"]["x"]) == 100
    assert thinned["a"]["x"][0] == 1 and thinned["a"]["x"][-1] == 5000
    assert len(thinned["eval/x"]["x"]) == 10


def test_summary_by_hand():
    rows = [
        {"step": 1, "rollout/solve_rate": 0.2, "gap/logprob_max": 0.5, "train/kl": None},
        {"step": 2, "rollout/solve_rate": 0.6, "gap/logprob_max": 0.1, "eval/x/accuracy": 0.5, "train/kl": 1.0},
        {"step": 3, "rollout/solve_rate": 0.6, "gap/logprob_max": 0.2, "train/kl": 2.0},
    ]
    assert summary(rows) == [
        {"title": "Accuracy, x", "key": "eval/x/accuracy", "first": 0.5, "latest": 0.5, "best": 0.5, "best_step": 2},
        {"title": "Solve rate", "key": "rollout/solve_rate", "first": 0.2, "latest": 0.6, "best": 0.6, "best_step": 2},
        {"title": "KL", "key": "train/kl", "first": 1.0, "latest": 2.0},
        {"title": "Engine/trainer gap, max", "key": "gap/logprob_max", "first": 0.5, "latest": 0.2, "best": 0.1, "best_step": 2},
    ]


def test_files_are_linked_newest_first(run_dir):
    listed = {entry["kind"]: entry for entry in run_files(run_dir)}
    assert [link["name"] for link in listed["Checkpoints"]["links"]] == ["ckpt/step-10/", "ckpt/step-2/", "ckpt/optimized/"]
    assert listed["Trace pages"]["links"] == [{"name": "trace page#1.html", "href": "trace%20page%231.html"}]
    assert [link["name"] for link in listed["Numbers"]["links"]] == ["metrics.jsonl", "config.yaml"]
    (run_dir / "gradient_norms.jsonl").touch()
    [numbers] = [entry for entry in run_files(run_dir) if entry["kind"] == "Numbers"]
    assert [link["name"] for link in numbers["links"]] == ["metrics.jsonl", "gradient_norms.jsonl", "config.yaml"]


def test_the_page_holds_the_run(run_dir):
    path = write_report(run_dir)
    assert path == run_dir / "report.html" and write_report(run_dir) == path
    text = path.read_text(encoding="utf-8")
    assert text.count("</script>") == 2 and EVIL not in text
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert data["seconds"] == 30 * 5.0 and data["last_step"] == 30 and data["facts"] == {"total_step": 60, "method": "TraceRL"}
    assert data["curves"]["train/kl"]["y"][2] is None and EVIL in data["config"]
    assert not [name for name in run_dir.iterdir() if "partial" in name.name]


@needs_browser
def test_the_browser_draws_the_curves(run_dir):
    shown = dump_dom(write_report(run_dir))
    titles = [figure.text for figure in shown.find(tag="figure")]
    assert [title for title in titles if title.startswith("Solve rate")] and len(titles) == 5
    assert titles[0].startswith("Solve ratetraining rollouts 75%MATH500 (evaluation) 50%")
    assert [
        title.startswith(name)
        for title, name in zip(titles[1:], ("KL", "Engine/trainer gap", "Seconds by phase", "train/something_new"))
    ] == [True] * 4
    assert "5rollout 2update 3" in titles[3]
    assert shown.find(id="headline")[0].text == "step 30 of 60 · 3 min · TraceRL"
    assert len([circle for circle in shown.find(tag="circle")]) == 3  # evaluation points
    curves = [path.attributes["d"] for path in shown.find("curve", "path")]
    assert len(curves) == 5 and not [d for d in curves if "NaN" in d]
    assert max(d.count("M") for d in curves) == 2  # the KL's line breaks at the step that has none
    table = shown.find(tag="table")[0].text
    assert "Accuracy, MATH50050%50%90% step 20" in table
    assert EVIL in shown.find(tag="pre")[0].text


@needs_browser
def test_a_run_without_a_step_has_a_page(tmp_path):
    (tmp_path / "config.yaml").write_text("experiment: {project: x}\n")
    shown = dump_dom(write_report(tmp_path))
    assert shown.find(id="hero")[0].text == "No step has been finished yet."


def test_no_run_is_one_line_and_code_2(tmp_path, capsys):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UserError):
            write_report(path)
        with pytest.raises(SystemExit) as exit:
            main([str(path)])
        error = capsys.readouterr().err
        assert exit.value.code == 2 and error.startswith(f"error: {path}: ") and error.count("\n") == 1

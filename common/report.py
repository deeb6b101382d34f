"""The page of a run: its curves, evaluations, settings and files.

    python -m common.report RUN_DIR        writes RUN_DIR/report.html

Made from metrics.jsonl and config.yaml alone, in well under a second: a run may write it as often as it likes.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from pathlib import Path
from typing import Any, Sequence
from urllib.parse import quote

from common.errors import UserError, entry_point
from common.metrics import GRADIENT_NORMS_FILE, METRICS_FILE, read_metrics
from common.page import finite, render_page, write_page

TEMPLATE = Path(__file__).with_name("report.html")
MAX_POINTS = 2000  # of one curve: more than a screen has columns

# key, title, whether more ("max") or less ("min") of it is better, for the summary
SUMMARY = (
    ("rollout/solve_rate", "Solve rate", "max"),
    ("rollout/reward", "Reward", "max"),
    ("rollout/response_length", "Response length", None),
    ("rollout/cut_off_share", "Share cut off", "min"),
    ("rollout/tokens_per_forward", "Tokens per forward", "max"),
    ("rollout/steps_per_block", "Steps per block", "min"),
    ("rollout/entropy", "Entropy, nats", None),
    ("train/loss", "Loss", None),
    ("eval/validation_loss", "Validation loss", "min"),
    ("train/kl", "KL", None),
    ("gap/logprob_mean", "Engine/trainer gap, mean", "min"),
    ("gap/logprob_max", "Engine/trainer gap, max", "min"),
    ("train/gradient_norm", "Gradient norm", None),
    ("rate/rollout_tokens_per_second", "Rollout tokens/s", "max"),
    ("memory/peak_gib", "Peak memory, GiB", None),
)


def curves(rows: Sequence[dict[str, Any]], max_points: int = MAX_POINTS) -> dict[str, dict[str, list]]:
    """{key: {"x": steps, "y": values}}: the steps that have the key.

    A key with more than `max_points` of them is thinned to the same evenly spread steps as all such keys, first and last
    included, so that curves can be stacked; a rarer one (an evaluation) keeps every point. y is None where the value was not
    finite: the line breaks there.
    """
    found: dict[str, dict[str, list]] = {}
    for row in rows:
        for key, value in row.items():
            if key != "step" and (value is None or isinstance(value, (int, float))):
                curve = found.setdefault(key, {"x": [], "y": []})
                curve["x"].append(row["step"])
                curve["y"].append(finite(value))
    kept = {rows[round(i * (len(rows) - 1) / (max_points - 1))]["step"] for i in range(max_points)} if rows else set()
    for curve in found.values():
        if len(curve["x"]) > max_points:
            points = [(x, y) for x, y in zip(curve["x"], curve["y"]) if x in kept]
            curve["x"], curve["y"] = [x for x, _ in points], [y for _, y in points]
    return found


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """First, latest and best value, and the step of the best, of the numbers one asks for first and of every evaluation."""
    evaluations = sorted({key for row in rows for key in row if re.fullmatch(r"eval/.+/accuracy", key)})
    wanted = [(key, f"Accuracy, {key[5:-9]}", "max") for key in evaluations] + list(SUMMARY)
    table = []
    for key, title, better in wanted:
        points = [(row["step"], row[key]) for row in rows if _is_number(row.get(key))]
        if not points:
            continue
        line: dict[str, Any] = {"title": title, "key": key, "first": finite(points[0][1]), "latest": finite(points[-1][1])}
        if better:
            sign = 1 if better == "max" else -1
            best = max(points, key=lambda point: (sign * point[1], -point[0]))
            line |= {"best": finite(best[1]), "best_step": best[0]}
        table.append(line)
    return table


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def run_files(run_dir: Path) -> list[dict[str, Any]]:
    """What the run has written, by kind, with links relative to the report; the newest first, five of a kind."""
    kinds = (
        ("Trace pages", sorted([*run_dir.glob("*.html"), *run_dir.glob("*/*.html")], key=lambda path: path.name, reverse=True)),
        ("Checkpoints", sorted(run_dir.glob("ckpt/*"), key=_natural, reverse=True)),
        ("Results", sorted(run_dir.glob("results/*"), key=_natural, reverse=True)),
        ("Rollouts", sorted(run_dir.glob("rollouts/*.jsonl"), key=_natural, reverse=True)),
        ("Numbers", [run_dir / METRICS_FILE, run_dir / GRADIENT_NORMS_FILE, run_dir / "config.yaml"]),
    )
    listed = []
    for kind, paths in kinds:
        names = [
            path.relative_to(run_dir).as_posix() + ("/" if path.is_dir() else "")
            for path in paths
            if path.exists() and not path.name.startswith(".") and path.name != "report.html"
        ]
        if names:
            links = [{"name": name, "href": quote(name)} for name in names[:5]]
            listed.append({"kind": kind, "links": links, "more": len(names) - len(links)})
    return listed


def _natural(path: Path) -> list[Any]:
    """step-2 before step-10."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", path.name)]


def report_data(run_dir: Path) -> dict[str, Any]:
    """All that the page embeds."""
    rows = read_metrics(run_dir) if (run_dir / METRICS_FILE).is_file() else []
    config_file = run_dir / "config.yaml"
    config_text = config_file.read_text(encoding="utf-8", errors="replace") if config_file.is_file() else ""
    return {
        "name": run_dir.resolve().name,
        "facts": _config_facts(config_text),
        "last_step": rows[-1]["step"] if rows else 0,
        "seconds": sum(value for row in rows for key, value in row.items() if _is_phase(key) and _is_number(value)),
        "curves": curves(rows),
        "summary": summary(rows),
        "files": run_files(run_dir),
        "config": config_text,
    }


def _is_phase(key: str) -> bool:
    return key.startswith("time/") and key.endswith("_seconds") and key not in ("time/step_seconds", "time/total_seconds")


def _config_facts(text: str) -> dict[str, Any]:
    """The few settings that head the page: none where the config is not YAML; its text is on the page in any case."""
    import yaml

    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}

    def get(section: str, key: str) -> Any:
        inner = config.get(section) if isinstance(config, dict) else None
        return inner.get(key) if isinstance(inner, dict) else None

    facts = {
        "total_step": get("experiment", "total_step"),
        "method": get("training", "method"),
        "family": get("model", "model_base"),
        "model": get("model", "pretrained_model"),
        "data": get("dataset", "train_dataset") or get("dataset", "optimization_data"),
    }
    return {key: value for key, value in facts.items() if isinstance(value, (str, int, float))}


def write_report(run_dir: str | os.PathLike) -> Path:
    """Write `run_dir`/report.html, beside and renamed, and return its path. Raises UserError where there is no run."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run directory: give the directory that holds {METRICS_FILE}")
    if not (run_dir / METRICS_FILE).is_file() and not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir}: neither {METRICS_FILE} nor config.yaml in it: give a run directory")
    path = run_dir / "report.html"
    data = report_data(run_dir)
    write_page(path, render_page(TEMPLATE, f"{data['name']} · Unmask run", data))
    return path


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m common.report", description="Write RUN_DIR/report.html: the curves of a run.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    args = parser.parse_args(argv)
    print(f"{write_report(args.run_dir)}: open it in a browser")


if __name__ == "__main__":
    main()

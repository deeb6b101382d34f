"""Every RL method on digit sorting, from the same finetuned models, at equal updates: held-out solve rate and tokens per forward.

    python -m benchmarks.methods --seeds 1,2,3 --workers 16      all rows of METHODS
    python -m benchmarks.methods --methods TraceRL,DiPO --seeds 1 --steps 40

Each seed finetunes one model; each method trains it by its configs/rl_tiny*.yaml, which differ in nothing else. Jobs are processes
of one thread, --workers at a time. Prints markdown tables, and writes them with all numbers to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Callable

from benchmarks.demo import CONTROL, ROOT, call, evaluate
from common.metrics import read_metrics

OUT = ROOT / "benchmarks" / "baselines" / "methods.json"
START = "before RL"


@dataclass(frozen=True)
class Entry:
    """A row of the table."""

    config: str
    """File in configs/ without .yaml."""
    changes: dict[str, str] = field(default_factory=dict)
    starts_value_model: bool = False
    """The value model starts from the finetuned model too."""
    cost: float = 1.0
    """Roughly its time in units of TraceRL's: the longest jobs start first."""


METHODS: dict[str, Entry] = {
    "TraceRL": Entry("rl_tiny"),
    "with_value": Entry("rl_tiny_with_value", starts_value_model=True, cost=2.0),
    "value_shared": Entry("rl_tiny_with_value", {"model.value_base_model": "null", "model.value_shared": "true"}, cost=1.3),
    "coupled": Entry("rl_tiny_coupled"),
    "random_masking": Entry("rl_tiny_random_masking"),
    # DiPO draws further groups until 16 can be trained on: more responses than the others. Without that they are as many.
    "DiPO": Entry("rl_tiny_dipo", cost=2.5),
    "DiPO_no_resampling": Entry("rl_tiny_dipo", {"rollout.resample": "false"}),
    # The control: rewards permuted among the responses to each task. Nothing can be learnt from them.
    "TraceRL_permuted": Entry("rl_tiny", {"experiment.plugins": f"[{CONTROL}]", "reward.function": "exact_permuted"}),
}


def finetune(folder: Path, seed: int) -> dict[str, Any]:
    """The model that all methods of a seed start from, and its numbers."""
    shutil.rmtree(folder, ignore_errors=True)
    changes = [f"experiment.project={folder / 'sft'}", f"training.seed={seed}"]
    call("train/sft_sdar.py", "config=configs/sft_tiny.yaml", *changes, quiet=True)
    return {"final": final_numbers(folder / "eval_before", folder / "sft" / "ckpt" / "optimized")}


def train(folder: Path, seed: int, name: str, steps: int) -> dict[str, Any]:
    """One method from one finetuned model: RL and the last evaluation."""
    entry, project, model = METHODS[name], folder / name, folder / "sft" / "ckpt" / "optimized"
    changes = {
        "experiment.project": project,
        "experiment.total_step": steps,
        "experiment.eval_every": max(1, steps // 8),
        "experiment.save_every": steps,
        "experiment.save_state_every": steps,
        "model.pretrained_model": model,
        "training.seed": seed,
        **({"model.value_base_model": model} if entry.starts_value_model else {}),
        **entry.changes,
    }
    settings = [f"{key}={value}" for key, value in changes.items()]
    seconds = call("rl.py", f"config=configs/{entry.config}.yaml", *settings, quiet=True)
    rows = read_metrics(project)
    return {
        "final": final_numbers(folder / f"eval_{name}", project / "ckpt" / "optimized"),
        "curve": curve(rows),
        "responses": int(total(rows, "rollout/num_responses")),
        "updates": int(total(rows, "train/num_updates")),
        "update_tokens": int(total(rows, "train/num_tokens")),
        "seconds": round(seconds, 1),
    }


def final_numbers(folder: Path, model: Path) -> dict[str, dict[str, float]]:
    """Held-out numbers of a checkpoint, sampled (temperature 1, four responses a task) and greedy, both by dynamic unmasking."""
    kept = ["accuracy", "standard_error", "tokens_per_forward"]
    return {kind: {key: result[key] for key in kept} for kind, result in evaluate(folder, model, quiet=True).items()}


def curve(rows: list[dict[str, Any]]) -> dict[int, float]:
    """Held-out solve rate, sampled, one response a task, by RL step."""
    key = "eval/low_confidence_dynamic/accuracy"
    return {row["step"]: row[key] for row in rows if key in row}


def total(rows: list[dict[str, Any]], key: str) -> float:
    """A step without an update has no numbers of one."""
    return sum(row.get(key) or 0 for row in rows)


Results = dict[str, dict[int, dict[str, Any]]]
"""By name of the row and seed."""


def run_all(folder: Path, seeds: list[int], methods: list[str], steps: int, workers: int) -> Results:
    """All jobs, `workers` at a time; a method's begin when the model of their seed is there."""
    results: Results = {name: {} for name in [START, *methods]}
    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:

        def note(name: str, seed: int, job: Future) -> None:
            results[name][seed] = result = job.result()
            rate = result["final"]["sampled"]["accuracy"]
            print(f"  {time.perf_counter() - start:4.0f} s  seed {seed}  {name}: {rate:.3f}", flush=True)

        for seed, job in submit(pool, seeds, lambda seed: finetune(folder / f"seed_{seed}", seed)):
            note(START, seed, job)
        pairs = sorted(((name, seed) for name in methods for seed in seeds), key=lambda pair: -METHODS[pair[0]].cost)
        for (name, seed), job in submit(pool, pairs, lambda pair: train(folder / f"seed_{pair[1]}", pair[1], pair[0], steps)):
            note(name, seed, job)
    return results


def submit(pool: ThreadPoolExecutor, items: list[Any], work: Callable[[Any], Any]) -> list[tuple[Any, Future]]:
    return [(item, pool.submit(work, item)) for item in items]


# ---- tables


def mean_and_spread(values: list[float], digits: int) -> str:
    """`0.927 ± 0.012`: mean and standard deviation over seeds."""
    text = f"{statistics.fmean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def summary_table(results: Results) -> str:
    columns = ["method", "sampled", "greedy", "tokens per forward, sampled", "greedy", "at 1/4 of the steps", "at 1/2"]
    columns += ["responses", "updates", "update tokens", "s"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, by_seed in results.items():
        runs = list(by_seed.values())
        cells = [
            mean_and_spread([run["final"][kind][key] for run in runs], digits)
            for key, digits in [("accuracy", 3), ("tokens_per_forward", 2)]
            for kind in ["sampled", "greedy"]
        ]
        for share in (0.25, 0.5):
            at = [at_share(run["curve"], share) for run in runs if "curve" in run]
            cells.append(f"{statistics.fmean(at):.3f}" if at else "")
        for key in ["responses", "updates", "update_tokens", "seconds"]:
            counts = [run[key] for run in runs if key in run]
            cells.append(f"{statistics.fmean(counts):,.0f}" if counts else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def at_share(points: dict[int, float], share: float) -> float:
    """The point of a curve that is nearest to a share of its steps."""
    return points[min(points, key=lambda step: abs(step - share * max(points)))]


def seed_table(results: Results) -> str:
    """Sampled / greedy / tokens per forward (sampled) of each seed."""
    seeds = sorted(results[START])
    lines = ["| method | " + " | ".join(f"seed {seed}" for seed in seeds) + " |", "|---|" + "---|" * len(seeds)]
    for name, by_seed in results.items():
        finals = [by_seed[seed]["final"] for seed in seeds]
        cells = [
            f"{sampled['accuracy']:.3f} / {greedy['accuracy']:.3f} / {sampled['tokens_per_forward']:.2f}"
            for sampled, greedy in ((final["sampled"], final["greedy"]) for final in finals)
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(path: Path, arguments: argparse.Namespace, results: Results, seconds: float) -> None:
    record = {
        "command": "python -m benchmarks.methods " + " ".join(sys.argv[1:]),
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {version('torch')}",
        "steps": arguments.steps,
        "seconds": round(seconds),
        "tables": [summary_table(results).splitlines(), seed_table(results).splitlines()],
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", default="1,2,3", help="separated by commas")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"separated by commas, of {', '.join(METHODS)}")
    parser.add_argument("--steps", type=int, default=320, help="RL steps of each run")
    parser.add_argument("--workers", type=int, default=2, help="jobs at a time, one core each")
    parser.add_argument("--folder", type=Path, default=Path("runs/methods"), help="where the runs go; replaced")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON file with the results")
    arguments = parser.parse_args()
    seeds, methods = [int(seed) for seed in arguments.seeds.split(",")], arguments.methods.split(",")
    for name in methods:
        if name not in METHODS:
            parser.error(f"--methods: got {name!r}, choose from {', '.join(METHODS)}")
    start = time.perf_counter()
    print(f"{len(methods)} methods x {len(seeds)} seeds, {arguments.steps} steps each (held-out solve rate, sampled):", flush=True)
    results = run_all(arguments.folder.resolve(), seeds, methods, arguments.steps, arguments.workers)
    seconds = time.perf_counter() - start
    print(f"\nMean over seeds {arguments.seeds}\n\n{summary_table(results)}\n")
    print(f"Each seed: sampled / greedy / tokens per forward, sampled\n\n{seed_table(results)}\n")
    write(arguments.out, arguments, results, seconds)
    print(f"{seconds:.0f} s; written to {arguments.out}")


if __name__ == "__main__":
    main()

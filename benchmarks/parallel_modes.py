"""One RL run on one process and on several, under DDP and ZeRO: the solve rates they end with, over seeds.

    python -m benchmarks.parallel_modes --seeds 1,2,3 --processes 2 --workers 12 --out benchmarks/baselines/parallel_modes.json
    python -m benchmarks.parallel_modes --config rl_small --seeds 1,2,3 --processes 2 --workers 4

Each seed finetunes one model (the config's `model.prepare_config`), and every mode trains it by the same config. Jobs are
processes, `--workers` at a time; they share the GPUs. Rates are those of the last evaluation in the run. Two modes are as far apart
as the means over seeds differ, in standard errors of that difference: of the tasks, or of the seeds, whichever is larger.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.demo import ROOT, call
from common.metrics import read_metrics

MODES = {"one process": None, "ddp": "null", "zero2": "1_node_{}_gpus_deepspeed_zero2", "zero3": "1_node_{}_gpus_deepspeed_zero3"}
"""By name `experiment.deepspeed_file`, {} being the number of processes; None: of the run in one process."""


def finetune(folder: Path, config: str, seed: int, overrides: list[str]) -> Path:
    """The checkpoint that all modes of a seed start from."""
    from configs.load import read_config

    prepare = read_config("rl", [f"config=configs/{config}.yaml"]).model.prepare_config
    project = folder / f"sft_{seed}"
    call("train/sft.py", f"config={prepare}", f"experiment.project={project}", f"training.seed={seed}", *overrides, quiet=True)
    return project / "ckpt" / "optimized"


def train(folder: Path, config: str, seed: int, mode: str, processes: int, model: Path, overrides: list[str]) -> dict[str, float]:
    """The last evaluation of a run, and its seconds."""
    project, file = folder / f"{mode.replace(' ', '_')}_{seed}", MODES[mode]
    seconds = call(
        "rl.py",
        f"config=configs/{config}.yaml",
        f"experiment.project={project}",
        f"training.seed={seed}",
        f"model.pretrained_model={model}",
        "model.prepare_config=null",
        f"experiment.num_processes={1 if file is None else processes}",
        f"experiment.deepspeed_file={'null' if file is None else file.format(processes)}",
        *overrides,
        quiet=True,
    )
    return {**last_evaluation(read_metrics(ROOT / project)), "seconds": seconds}


def last_evaluation(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Accuracy and standard error of the last step that has them."""
    found = [row for row in rows if any(key.startswith("eval/") and key.endswith("/accuracy") for key in row)]
    assert found, "the run has no evaluation: its dataset.eval_dataset, its evaluation.if_eval?"
    return {
        name: next(value for key, value in found[-1].items() if key.startswith("eval/") and key.endswith(f"/{name}"))
        for name in ("accuracy", "standard_error")
    }


def summary(runs: list[dict[str, float]]) -> tuple[float, float]:
    """Mean accuracy over seeds, and its standard error."""
    rates, number = [run["accuracy"] for run in runs], len(runs)
    of_tasks = sum(run["standard_error"] ** 2 for run in runs) ** 0.5 / number
    of_seeds = statistics.stdev(rates) / number**0.5 if number > 1 else 0.0
    return statistics.fmean(rates), max(of_tasks, of_seeds)


def furthest(results: dict[str, list[dict[str, float]]]) -> tuple[str, str, float]:
    """The two modes that are furthest apart, in standard errors of their difference."""

    def apart(pair: tuple[str, str]) -> float:
        (one, one_error), (other, other_error) = (summary(results[mode]) for mode in pair)
        gap, error = abs(one - other), (one_error**2 + other_error**2) ** 0.5
        return gap / error if error else float("inf") if gap else 0.0

    pair = max(itertools.combinations(results, 2), key=apart)
    return *pair, apart(pair)


def table(results: dict[str, list[dict[str, float]]], seeds: list[int]) -> str:
    lines = ["| | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean (s.e.) | seconds |", "|---" * (len(seeds) + 3) + "|"]
    for mode, runs in results.items():
        mean, error = summary(runs)
        cells = [f"{run['accuracy']:.3f}" for run in runs]
        seconds = statistics.fmean(run["seconds"] for run in runs)
        lines.append(f"| {mode} | " + " | ".join(cells) + f" | {mean:.3f} ({error:.3f}) | {seconds:.0f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, list[dict[str, float]]]:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel_modes", description=__doc__, formatter_class=raw)
    parser.add_argument("--config", default="rl_tiny", help="file in configs/ without .yaml")
    parser.add_argument("--seeds", type=lambda text: [int(word) for word in text.split(",")], default=[1, 2, 3])
    parser.add_argument("--modes", type=lambda text: text.split(","), default=list(MODES), help=", ".join(MODES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--workers", type=int, default=4, help="jobs at a time")
    parser.add_argument("--folder", type=Path, default=Path("runs/parallel_modes"))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the RL runs")
    parser.add_argument("--set-sft", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the finetuning")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    a = parser.parse_args(argv)
    with ThreadPoolExecutor(a.workers) as pool:
        models = list(pool.map(lambda seed: finetune(a.folder, a.config, seed, a.set_sft), a.seeds))
        jobs = {
            mode: [
                pool.submit(train, a.folder, a.config, seed, mode, a.processes, model, a.set)
                for seed, model in zip(a.seeds, models, strict=True)
            ]
            for mode in a.modes
        }
        results = {mode: [job.result() for job in of_mode] for mode, of_mode in jobs.items()}
    print(table(results, a.seeds))
    if len(results) > 1:
        one, other, gap = furthest(results)
        print(f"furthest apart: {one} and {other}, {gap:.1f} standard errors", flush=True)
    if a.out is not None:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {"config": a.config, "seeds": a.seeds, "processes": a.processes, "settings": a.set}
        a.out.write_text(json.dumps({**settings, "results": results}, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()

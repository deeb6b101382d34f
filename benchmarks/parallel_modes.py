"""One RL run on one process and on several, under DDP and ZeRO: the solve rates they end with, over seeds.

    python -m benchmarks.parallel_modes --seeds 1,2,3 --processes 2 --workers 12 --out benchmarks/baselines/parallel_modes.json
    python -m benchmarks.parallel_modes --config rl_small --seeds 1,2,3 --processes 2 --workers 12

Each seed finetunes one model (the config's `model.prepare_config`) in one process, and every mode trains it by the same config.
Jobs are processes, `--workers` at a time; each gets the GPUs that the fewest processes are on, and they share what is compiled.
Rates are those of the last evaluation in the run; beside them the mean solve rate of its last third of steps, which is of many more
tasks. Two modes are as far apart as the means over seeds differ, in standard errors of that difference: of the tasks, or of the
seeds, whichever is larger.

A job that fails is started once more and goes on where it was, and `--out` is written whenever a job has ended. What a job has
printed and what it has ended with are beside its run directory (.log, .json): the same call again runs what is missing, so that
modes can be measured one after the other.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

from benchmarks.demo import ROOT, call, shared_caches
from common.launch import visible_gpus
from common.metrics import read_metrics

MODES = {"one process": None, "ddp": "null", "zero2": "1_node_{}_gpus_deepspeed_zero2", "zero3": "1_node_{}_gpus_deepspeed_zero3"}
"""By name `experiment.deepspeed_file`, {} being the number of processes; None: of the run in one process."""
ATTEMPTS = 2
Run = dict[str, float]
"""Accuracy, its standard error, seconds; of RL the solve rate of the last third of steps."""


class Gpus:
    """Who is on which GPU: a job gets those with the fewest processes on them."""

    def __init__(self, ids: list[str]) -> None:
        self.processes = dict.fromkeys(ids, 0)
        self.lock = threading.Lock()

    @classmethod
    def visible(cls) -> Gpus:
        number, named = visible_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")
        return cls([str(n) for n in range(number)] if named is None else named.split(",")[:number])

    @contextmanager
    def take(self, number: int) -> Iterator[dict[str, str]]:
        """The environment of a job of `number` processes; nothing where there are no GPUs."""
        with self.lock:
            taken = sorted(self.processes, key=lambda gpu: self.processes[gpu])[:number]
            self.processes |= {gpu: self.processes[gpu] + 1 for gpu in taken}
        try:
            yield {"CUDA_VISIBLE_DEVICES": ",".join(taken)} if taken else {}
        finally:
            with self.lock:
                self.processes |= {gpu: self.processes[gpu] - 1 for gpu in taken}


class Comparison:
    """The jobs of one call, and what they have ended with."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.gpus = arguments, Gpus.visible()
        # Compiled in the process itself: a pool of compilers in each job would be hundreds.
        self.environment = {"TORCHINDUCTOR_COMPILE_THREADS": os.environ.get("TORCHINDUCTOR_COMPILE_THREADS", "1")}
        self.environment |= shared_caches(arguments.folder)
        self.started = time.perf_counter()
        self.lock = threading.Lock()
        self.finetuning: list[Run | None] = [None] * len(arguments.seeds)
        """By seed."""
        self.results: dict[str, list[Run | None]] = {mode: [None] * len(arguments.seeds) for mode in arguments.modes}
        """By mode and seed; None: not ended, or failed."""

    def run(self) -> None:
        """All jobs. Raises SystemExit, when the others have ended, where one has failed."""
        a = self.arguments
        (ROOT / a.folder).mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(a.workers) as pool:
            # The finetuning jobs are the first in the pool's queue, so those that wait for them keep nobody waiting in vain.
            models = [pool.submit(self.finetune, index) for index in range(len(a.seeds))]
            jobs = [pool.submit(self.train, mode, n, models[n]) for n in range(len(a.seeds)) for mode in a.modes]
        failures = [failure for job in (*models, *jobs) if (failure := job.exception()) is not None]
        for failure in failures:
            if not isinstance(failure, SystemExit):
                raise failure
        if failures:
            failed = sum(job.exception() is not None for job in jobs)
            sys.exit(f"{failed} of {len(jobs)} runs have failed: their logs are in {a.folder}")

    def finetune(self, index: int) -> Path:
        """The checkpoint that all modes of a seed start from."""
        from configs.load import read_config

        a, seed = self.arguments, self.arguments.seeds[index]
        prepare = read_config("rl", [f"config=configs/{a.config}.yaml"]).model.prepare_config
        project = a.folder / f"sft_{seed}"
        settings = [f"config={prepare}", f"training.seed={seed}", "experiment.num_processes=1", *a.set_sft]
        self.finetuning[index] = self.job("train/sft.py", project, 1, settings)
        self.ended(f"seed {seed}, finetuning", self.finetuning[index])
        return project / "ckpt" / "optimized"

    def train(self, mode: str, index: int, model: Future[Path]) -> None:
        a, seed, file = self.arguments, self.arguments.seeds[index], MODES[mode]
        processes = 1 if file is None else a.processes
        settings = [
            f"config=configs/{a.config}.yaml",
            f"training.seed={seed}",
            f"model.pretrained_model={model.result()}",
            "model.prepare_config=null",
            f"experiment.num_processes={processes}",
            f"experiment.deepspeed_file={'null' if file is None else file.format(processes)}",
            *a.set,
        ]
        self.results[mode][index] = self.job("rl.py", a.folder / f"{mode.replace(' ', '_')}_{seed}", processes, settings)
        self.ended(f"seed {seed}, {mode}", self.results[mode][index])

    def job(self, script: str, project: Path, processes: int, settings: list[str]) -> Run:
        """The last evaluation of a run, and its seconds (of the attempt that ended well)."""
        log, kept = ROOT / f"{project}.log", ROOT / f"{project}.json"
        arguments = [*settings, f"experiment.project={project}"]
        if kept.is_file() and (before := json.loads(kept.read_text()))["settings"] == arguments:
            return before["run"]
        log.unlink(missing_ok=True)
        for attempt in range(1, ATTEMPTS + 1):
            with self.gpus.take(processes) as place:
                try:
                    environment = {**self.environment, **place}
                    seconds = call(script, *arguments, quiet=True, environment=environment, log=log)
                    rows = read_metrics(ROOT / project)
                    run = {**last_evaluation(rows), **late_rate(rows), "seconds": seconds}
                    kept.write_text(json.dumps({"settings": arguments, "run": run}))
                    return run
                except SystemExit:
                    end = log.read_text(errors="replace").splitlines()[-15:]
                    print(f"{project}, attempt {attempt} has failed:", *end, sep="\n    ", flush=True)
                    if attempt == ATTEMPTS:
                        raise
        raise AssertionError("not reached")

    def ended(self, name: str, run: Run) -> None:
        """Say it, and keep it."""
        seconds = time.perf_counter() - self.started
        print(f"{name}: {run['accuracy']:.3f}, {run['seconds']:.0f} s, ended at {seconds:.0f} s", flush=True)
        self.write()

    def write(self) -> None:
        a = self.arguments
        if a.out is None:
            return
        settings = {"config": a.config, "seeds": a.seeds, "processes": a.processes, "settings": a.set, "settings_sft": a.set_sft}
        ended = {"finetuning": self.finetuning, "results": self.results}
        with self.lock:
            a.out.parent.mkdir(parents=True, exist_ok=True)
            a.out.write_text(json.dumps({**settings, **ended}, indent=1) + "\n")


def last_evaluation(rows: list[dict[str, Any]]) -> Run:
    """Accuracy and standard error of the last step that has them."""
    found = [row for row in rows if any(key.startswith("eval/") and key.endswith("/accuracy") for key in row)]
    assert found, "the run has no evaluation: its dataset.eval_dataset, its evaluation.if_eval?"
    return {
        name: next(value for key, value in found[-1].items() if key.startswith("eval/") and key.endswith(f"/{name}"))
        for name in ("accuracy", "standard_error")
    }


def late_rate(rows: list[dict[str, Any]]) -> Run:
    """Mean solve rate of the last third of RL steps; nothing of other runs."""
    rates = [row["rollout/solve_rate"] for row in rows if "rollout/solve_rate" in row]
    return {"late_solve_rate": statistics.fmean(rates[-max(1, len(rates) // 3) :])} if rates else {}


def summary(runs: list[Run]) -> tuple[float, float]:
    """Mean accuracy over seeds, and its standard error."""
    rates, number = [run["accuracy"] for run in runs], len(runs)
    of_tasks = sum(run["standard_error"] ** 2 for run in runs) ** 0.5 / number
    of_seeds = statistics.stdev(rates) / number**0.5 if number > 1 else 0.0
    return statistics.fmean(rates), max(of_tasks, of_seeds)


def furthest(results: dict[str, list[Run]]) -> tuple[str, str, float]:
    """The two modes that are furthest apart, in standard errors of their difference."""

    def apart(pair: tuple[str, str]) -> float:
        (one, one_error), (other, other_error) = (summary(results[mode]) for mode in pair)
        gap, error = abs(one - other), (one_error**2 + other_error**2) ** 0.5
        return gap / error if error else float("inf") if gap else 0.0

    pair = max(itertools.combinations(results, 2), key=apart)
    return *pair, apart(pair)


def table(results: dict[str, list[Run | None]], seeds: list[int]) -> str:
    """A run that has not ended is a dash."""
    names = [*(f"seed {seed}" for seed in seeds), "mean (s.e.)", "last third of steps", "seconds"]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for mode, runs in results.items():
        there = [run for run in runs if run is not None]
        mean, error = summary(there) if there else (float("nan"), float("nan"))
        late, seconds = (mean_of(there, name) for name in ("late_solve_rate", "seconds"))
        cells = ["-" if run is None else f"{run['accuracy']:.3f}" for run in runs]
        lines.append("| " + " | ".join([mode, *cells, f"{mean:.3f} ({error:.3f})", f"{late:.3f}", f"{seconds:.0f}"]) + " |")
    return "\n".join(lines)


def mean_of(runs: list[Run], name: str) -> float:
    """Over the runs that have it; nan: none has."""
    values = [run[name] for run in runs if name in run]
    return statistics.fmean(values) if values else float("nan")


def main(argv: list[str] | None = None) -> dict[str, list[Run | None]]:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel_modes", description=__doc__, formatter_class=raw)
    parser.add_argument("--config", default="rl_tiny", help="file in configs/ without .yaml")
    parser.add_argument("--seeds", type=lambda text: [int(word) for word in text.split(",")], default=[1, 2, 3])
    parser.add_argument("--modes", type=lambda text: text.split(","), default=list(MODES), help=", ".join(MODES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--workers", type=int, default=4, help="jobs at a time")
    parser.add_argument("--folder", type=Path, help="default: runs/parallel_modes/CONFIG")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the RL runs")
    parser.add_argument("--set-sft", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the finetuning")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    a = parser.parse_args(argv)
    a.folder = a.folder or Path("runs/parallel_modes") / a.config
    comparison = Comparison(a)
    try:
        comparison.run()
    finally:
        print(table(comparison.results, a.seeds), flush=True)
    if len(a.modes) > 1:
        one, other, gap = furthest(comparison.results)
        print(f"furthest apart: {one} and {other}, {gap:.1f} standard errors", flush=True)
    return comparison.results


if __name__ == "__main__":
    main()

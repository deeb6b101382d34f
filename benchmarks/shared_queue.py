"""Several ranks that take their prompts from one queue, against prompts dealt out by index: how long each rank is busy.

    python -m benchmarks.shared_queue --shape sdar-4b --ranks 2 --active 128
    python -m benchmarks.shared_queue --shape tiny --device cpu --ranks 2 --active 8 --shrink 64

The realistic run of benchmarks/rollout.py, with random weights, one rank per GPU (on CPU, gloo): first to warm up, then with the
shared queue, then dealt out. The two ways have to give the same rollouts; on a GPU the size of a batch changes the rounding of
sums, so that there the share of equal ones is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.rollout import LONGEST, NUM_PROMPTS, NUM_SAMPLES, machine, realistic_requests, settings_of
from benchmarks.shapes import SHAPES, family_of, random_decoder
from common.launch import run_ranks


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """In every rank."""
    from common import dist
    from configs.load import load_config
    from sample.engine import build_engine
    from sample.rollout import sample_on_all_ranks

    if arguments.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
        torch.set_num_threads(1)
    config = load_config("eval", ["config=configs/tiny_eval.yaml", "dataset.eval_dataset=tiny_sort_test"])
    accelerator = dist.make_accelerator(config, trains=False)
    dtype = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
    decoder = random_decoder(arguments.shape, None, dtype, accelerator.device)
    engine = build_engine(decoder, family_of(arguments.shape), arguments.active)
    requests = realistic_requests(arguments.shape, shrink=arguments.shrink)
    settings = settings_of(arguments.shape, LONGEST, arguments.reveal)
    results, found = [], {}
    for name, by_index in [("warm", False), ("shared", False), ("by index", True)]:
        dist.barrier(accelerator)
        started = time.perf_counter()
        rollouts = sample_on_all_ranks(_Timed(engine), requests, settings, accelerator, 0, name, by_index)
        seconds = time.perf_counter() - started
        busy = dist.gather_objects(accelerator, (_Timed.finished - started, engine.statistics.sequences))
        assert len(rollouts) == NUM_PROMPTS * NUM_SAMPLES == sum(count for _, count in busy)
        found[name] = [r.response_ids for r in rollouts]
        if name != "warm":
            tokens = sum(r.num_response for r in rollouts)
            results.append(
                {
                    "run": name,
                    "ranks": accelerator.num_processes,
                    "shape": arguments.shape,
                    "active": arguments.active,
                    "seconds": seconds,
                    "tokens_per_second": tokens / seconds,
                    "busy_seconds": [one for one, _ in busy],
                    "sequences": [count for _, count in busy],
                }
            )
    same = sum(a == b for a, b in zip(found["shared"], found["by index"], strict=True)) / len(found["shared"])
    for result in results:
        result["equal_rollouts"] = same
    if accelerator.device.type == "cpu":
        assert same == 1, f"only {same:.1%} of the rollouts are equal"
    if accelerator.is_main_process:
        for result in results:
            print(json.dumps(result), flush=True)
        if arguments.out is not None:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps({"machine": machine(accelerator.device), "results": results}, indent=2) + "\n")
    return results


class _Timed:
    """An engine that remembers when it was through: what follows waits for the other ranks."""

    finished = 0.0

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def generate(self, *arguments: Any) -> Any:
        rollouts = self.engine.generate(*arguments)
        _Timed.finished = time.perf_counter()
        return rollouts


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shared_queue", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", default="sdar-4b", choices=[name for name in SHAPES if family_of(name).attention == "block"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--active", type=int, default=128, help="sequences in flight, of each rank")
    parser.add_argument("--reveal", type=int, default=2)
    parser.add_argument("--shrink", type=int, default=1, help="divides all lengths")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        measure(arguments)
    else:
        sys.exit(run_ranks([sys.executable, "-m", "benchmarks.shared_queue", *sys.argv[1:]], arguments.ranks))


if __name__ == "__main__":
    main()

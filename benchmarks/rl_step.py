"""Whole RL steps on 1, 2, 4, 8 GPUs: seconds of every phase, of the weights' way to the engine, and what each rank idles.

    python -m benchmarks.rl_step --shape sdar-1.7b --gpus 1,2,4,8 --scaling weak,strong --out benchmarks/baselines/rl_step.json
    python -m benchmarks.rl_step --shape sdar-8b --gpus 2 --zero 3 --tasks 8 --steps 2
    python -m benchmarks.rl_step --shape tiny --device cpu --gpus 1,2 --tasks 2 --samples 2 --response 16 --prompt 8

Random weights of the published shape, made on the machine, bfloat16 under DeepSpeed (ZeRO-1 on one GPU, where there is nothing to
share); AdamW. A step is what rl.py does, with its own pieces: weights to the engine, rollout from the shared queue, (random)
rewards and advantages, one update. The loop is its own: optimizer states stay on the GPU in it. Random weights say no stop token,
so every response is as long as it is asked to be: lognormal around 0.4 of --response, cut there.

Weak scaling: `--tasks` tasks for every GPU. Strong: as many in all as that makes for the most GPUs. Efficiency is in response
tokens per second and GPU, against the fewest GPUs of the call (of the update alone in packed tokens). Idle share: what a rank waits
in the rollout for the last one, as a share of the step. Behind `--warm-up` steps (kernels are compiled, graphs captured) the median
of `--steps` is taken; the seconds of all steps stand beside it. The memory's peak, as torch counts it, stands beside the estimate
(docs/scaling.md).

`--out` is written after every point, so that one that fails loses no other. Points of other calls, say of one beside this on other
GPUs of the machine (CUDA_VISIBLE_DEVICES), are put beside this call's by `--join FILE ...`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.shapes import SHAPES, family_of, mask_id_of, random_decoder
from common.launch import run_ranks

PHASES = ("weights", "rollout", "reward", "update")
GIB = 2**30


# ------------------------------------------------------------------------------------------------------------ in every rank


def overrides(arguments: argparse.Namespace, num_ranks: int) -> list[str]:
    """The settings of the step."""
    zero = arguments.zero if num_ranks > 1 else min(arguments.zero, 1)
    file = f"1_node_{num_ranks}_gpus_deepspeed_zero{zero}"
    return [
        "config=configs/rl_tiny.yaml",
        "experiment.project=runs/rl_step",  # nothing is written there but what is compiled
        f"experiment.deepspeed_file={file}",
        "model.prepare_config=null",
        f"training.mixed_precision={'bf16' if arguments.device == 'cuda' else 'no'}",
        f"training.gradient_checkpointing_enable={arguments.recompute}",
        f"training.max_tokens_per_microbatch={arguments.budget}",
        f"training.fused_kernels={arguments.fused}",
        f"training.max_prompt_len={arguments.prompt}",
        f"rollout.max_token={arguments.response}",
        f"rollout.max_active={arguments.active}",
        f"rollout.num_response_per_task={arguments.samples}",
        "optimizer.params.learning_rate=1e-6",
        "lr_scheduler.scheduler=constant",
    ]


def step_requests(arguments: argparse.Namespace, num_tasks: int, step: int) -> list[Any]:
    """Tasks of a step: prompts of a quarter to the whole of `--prompt`, and how long each of their responses has to be.

    Lengths come again after `--tasks` tasks: so weak scaling has the same work for every GPU, and not what chance makes of it.
    """
    from sample.engine import Request

    requests = []
    for n in range(num_tasks):
        rng = np.random.default_rng([arguments.seed, step, n % arguments.tasks])
        num_prompt = rng.integers(max(1, arguments.prompt // 4), arguments.prompt + 1)
        lengths = rng.lognormal(np.log(0.4 * arguments.response), 0.6, arguments.samples)
        prompt = np.random.default_rng([arguments.seed, step, n]).integers(0, mask_id_of(arguments.shape), num_prompt)
        lengths = np.clip(lengths, 4, arguments.response).astype(int)
        requests.append(Request(f"step {step} task {n}", prompt.tolist(), arguments.samples, tuple(lengths.tolist())))
    return requests


class Timed:
    """An engine that remembers when it was through: what follows waits for the other ranks."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.finished = engine, 0.0

    def generate(self, *arguments: Any) -> Any:
        rollouts = self.engine.generate(*arguments)
        self.finished = time.perf_counter()
        return rollouts


class Step:
    """The pieces of rl.py around a model of random weights."""

    def __init__(self, arguments: argparse.Namespace, num_ranks: int) -> None:
        from common import dist
        from configs.load import load_config
        from models.checkpoint import Pretrained
        from models.family import usual_keys
        from models.kernels.launch import set_fused
        from sample.engine import SamplingSettings, build_engine
        from train.engine_weights import EngineWeights
        from train.policy import policy_trainer
        from train.rl import PolicyUpdate
        from train.run import gpu_memory

        self.arguments = arguments
        self.config = load_config("rl", overrides(arguments, num_ranks))
        self.accelerator = dist.make_accelerator(self.config)
        assert self.accelerator.num_processes == num_ranks
        device = self.accelerator.device
        dist.set_numerics(self.config, device)
        set_fused(self.config.training.fused_kernels)
        family, mask_id = family_of(arguments.shape), mask_id_of(arguments.shape)
        decoder = random_decoder(arguments.shape, arguments.layers, dist.weights_dtype(self.config), device)
        self.family, self.shape, self.decoder = family, decoder.config, decoder
        facts = {**usual_keys(decoder.config), "pad_token_id": 0, "eos_token_id": 0}
        model = Pretrained(decoder, family, None, facts, None, mask_id)
        trainer = policy_trainer(model, self.config, self.accelerator, self.config.rollout.temperature)
        gpu_bytes = gpu_memory(self.accelerator)
        if gpu_bytes is not None and self.config.training.gradient_checkpointing_enable == "auto":
            decoder.recomputed_layers = self.setup(gpu_bytes).num_recomputed
        self.trainer, self.update = trainer, PolicyUpdate(trainer, self.config, model.fill_id)
        self.weights = EngineWeights(self.accelerator, model)
        self.engine = build_engine(self.weights.decoder, family, arguments.active, "auto")
        self.settings = SamplingSettings(
            max_tokens=arguments.response,
            mask_id=mask_id,
            forbidden_ids=tuple(model.forbidden_ids),
            block_size=self.config.rollout.block_size,
            steps_per_block=-(-self.config.rollout.block_size // arguments.reveal),
            seed=arguments.seed,
        )

    def __call__(self, num_tasks: int, step: int) -> dict[str, Any]:
        """Seconds (of the slowest rank), tokens, and what every rank waited."""
        from common import dist

        watch, timed = dist.Stopwatch(self.accelerator), Timed(self.engine)
        requests = step_requests(self.arguments, num_tasks, step)
        peaks = {}
        dist.barrier(self.accelerator)
        started = time.perf_counter()
        self.reset_peak()
        with watch("weights"):
            self.weights.refresh(self.trainer.num_steps)
        with watch("rollout"):
            rollouts = self.sample(timed, requests, step)
            waited = time.perf_counter() - timed.finished
            self.engine.release()
        peaks["rollout"] = self.peak()
        with watch("reward"):
            scored = self.score(rollouts, step)
        with watch("update"):
            metrics = self.update(scored, step)
        peaks["update"] = self.peak()
        dist.barrier(self.accelerator)
        whole = time.perf_counter() - started
        return {
            "seconds": {**watch.slowest(), "step": whole},
            "idle_share": [wait / whole for wait in dist.gather_objects(self.accelerator, waited)],
            "tokens": sum(r.num_response for r in rollouts),
            "packed_tokens": metrics["train/num_tokens"],
            "gap": metrics["gap/logprob_mean"],
            "graphs": max(dist.gather_objects(self.accelerator, self.engine.statistics.graphs)),
            "peak_gib": {name: max(dist.gather_objects(self.accelerator, value)) for name, value in peaks.items()},
        }

    def sample(self, engine: Timed, requests: list[Any], step: int) -> list[Any]:
        from sample.rollout import sample_on_all_ranks

        rollouts = sample_on_all_ranks(engine, requests, self.settings, self.accelerator, self.trainer.num_steps, f"step {step}")
        wanted = [length for request in requests for length in request.max_tokens]
        assert [r.num_response for r in rollouts] == wanted, "a response has another length than it was asked to have"
        return rollouts

    def score(self, rollouts: list[Any], step: int) -> list[Any]:
        """Random rewards, the same on every rank."""
        from common.records import ScoredRollout
        from reward.advantages import group_advantages

        rewards = np.random.default_rng([self.arguments.seed, step, 1]).random(len(rollouts))
        advantages = group_advantages(rewards.tolist(), [r.task_id for r in rollouts], self.config.training.advantage)
        rows = zip(rollouts, rewards.tolist(), advantages.tolist(), strict=True)
        return [ScoredRollout(**vars(rollout), reward=reward, advantage=advantage) for rollout, reward, advantage in rows]

    def reset_peak(self) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        """GiB since the last call."""
        if self.accelerator.device.type != "cuda":
            return 0.0
        value = torch.cuda.max_memory_allocated() / GIB
        self.reset_peak()
        return value

    def setup(self, gpu_bytes: float) -> Any:
        """What the memory's estimate goes by (train/memory_items.py)."""
        from common import dist
        from train.memory_estimate import setup_of

        sharding = dist.sharding(self.accelerator)
        return setup_of(self.config, "rl", self.family, self.shape, self.accelerator.num_processes, gpu_bytes, sharding=sharding)

    def estimate(self) -> dict[str, float]:
        """GiB that train/memory_items.py says torch will count; of the rollout without the cache, which torch does not see."""
        from train.memory_items import estimate

        items = estimate(dataclasses.replace(self.setup(1e15), recomputed_layers=self.decoder.recomputed_layers))
        rollout = sum(item.rollout for item in items if not item.name.startswith("keys and values"))
        return {"rollout": rollout / GIB, "update": sum(item.update for item in items) / GIB}


def measure(arguments: argparse.Namespace, num_ranks: int, scaling: str, file: Path) -> None:
    """One point, in every rank; the main one writes it to `file`."""
    from common import dist
    from models.kernels.launch import fused_is_on

    if arguments.device == "cpu":
        torch.set_num_threads(1)
    num_tasks = arguments.tasks * (num_ranks if scaling == "weak" else max(arguments.gpus))
    started = time.perf_counter()
    step = Step(arguments, num_ranks)
    start_seconds, steps = time.perf_counter() - started, []
    for n in range(1, arguments.warm_up + arguments.steps + 1):
        steps.append(step(num_tasks, n))
        if step.accelerator.is_main_process:  # of a call that is cut short, too
            phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in steps[-1]["seconds"].items())
            print(f"  step {n}: {phases} s, {steps[-1]['graphs']} graphs captured", file=sys.stderr, flush=True)
    if step.accelerator.is_main_process:
        result = {
            "shape": arguments.shape,
            "layers": step.shape.num_layers,
            "scaling": scaling,
            "gpus": num_ranks,
            "zero": arguments.zero if num_ranks > 1 else min(arguments.zero, 1),
            "fused_kernels": fused_is_on(),
            "recomputed_layers": step.decoder.recomputed_layers,
            "responses": num_tasks * arguments.samples,
            **summarize(steps[arguments.warm_up :]),
            "start_seconds": start_seconds,  # model and optimizer, without imports
            "seconds_of_steps": [s["seconds"]["step"] for s in steps],  # the warm-up first
            "estimated_gib": step.estimate(),
        }
        device = torch.cuda.get_device_name() if step.accelerator.device.type == "cuda" else "CPU"
        file.write_text(json.dumps({"device": device, "torch": torch.__version__, "result": result}))
    dist.end_together(step.accelerator)


# ------------------------------------------------------------------------------------------------------------------ figures


def summarize(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """The median step: by phase, by rank."""

    def median(values: Any) -> float:
        return float(np.median(list(values)))

    seconds = {name: median(s["seconds"][name] for s in steps) for name in (*PHASES, "step")}
    return {
        "seconds": seconds,
        "weights_to_engine_seconds": seconds["weights"],
        "tokens_per_second": median(s["tokens"] / s["seconds"]["step"] for s in steps),
        "rollout_tokens_per_second": median(s["tokens"] / s["seconds"]["rollout"] for s in steps),
        "update_packed_tokens_per_second": median(s["packed_tokens"] / s["seconds"]["update"] for s in steps),
        "idle_share": [median(shares) for shares in zip(*(s["idle_share"] for s in steps), strict=True)],
        "gap_logprob_mean": max(s["gap"] for s in steps),
        "graphs_captured": sum(s["graphs"] for s in steps),
        "peak_gib": {name: max(s["peak_gib"][name] for s in steps) for name in ("rollout", "update")},
    }


def add_efficiency(results: list[dict[str, Any]]) -> None:
    """Response tokens per second and GPU, against the fewest GPUs of the same scaling: of the step, the rollout, the update."""
    for scaling in {r["scaling"] for r in results}:
        own = [r for r in results if r["scaling"] == scaling]
        base = min(own, key=lambda r: r["gpus"])
        for key in ("tokens_per_second", "rollout_tokens_per_second", "update_packed_tokens_per_second"):
            name = (
                key.removesuffix("_packed_tokens_per_second").removesuffix("_tokens_per_second").removesuffix("tokens_per_second")
            )
            for r in own:
                r[f"{name or 'step'}_efficiency"] = (r[key] / r["gpus"]) / (base[key] / base["gpus"])


def line(r: dict[str, Any]) -> str:
    phases = ", ".join(f"{name} {r['seconds'][name]:.2f}" for name in PHASES)
    idle = "/".join(f"{share:.1%}" for share in r["idle_share"])
    return (
        f"{r['scaling']}, {r['gpus']} GPUs, ZeRO-{r['zero']}: step {r['seconds']['step']:.2f} s ({phases}), "
        f"{r['tokens_per_second']:,.0f} tokens/s, idle {idle}, gap {r['gap_logprob_mean']:.1e}, update's peak "
        f"{r['peak_gib']['update']:.1f} GiB (estimate {r['estimated_gib']['update']:.1f})"
    )


def report(results: list[dict[str, Any]]) -> None:
    for r in results:
        shares = ", ".join(f"{name} {r[f'{name}_efficiency']:.1%}" for name in ("step", "rollout", "update"))
        print(f"{r['scaling']}, {r['gpus']} GPUs: efficiency {shares}", flush=True)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rl_step", description=__doc__, formatter_class=raw)
    blocks = [name for name in SHAPES if family_of(name).attention == "block"]
    counts = lambda text: [int(word) for word in text.split(",")]  # noqa: E731
    parser.add_argument("--shape", default="sdar-1.7b", choices=blocks)
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--gpus", type=counts, default=[1], help="processes, several by commas (those of accelerate_configs/)")
    parser.add_argument("--scaling", default="weak", help="weak, strong or both by a comma")
    parser.add_argument("--zero", type=int, default=2, choices=[1, 2, 3])
    parser.add_argument("--tasks", type=int, default=16, help="of each GPU (weak scaling)")
    parser.add_argument("--samples", type=int, default=8, help="responses of a task")
    parser.add_argument("--prompt", type=int, default=200, help="longest prompt, tokens")
    parser.add_argument("--response", type=int, default=1000, help="longest response, tokens")
    parser.add_argument("--reveal", type=int, default=2, help="tokens a forward")
    parser.add_argument("--active", type=int, default=128, help="sequences in flight, of each GPU")
    parser.add_argument("--budget", type=int, default=16_384, help="tokens of a pack")
    parser.add_argument("--fused", action=argparse.BooleanOptionalAction, default=True, help="training.fused_kernels")
    parser.add_argument("--recompute", default="auto", choices=["auto", "true", "false"], help="layers in the backward")
    parser.add_argument("--warm-up", type=int, default=1, help="steps before the clock runs")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--join", type=Path, nargs="*", default=[], help="JSON files of other calls, for efficiency beside them")
    parser.add_argument("--point", nargs=2, metavar=("SCALING", "FILE"), help=argparse.SUPPRESS)
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(argv)
    scalings = arguments.scaling.split(",")
    if not set(scalings) <= {"weak", "strong"}:
        parser.error(f"--scaling: got {arguments.scaling}, meant is weak, strong or both")
    if arguments.point is not None:
        measure(arguments, int(os.environ["WORLD_SIZE"]), arguments.point[0], Path(arguments.point[1]))
        return []
    joined = [json.loads(file.read_text()) for file in arguments.join]
    results, commands = [r for one in joined for r in one["results"]], [one["command"] for one in joined]
    commands.append(subprocess.list2cmdline(["python", "-m", "benchmarks.rl_step", *argv]))
    with tempfile.TemporaryDirectory(prefix="unmask-rl-step-") as folder:
        for scaling in scalings:
            for gpus in arguments.gpus:
                file = Path(folder) / f"{scaling}_{gpus}.json"
                command = [sys.executable, "-m", "benchmarks.rl_step", *argv, "--point", scaling, str(file)]
                code = run_ranks(command, gpus)
                if code:
                    sys.exit(code)
                found = json.loads(file.read_text())
                results.append(found.pop("result"))
                print(line(results[-1]), flush=True)
                add_efficiency(results)
                if arguments.out is not None:
                    written = {"machine": found, "command": "; ".join(commands), "results": results}
                    arguments.out.parent.mkdir(parents=True, exist_ok=True)
                    arguments.out.write_text(json.dumps(written, indent=1) + "\n")
    report(results)
    return results


if __name__ == "__main__":
    main()

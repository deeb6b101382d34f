"""Tokens per second of the sampler, beside what the machine allows and beside the plain torch engine.

    python -m benchmarks.rollout --shape sdar-4b --active 1,16,64,128,256 --reveal 1,2 --out benchmarks/baselines/rollout.json
    python -m benchmarks.rollout --shape sdar-8b --active 128 --reveal 1 --profile
    python -m benchmarks.rollout --shape sdar-4b --active 128 --reveal 2 --realistic
    python -m benchmarks.rollout --shape sdar-8b --startup
    python -m benchmarks.rollout --shape llada-8b --active 1,32 --caches none,prefix,horizon32,horizon64,dual
    python -m benchmarks.rollout --shape tiny --device cpu --active 2 --context 40 --steps 4

Random weights of the published shape, made on the device; they never say a stop token, so lengths are what is asked for.

- Steady state (the default): `--active` sequences in flight in every forward, all near `--context` tokens, `--reveal` tokens a
  forward and sequence; nobody comes or goes. The clock runs over `--steps` forwards behind a warm-up. The sequences stand at
  different places of their blocks, so that finished blocks come evenly.
- `--strategy dynamic`: not a fixed number of tokens a forward, but each masked token with the chance that gives `--reveal` on
  average (low_confidence_dynamic over random scores): how many blocks are finished and how many rows masked then changes from
  forward to forward.
- `--realistic`: behind the steady run, 64 prompts of 50 to 400 tokens, 16 responses each, of lognormal lengths up to 2,000. The
  rate is that from the start, prefill included, until a tenth of the responses is left. Beside it the limit for `--active`
  sequences of the mean context that is seen until then.
- `--startup`: seconds from the start of a process to its first tokens, with an empty cache of compiled kernels and with a full one.
- Full attention (canvases): 256 new tokens in blocks of 32 behind a prompt of 200, with every cache (benchmarks/canvas_rollout.py).

The limit is benchmarks/limits.py's, at ceilings that are measured first. The split of a forward comes from a profile of the steps
behind the clock's, at a somewhat longer context; gaps are what of them no kernel ran in (profiling widens them a little).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import heapq
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import torch

from benchmarks.canvas_rollout import run_canvas
from benchmarks.kernel_times import summarize
from benchmarks.limits import Ceilings, Work, block_work, chance_of, measure_ceilings, random_block_work
from benchmarks.shapes import SHAPES, family_of, mask_id_of, random_decoder
from benchmarks.step_clock import Clock
from models.decoder import Decoder
from models.family import DecoderConfig
from sample.engine import Engine, Request, SamplingSettings, build_engine

WARM_UP = 16
"""Steps before the clock runs."""
BLOCK_SIZE = 4
NUM_PROMPTS, NUM_SAMPLES, LONGEST = 64, 16, 2000
"""Of the realistic run."""


# ----------------------------------------------------------------------------------------------------------- what is sampled


def settings_of(shape: str, max_tokens: int, reveal: int, strategy: str = "static") -> SamplingSettings:
    """Decoding of `reveal` tokens a forward, static or, on average, dynamic; at temperature 1, without stop tokens."""
    mask_id = mask_id_of(shape)
    forbidden = tuple(range(mask_id, SHAPES[shape].vocab_size))  # the mask, and ids beyond the tokenizer
    common = dict(max_tokens=max_tokens, mask_id=mask_id, forbidden_ids=forbidden, block_size=BLOCK_SIZE)
    if strategy == "static":
        return SamplingSettings(steps_per_block=-(-BLOCK_SIZE // reveal), **common)
    threshold = 1 - chance_of(BLOCK_SIZE, reveal)
    return SamplingSettings(strategy="low_confidence_dynamic", target="random", threshold=threshold, **common)


def steady_requests(shape: str, active: int, prompt: int) -> list[Request]:
    """Prompts of `prompt` tokens and up to a block more: their first blocks have every number of masked tokens."""
    rng = np.random.default_rng(active)
    lengths = [prompt + n % BLOCK_SIZE for n in range(active)]
    return [Request(f"task {n}", rng.integers(0, mask_id_of(shape), length).tolist()) for n, length in enumerate(lengths)]


def realistic_requests(shape: str, seed: int = 0, shrink: int = 1) -> list[Request]:
    """64 prompts x 16 responses, the lengths of the responses lognormal around 400 (sigma 0.9), cut at 2,000; all over `shrink`."""
    rng = np.random.default_rng(seed)
    requests = []
    for n in range(NUM_PROMPTS):
        prompt = rng.integers(0, mask_id_of(shape), max(1, rng.integers(50, 401) // shrink)).tolist()
        lengths = np.clip(rng.lognormal(np.log(400), 0.9, NUM_SAMPLES), 16, LONGEST).astype(int) // shrink
        requests.append(Request(f"task {n}", prompt, NUM_SAMPLES, tuple(max(1, int(length)) for length in lengths)))
    return requests


def mean_context(requests: list[Request], active: int, reveal: float) -> float:
    """What a forward of a sequence sees on average, from the start until a tenth of the responses is left: `active` of them in
    flight, admitted in their order, each of which reveals `reveal` tokens a forward until it has its own limit."""
    responses = [(len(request.prompt_ids), length) for request in requests for length in request.max_tokens]
    free = [0.0] * active  # when slots are free, in forwards
    begun = []
    for prompt, length in responses:
        start = heapq.heappop(free)
        heapq.heappush(free, start + length / reveal)
        begun.append((start, prompt, length))
    until = sorted(start + length / reveal for start, _, length in begun)[-(-9 * len(begun) // 10) - 1]
    # In the t forwards that a response has had until then, behind a prompt of p, it sees p + reveal * t / 2 on average.
    seen = [(min(length / reveal, until - start), prompt) for start, prompt, length in begun if start < until]
    return sum(forwards * (prompt + reveal * forwards / 2) for forwards, prompt in seen) / sum(forwards for forwards, _ in seen)


# -------------------------------------------------------------------------------------------------------------- measurements


def measure_steady(
    engine: Engine,
    shape: str,
    active: int,
    context: int,
    reveal: int,
    steps: int,
    profiled_steps: int,
    warm: bool,
    strategy: str = "static",
) -> dict[str, Any]:
    """Rates of `engine` over `steps` full steps around `context`, and where the time of `profiled_steps` behind them went.

    warm: run it all once before, for what is compiled and captured on the way.
    """
    last = WARM_UP + steps
    # A margin behind the measured steps: what the engine reports may be a step late, and the first blocks are shorter.
    most_tokens = (last + profiled_steps + 2 * BLOCK_SIZE) * reveal
    settings = settings_of(shape, most_tokens if strategy == "static" else most_tokens * 5 // 4, reveal, strategy)
    prompt = context - (WARM_UP + steps // 2) * reveal
    if prompt < 1:
        raise SystemExit(f"--context {context}: {steps} steps of {reveal} tokens need a longer one, or fewer --steps")
    requests = steady_requests(shape, active, prompt)
    if warm:
        engine.generate(requests, settings)
    clock = Clock(range(last, last + profiled_steps), engine.decoder.device)
    engine.generate(requests, settings, progress=clock)
    assert clock.counts[last + profiled_steps - 1][0] == 0, "a sequence was done before the measurement was"
    result: dict[str, Any] = clock.between(WARM_UP, last)
    result["statistics"] = dataclasses.asdict(engine.statistics)
    if profiled_steps:
        result["device_gib"] = clock.used_bytes / 2**30
        split = summarize(clock.profiler.events(), profiled_steps)
        result["split"] = split
    return result


def measure_realistic(
    engine: Engine, shape: str, reveal: int, shrink: int, warm: bool, strategy: str = "static"
) -> dict[str, Any]:
    """Rates of the realistic run: from its start until a tenth of the responses is left, and of the whole."""
    requests = realistic_requests(shape, shrink=shrink)
    settings = settings_of(shape, LONGEST, reveal, strategy)
    num_sequences = NUM_PROMPTS * NUM_SAMPLES
    if warm:
        engine.generate(realistic_requests(shape, shrink=16 * shrink), settings)
    clock = Clock(device=engine.decoder.device)
    engine.generate(requests, settings, progress=clock)
    until = next(n for n, (finished, *_) in enumerate(clock.counts) if finished >= 0.9 * num_sequences)
    seconds, (_, tokens, forwards) = clock.times[until] - clock.started, clock.counts[until]
    lengths = [length for request in requests for length in request.max_tokens]
    return {
        "mean_response": float(np.mean(lengths)),
        "longest_response": max(lengths),
        "mean_prompt": float(np.mean([len(request.prompt_ids) for request in requests])),
        "mean_context": mean_context(requests, min(engine.max_active, num_sequences), reveal),
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "mean_active": forwards / (until + 1),
        "whole_tokens_per_second": clock.counts[-1][1] / (clock.times[-1] - clock.started),
        "whole_seconds": clock.times[-1] - clock.started,
        "device_gib": clock.used_bytes / 2**30,
        "statistics": dataclasses.asdict(engine.statistics),
    }


# -------------------------------------------------------------------------------------------------------------- the runs


def work_of(config: DecoderConfig, setting: dict[str, Any], context: float, itemsize: int) -> Work:
    """Of an average forward of the setting, around `context`."""
    active, reveal = setting["active"], setting["reveal"]
    if setting["strategy"] == "static":
        return block_work(config, active, context, reveal, BLOCK_SIZE, itemsize)
    return random_block_work(config, active, context, chance_of(BLOCK_SIZE, reveal), BLOCK_SIZE, itemsize)


def run_block(arguments: Any, decoder: Decoder, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """Results of a block model: per setting the chosen engine, then the eager one."""
    family, device, itemsize = family_of(arguments.shape), decoder.device, decoder.dtype.itemsize
    for kind in dict.fromkeys([arguments.engine, "torch"]):
        eager = kind == "torch" and arguments.engine != "torch"
        steps = arguments.eager_steps if eager else arguments.steps
        if not steps:
            continue
        for active in arguments.active:
            engine = build_engine(decoder, family, active, kind)
            for reveal in arguments.reveal:
                profiled = 0 if device.type != "cuda" else min(8, steps) if eager else 200 if arguments.profile else 50
                steady = measure_steady(
                    *(engine, arguments.shape, active, arguments.context, reveal, steps, profiled),
                    warm=kind != "torch",
                    strategy=arguments.strategy,
                )
                setting = {
                    "shape": arguments.shape,
                    "engine": kind,
                    "active": active,
                    "strategy": arguments.strategy,
                    "reveal": reveal,
                }

                def against_limit(run: dict[str, Any], context: float, setting: dict[str, Any] = setting) -> dict[str, float]:
                    work = work_of(decoder.config, setting, context, itemsize)
                    limit = work.tokens_per_second(ceilings)
                    return {"limit_tokens_per_second": limit, "share_of_limit": run["tokens_per_second"] / limit}

                result = {"run": "steady", **setting, "context": arguments.context, **steady}
                result |= against_limit(steady, arguments.context)
                if not arguments.profile and "split" in result:
                    del result["split"]["longest_kernels"]
                yield result
                if arguments.realistic and not eager:
                    shown = measure_realistic(
                        engine, arguments.shape, reveal, arguments.shrink, warm=kind != "torch", strategy=arguments.strategy
                    )
                    shown["share_of_steady"] = shown["tokens_per_second"] / steady["tokens_per_second"]
                    yield {"run": "realistic", **setting, **shown, **against_limit(shown, shown["mean_context"])}
            engine.release()
            del engine
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def first_token(arguments: Any) -> None:
    """In a process of its own: build everything, and say when the first tokens are there."""
    decoder = random_decoder(arguments.shape, arguments.layers, arguments.dtype, arguments.device)
    seconds = {"weights": time.time()}
    engine = build_engine(decoder, family_of(arguments.shape), arguments.active[0], arguments.engine)

    class Done(Exception):
        pass

    def stop(finished: int, tokens: int, forwards: int) -> None:
        if tokens:
            seconds["first_token"] = time.time()
            raise Done

    prompt = max(1, min(arguments.context, 200))
    try:
        engine.generate(
            steady_requests(arguments.shape, arguments.active[0], prompt), settings_of(arguments.shape, 64, 1), progress=stop
        )
    except Done:
        pass
    print(json.dumps(seconds), flush=True)


def run_startup(arguments: Any, argv: list[str]) -> Iterator[dict[str, Any]]:
    """Seconds from a process's start to its first tokens: nothing compiled, then with what that run has left."""
    with tempfile.TemporaryDirectory(prefix="unmask-kernels-") as folder:
        for cache in ("cold", "warm"):
            environment = {**os.environ, "TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
            started = time.time()
            command = [sys.executable, "-m", "benchmarks.rollout", *argv, "--first-token"]
            answer = subprocess.run(command, env=environment, capture_output=True, text=True)
            if answer.returncode:
                raise SystemExit(answer.stderr)
            seconds = json.loads(answer.stdout.splitlines()[-1])
            yield {
                "run": "startup",
                "shape": arguments.shape,
                "engine": arguments.engine,
                "active": arguments.active[0],
                "kernel_cache": cache,
                "seconds_to_weights": seconds["weights"] - started,
                "seconds_to_first_token": seconds["first_token"] - started,
            }


# ---------------------------------------------------------------------------------------------------------- the command line


def line(result: dict[str, Any]) -> str:
    """A result in one line."""
    words = [result["run"], result["shape"], result["engine"], f"{result['active']} active"]
    words += [f"{result.get('strategy', '')} reveal {result['reveal']}".strip()] if "reveal" in result else []
    words += [str(result[key]) for key in ("cache", "kernel_cache") if key in result]
    if "tokens_per_second" in result:
        words.append(f"{result['tokens_per_second']:,.0f} tokens/s")
    if "ms_per_forward" in result:
        words += [f"{result['tokens_per_forward']:.2f} tokens/forward", f"{result['ms_per_forward']:.2f} ms"]
    for key, text in [("share_of_limit", "of the limit"), ("share_of_steady", "of the steady rate")]:
        words += [f"{result[key]:.1%} {text}"] if key in result else []
    if "graphs_captured_before" in result:
        words.append(f"{result['graphs_captured_before']} graphs captured before, {result['statistics']['graphs']} meanwhile")
    if "split" in result:
        split = result["split"]
        words.append(
            ", ".join(f"{group} {ms:.2f}" for group, ms in split["groups_ms"].items()) + f", gaps {split['gaps_ms']:.2f} ms"
        )
        waits = sum(split["waits_per_step"].values())
        words.append(f"{split['device_to_host_copies_per_step']:.2f} copies to the host and {waits:.2f} waits a step")
    if "device_gib" in result:
        words.append(f"{result['device_gib']:.1f} GiB")
    for key in ("seconds_to_weights", "seconds_to_first_token"):
        words += [f"{result[key]:.1f} {key.replace('_', ' ')}"] if key in result else []
    return " | ".join(words)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rollout", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    integers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--shape", default="sdar-4b", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, help="of the shape's (all)")
    parser.add_argument("--active", type=integers, help="sequences in flight, several by commas (128; full attention 1,32)")
    parser.add_argument("--context", type=int, default=1000, help="tokens that a sequence sees, on average")
    parser.add_argument("--reveal", type=integers, default=[1], help="tokens a forward, several by commas")
    parser.add_argument("--strategy", default="static", choices=["static", "dynamic"], help="of block models")
    parser.add_argument("--steps", type=int, default=200, help="forwards that are timed")
    parser.add_argument(
        "--eager-steps", type=int, default=16, help="of the torch engine beside another (canvases: all); 0: leave it out"
    )
    parser.add_argument("--engine", choices=["triton", "torch"], help="triton on a GPU, else torch")
    parser.add_argument("--realistic", action="store_true")
    parser.add_argument("--shrink", type=int, default=1, help="divides the lengths of the realistic run and of canvases")
    parser.add_argument("--caches", type=lambda text: text.split(","), default=["none", "prefix", "horizon32", "horizon64", "dual"])
    parser.add_argument("--profile", action="store_true", help="profile 200 steps, and list the longest kernels")
    parser.add_argument("--startup", action="store_true")
    parser.add_argument("--first-token", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args(argv)
    if arguments.strategy == "dynamic" and family_of(arguments.shape).attention != "block":
        parser.error(f"--strategy dynamic: got --shape {arguments.shape}, but canvases are measured with static alone")
    arguments.engine = arguments.engine or ("triton" if arguments.device.type == "cuda" else "torch")
    arguments.active = arguments.active or ([128] if family_of(arguments.shape).attention == "block" else [1, 32])
    arguments.dtype = torch.bfloat16 if arguments.device.type == "cuda" else torch.float32
    return arguments


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv)
    if arguments.first_token:
        first_token(arguments)
        return
    report: dict[str, Any] = {"machine": machine(arguments.device), "results": []}
    if arguments.startup:
        results = run_startup(arguments, argv)
    else:
        ceilings = measure_ceilings(arguments.device, arguments.dtype)
        report["ceilings"] = dataclasses.asdict(ceilings)
        print(f"ceilings: {ceilings.bandwidth / 1e12:.2f} TB/s, {ceilings.flops / 1e12:.0f} TFLOP/s", flush=True)
        decoder = random_decoder(arguments.shape, arguments.layers, arguments.dtype, arguments.device)
        run = run_block if family_of(arguments.shape).attention == "block" else run_canvas
        results = run(arguments, decoder, ceilings)
    for result in results:
        result |= {"ceilings": report["ceilings"]} if "ceilings" in report else {}  # rows of other runs may be put beside it
        report["results"].append(result)
        print(line(result), flush=True)
        if arguments.out is not None:  # after each: a run that is cut short leaves what it has
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(report, indent=2) + "\n")


def machine(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "torch": torch.__version__}


if __name__ == "__main__":
    main()

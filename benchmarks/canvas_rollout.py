"""The part of benchmarks/rollout.py for full-attention models: 256 new tokens behind a prompt of 200, with every cache.

A canvas is denoised in blocks of 32, `--reveal` tokens a forward. With a cache the first forward of a block is over the whole
canvas and the others over a window: the clock runs over the whole answer. Without one a block costs what the others cost: the clock
runs over the first.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Iterator

import numpy as np
import torch

from benchmarks.limits import Ceilings, Work, forward_work
from benchmarks.shapes import family_of, mask_id_of
from benchmarks.step_clock import Clock
from models.decoder import Decoder
from models.family import DecoderConfig, Family
from sample.canvas_schedule import SCHEDULES
from sample.engine import Engine, Request, SamplingSettings, build_engine

PROMPT, RESPONSE, BLOCK_SIZE = 200, 256, 32


@dataclasses.dataclass(frozen=True)
class Canvas:
    """What is sampled: sizes in tokens."""

    prompt: int = PROMPT
    response: int = RESPONSE
    block_size: int = BLOCK_SIZE

    def shrunk(self, by: int) -> Canvas:
        """For a test on a CPU."""
        return Canvas(max(1, self.prompt // by), max(1, self.response // by), max(1, self.block_size // by))


def cache_settings(name: str) -> dict[str, Any]:
    """`none`, `prefix`, `dual`, or `horizonN`: a prefix cache whose windows end N tokens behind the block."""
    if name.startswith("horizon") and name[7:].isdigit():
        return {"cache": "prefix", "further_horizon": int(name[7:])}
    if name not in ("none", "prefix", "dual"):
        raise SystemExit(f"--caches: got {name}, must be none, prefix, dual or horizonN")
    return {"cache": name}


def forwards_of_block(family: Family, config: DecoderConfig, canvas: Canvas, block: int, name: str, reveal: int, active: int,
                      itemsize: int) -> list[Work]:  # fmt: skip
    """The work of the forwards of one block under the family's fixed schedule."""
    end = canvas.prompt + canvas.response
    stop = canvas.prompt + (block + 1) * canvas.block_size
    cache = cache_settings(name)
    window, keys = canvas.block_size, end
    if cache["cache"] == "prefix":
        keys = min(stop + cache.get("further_horizon", end), end)
        window += keys - stop
    forwards, masked = [], canvas.block_size
    for step, count in enumerate(SCHEDULES[family.canvas_schedule](canvas.block_size, -(-canvas.block_size // reveal))):
        whole = name == "none" or step == 0
        head_rows = 1 if step == 0 and family.first_token_from_refresh else masked
        rows, seen = (end, end) if whole else (window, keys)
        forwards.append(forward_work(config, active, rows, head_rows, seen, count, itemsize, cached=not whole))
        masked -= count
    assert masked == 0
    return forwards


def limit(family: Family, config: DecoderConfig, canvas: Canvas, name: str, reveal: int, active: int, itemsize: int,
          ceilings: Ceilings) -> float:  # fmt: skip
    """Tokens/s of a whole answer at the ceilings."""
    blocks = range(canvas.response // canvas.block_size)
    forwards = [f for b in blocks for f in forwards_of_block(family, config, canvas, b, name, reveal, active, itemsize)]
    return sum(f.tokens for f in forwards) / sum(f.seconds(ceilings) for f in forwards)


class Enough(Exception):
    """Raised by the clock when it has seen its steps."""


def measure(engine: Engine, requests: list[Request], settings: SamplingSettings, clock: Clock, steps: int | None) -> None:
    """Run `engine` under `clock` to the end, or for so many steps."""

    def progress(finished: int, tokens: int, forwards: int) -> None:
        clock(finished, tokens, forwards)
        if steps is not None and len(clock.times) >= steps:
            raise Enough

    try:
        engine.generate(requests, settings, progress=progress)
    except Enough:
        pass


def warm_up(engine: Engine, requests: list[Request], settings: SamplingSettings, steps: int, all_blocks: bool) -> int:
    """Run what compiles kernels, `steps` forwards, and what captures CUDA graphs; how many were captured.

    The first block at its own pace meets every number of rows that predict. all_blocks: windows of other blocks have other sizes,
    and a size is captured when it comes the second time; in three forwards each block has a refresh and two windows.
    """
    measure(engine, requests, settings, Clock(), steps)
    graphs = engine.statistics.graphs
    if all_blocks:
        num_blocks = -(-settings.max_tokens // settings.block_size)
        measure(engine, requests, dataclasses.replace(settings, steps=3 * num_blocks), Clock(), None)
        graphs += engine.statistics.graphs
    return graphs


def run_canvas(arguments: Any, decoder: Decoder, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """A result per number of canvases, tokens a forward, and cache, of the chosen engine and then of the torch engine."""
    family, canvas, itemsize = family_of(arguments.shape), Canvas().shrunk(arguments.shrink), decoder.dtype.itemsize
    cuda, mask_id = decoder.device.type == "cuda", mask_id_of(arguments.shape)
    rng = np.random.default_rng(0)
    kinds = dict.fromkeys([arguments.engine, "torch"] if arguments.eager_steps else [arguments.engine])
    for kind, active in itertools.product(kinds, arguments.active):
        requests = [Request(f"task {n}", rng.integers(0, mask_id, canvas.prompt).tolist()) for n in range(active)]
        engine = build_engine(decoder, family, active, kind)
        for reveal, name in itertools.product(arguments.reveal, arguments.caches):
            per_block = -(-canvas.block_size // reveal)
            block_steps = len(SCHEDULES[family.canvas_schedule](canvas.block_size, per_block))
            settings = SamplingSettings(
                max_tokens=canvas.response,
                mask_id=mask_id,
                forbidden_ids=(mask_id,),
                block_size=canvas.block_size,
                steps=canvas.response // canvas.block_size * per_block,
                **cache_settings(name),
            )
            all_blocks = kind != "torch" and name != "none"
            graphs = warm_up(engine, requests, settings, block_steps + 1, all_blocks)
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            clock = Clock()
            measure(engine, requests, settings, clock, block_steps if name == "none" else None)
            tokens, forwards = clock.counts[-1][1:]
            seconds = clock.times[-1] - clock.started
            best = limit(family, decoder.config, canvas, name, reveal, active, itemsize, ceilings)
            yield {
                "run": "canvas",
                "shape": arguments.shape,
                "engine": kind,
                "active": active,
                **dataclasses.asdict(canvas),
                "reveal": reveal,
                "cache": name,
                "steps": len(clock.times),
                "seconds": seconds,
                "tokens_per_second": tokens / seconds,
                "tokens_per_forward": tokens / forwards,
                "ms_per_forward": 1e3 * seconds / len(clock.times),
                "limit_tokens_per_second": best,
                "share_of_limit": tokens / seconds / best,
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
                "graphs_captured_before": graphs,
                "statistics": dataclasses.asdict(engine.statistics),
            }
        engine.release()

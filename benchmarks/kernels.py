"""Times of the forward's kernels on one GPU, and the tile sizes to choose.

    python -m benchmarks.kernels --shape sdar-4b --active 1,16,64,128,256 --context 1000
    python -m benchmarks.kernels --shape sdar-8b --active 1,128 --sweep

For every number of active sequences: a forward of (n + c) * B rows, c = n * reveal / B commit items, contexts around
--context. Microseconds per call, from replays of a CUDA graph that goes through as many layers as --layers says, so that weights
and caches come from memory; beside them TB/s or TFLOP/s, and the ceilings measured in the same run. --sweep tries the cuts of the
product of few rows and of item attention instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.limits import measure_ceilings
from benchmarks.shapes import SHAPES, random_decoder
from models.decoder import Decoder
from models.family import DecoderConfig
from models.logits import matmul_float32
from sample.fused_forward import fused_forward
from sample.kernels import matmul, overlap
from sample.kernels.item_attention import item_attention
from sample.kernels.matmul import Tiles, head_logits, skinny_gate_up, skinny_product
from sample.kernels.norms import add_rms_norm, rms_norm
from sample.kernels.prefill_attention import prefill_attention
from sample.kernels.rotary_store import rotary_store, rotary_table
from sample.kernels.swiglu import silu_mul
from sample.pages import PAGE

DEVICE = torch.device("cuda")


def microseconds(calls: list[Callable[[], object]], at_least: int = 16, repeats: int = 7) -> float:
    """Of one call, launches not counted: the median of replays of a graph of all `calls`, gone through until it has `at_least`."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    stream.synchronize()
    rounds = -(-at_least // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls * rounds:
            call()
    times = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (rounds * len(calls)))
    return statistics.median(times[2:])


class Scene:
    """What a denoising forward of n sequences reads: random activations, a cache, and the plan of a step."""

    def __init__(self, decoder: Decoder, active: int, context: int, block_size: int, commits: int | None = None) -> None:
        c, size, n = decoder.config, block_size, active
        self.decoder, self.block_size, self.active = decoder, size, n
        torch.manual_seed(0)
        num_commits = max(1, n // size) if commits is None else commits  # one token a forward
        self.num_rows = (n + num_commits) * size
        # Contexts from half to one and a half times the average, longest first.
        share = torch.linspace(1.5, 0.5, n) if n > 1 else torch.ones(1)
        keys = ((share * context / size).long() * size).int()
        pages = -(-int(keys.max()) // PAGE)
        table = (torch.randperm(n * pages) + 1).view(n, pages).int()
        shape = ((n * pages + 1) * PAGE, c.num_kv_heads, c.head_dim)
        make = lambda: torch.randn(shape, dtype=decoder.dtype, device=DEVICE)  # noqa: E731
        self.k, self.v = ([make() for _ in decoder.layers] for _ in range(2))
        start = (keys - size)[:, None] + torch.arange(size)
        positions = torch.cat([start, start[:num_commits] - size])  # the longest commit
        item = torch.cat([torch.arange(n), torch.arange(num_commits)])
        entries = table[item].gather(1, (positions // PAGE).long()) * PAGE + positions % PAGE
        commit_of = torch.where(torch.arange(n) < num_commits, torch.arange(n), -1)
        self.table, self.keys, self.order, self.commit_of, self.positions, self.entries = (
            x.flatten().int().to(DEVICE) if x is not table else x.to(DEVICE)
            for x in (table, keys, torch.arange(n), commit_of, positions, entries)
        )
        self.cache_bytes = 2 * int(keys.sum()) * c.num_kv_heads * c.head_dim * decoder.dtype.itemsize
        self.tokens = torch.randint(0, c.vocab_size, (self.num_rows,), device=DEVICE, dtype=torch.int32)
        self.rotary = rotary_table(2 * context + 2 * PAGE, c.head_dim, c.rope_theta, decoder.dtype, DEVICE)

    def rows(self, width: int) -> Tensor:
        return torch.randn(self.num_rows, width, dtype=self.decoder.dtype, device=DEVICE)

    def attend(self, layer: int, q: Tensor, **options: Any) -> Tensor:
        plan = (self.table, self.order, self.keys, self.commit_of, self.block_size)
        return item_attention(q, self.k[layer], self.v[layer], *plan, **options)

    def forward(self) -> Tensor:
        attend = lambda layer, q, k, v: self.attend(layer, q)  # noqa: E731
        return fused_forward(self.decoder, self.tokens, self.positions, self.entries, self.k, self.v, self.rotary, attend)


def per_kernel(scene: Scene) -> dict[str, dict[str, float]]:
    """{kernel: {us, and TB/s or TFLOP/s}} of one layer's kernels and of the head."""
    decoder, n = scene.decoder, scene.num_rows
    c, layers = decoder.config, decoder.layers
    hidden, other, q, gate_up = (
        scene.rows(w) for w in (c.hidden_size, c.hidden_size, c.num_heads * c.head_dim, 2 * c.intermediate_size)
    )
    qkv = scene.rows((c.num_heads + 2 * c.num_kv_heads) * c.head_dim)
    ffn, folded = scene.rows(c.intermediate_size), q.view(n, c.num_heads, c.head_dim)
    results = {}

    def add(name: str, calls: list[Callable[[], object]], num_bytes: float = 0.0, flops: float = 0.0) -> None:
        us = microseconds(calls)
        results[name] = {"us": us, "TB/s": num_bytes / us * 1e-6, "TFLOP/s": flops / us * 1e-6}

    layer0 = layers[0].attention
    norms = (layer0.q_norm.weight, layer0.k_norm.weight) if c.qk_norm else (None, None)
    add("add_rms_norm", [lambda: add_rms_norm(hidden, other, decoder.norm.weight, 1e-6)] * 2, 8 * hidden.numel())
    add("silu_mul", [lambda: silu_mul(gate_up)] * 2, 3 * gate_up.numel())
    add(
        "rotary_store",
        [
            lambda k=k, v=v: rotary_store(qkv, scene.positions, scene.entries, k, v, scene.rotary, c.num_heads, *norms)
            for k, v in zip(scene.k, scene.v)
        ],
        4 * qkv.numel(),
    )
    add("item_attention", [lambda i=i: scene.attend(i, folded) for i in range(len(layers))], scene.cache_bytes)
    products = {
        "qkv": (hidden, [layer.attention.qkv for layer in layers]),
        "out": (q, [layer.attention.out for layer in layers]),
        "gate_up": (hidden, [layer.mlp.gate_up for layer in layers]),
        "down": (ffn, [layer.mlp.down for layer in layers]),
    }
    for name, (x, modules) in products.items():
        weight = modules[0].weight
        counts = (2 * weight.numel() + 2 * n * sum(weight.shape), 2 * n * weight.numel())
        add(f"{name}, library", [lambda m=m, x=x: m(x) for m in modules], *counts)
        if n <= matmul.MAX_ROWS:
            add(f"{name}, skinny", [lambda m=m, x=x: matmul.product(m, x) for m in modules], *counts)
            if name == "gate_up":
                add("gate_up and silu, skinny", [lambda m=m, x=x: matmul.gate_up_silu(m, x) for m in modules], *counts)
    rows = max(1, scene.active * 5 // 2)
    x, weight = torch.randn(rows, c.hidden_size, dtype=decoder.dtype, device=DEVICE), decoder.lm_head.weight
    counts = (2 * weight.numel() + 4 * rows * len(weight), 2 * rows * weight.numel())
    add(f"head, {rows} rows, library", [lambda: matmul_float32(x, weight.t())], *counts)
    if rows <= matmul.MAX_ROWS:
        add(f"head, {rows} rows, skinny", [lambda: head_logits(x, weight)], *counts)
    return results


def whole_forward(scene: Scene) -> dict[str, float]:
    """Milliseconds of all layers of the published shape (from those that there are); with few rows also without what is done for
    them: overlapping kernels, products of few rows."""
    num_layers, chosen = len(scene.decoder.layers), (overlap.SMALL, overlap.LARGE)
    published = next(config for config in SHAPES.values() if config.hidden_size == scene.decoder.config.hidden_size).num_layers
    time = lambda: microseconds([scene.forward], at_least=2) * published / num_layers * 1e-3  # noqa: E731
    results = {"ms": time()}
    if scene.num_rows <= min(overlap.MAX_ROWS, matmul.MAX_ROWS):
        overlap.SMALL, overlap.LARGE = 0, 0
        results["ms, kernels one by one"] = time()
        overlap.SMALL, overlap.LARGE = chosen
        matmul.MAX_ROWS, rows = 0, matmul.MAX_ROWS
        results["ms, library's products"] = time()
        matmul.MAX_ROWS = rows
    return results


def prefill(config: DecoderConfig, block_size: int) -> dict[str, dict[str, float]]:
    """Attention of one layer over packed prompts."""
    results = {}
    for num_prompts, length in ((64, 200), (16, 1024), (1, 16_384)):
        make = lambda heads, n=num_prompts * length: torch.randn(n, heads, config.head_dim, device=DEVICE).bfloat16()  # noqa: E731
        q, k, v = make(config.num_heads), make(config.num_kv_heads), make(config.num_kv_heads)
        lengths = torch.full((num_prompts,), length, dtype=torch.int32, device=DEVICE)
        starts = (lengths.cumsum(0) - lengths).int()
        us = microseconds([functools.partial(prefill_attention, q, k, v, starts, lengths, block_size, length)], at_least=2)
        flops = 2 * num_prompts * length**2 * config.num_heads * config.head_dim
        results[f"prefill_attention, {num_prompts} x {length}"] = {"us": us, "TFLOP/s": flops / us * 1e-6}
    return results


# -- sweeps


def tile_candidates() -> list[Tiles]:
    found = []
    sizes = [(64, 64), (64, 128), (64, 256), (128, 64), (128, 128)]
    for (outputs, inputs), warps, stages in itertools.product(sizes, (4, 8), (3, 4, 6, 8)):
        if 50_000 <= (outputs + 16) * inputs * 2 * stages <= 200_000 and not (warps == 8 and outputs * inputs < 16_384):
            found.append(Tiles(outputs, inputs, 1, warps, stages))
    return found


def sweep_products(decoder: Decoder, num_rows: int, names: list[str]) -> None:
    """The best cuts of each product, against the library."""
    layers = decoder.layers
    weights = {
        "qkv": [layer.attention.qkv.weight for layer in layers],
        "out": [layer.attention.out.weight for layer in layers],
        "gate_up": [layer.mlp.gate_up.weight for layer in layers],
        "down": [layer.mlp.down.weight for layer in layers],
        "head": [decoder.lm_head.weight],
    }
    candidates = tile_candidates()
    probe = [torch.randn(n, 2048, dtype=decoder.dtype, device=DEVICE) for n in (num_rows, 512)]
    skinny_product(*probe, candidates[0])

    def build(tiles: Tiles) -> None:
        torch.cuda.set_device(0)
        skinny_product(*probe, tiles)
        skinny_product(*probe, dataclasses.replace(tiles, parts=2))
        skinny_gate_up(*probe, tiles)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(build, candidates))
    for name in names:
        sweep_product(name, weights[name], num_rows, candidates)


def sweep_product(name: str, weights: list[Tensor], num_rows: int, candidates: list[Tiles]) -> None:
    """One product, followed by a norm of its result as in a forward: what parts cost is counted."""
    num_outputs, num_inputs = weights[0].shape
    x, other, residual, ones = (
        torch.randn(*shape, dtype=weights[0].dtype, device=DEVICE)
        for shape in ((num_rows, num_inputs), (num_rows, num_inputs), (num_rows, num_outputs), (num_outputs,))
    )
    small = torch.randn(num_inputs, dtype=x.dtype, device=DEVICE)
    has_parts = name not in ("gate_up", "head")

    def time(run: Callable[[Tensor], Tensor]) -> float:
        if has_parts:
            return microseconds([lambda w=w: add_rms_norm(run(w), residual, ones, 1e-6) for w in weights], repeats=3)
        return microseconds([lambda w=w: (run(w), rms_norm(other, small, 1e-6)) for w in weights], repeats=3)

    want = x.float() @ weights[0][:4096].float().t()
    library = time(lambda w: F.linear(x, w))
    found = []
    for tiles, parts in itertools.product(candidates, (1, 2, 3, 4, 6, 8) if has_parts else (1,)):
        tiles = dataclasses.replace(tiles, parts=parts)
        if -(-num_outputs // tiles.outputs) * parts < 100 or parts * tiles.inputs > num_inputs:
            continue
        got = skinny_product(x, weights[0][:4096], tiles)
        error = (got.sum(0) if parts > 1 else got.float()) - want
        assert float(error.norm() / want.norm()) < 1e-2, tiles
        dtype = torch.float32 if name == "head" else None
        found.append((time(lambda w, t=tiles: skinny_product(x, w, t, dtype)), "product", tiles))  # noqa: B023
        if name == "gate_up":
            found.append((time(lambda w, t=tiles: skinny_gate_up(x, w, t)), "product and silu", tiles))
    num_bytes = 2 * weights[0].numel()
    print(f"\n{name} {(num_outputs, num_inputs)}, {num_rows} rows; library {library:.1f} us, {num_bytes / library * 1e-6:.2f} TB/s")
    for kind in ("product", "product and silu"):
        best = sorted((f for f in found if f[1] == kind), key=lambda f: f[0])
        shown = best[:6] + [f for parts in (1, 2, 3, 4) for f in [f for f in best[6:] if f[2].parts == parts][:1]]
        for us, _, tiles in shown:
            print(f"  {us:7.1f} us {num_bytes / us * 1e-6:5.2f} TB/s  {kind}  {tiles}", flush=True)


def sweep_attention(scene: Scene) -> None:
    c, n = scene.decoder.config, scene.active
    q = scene.rows(c.num_heads * c.head_dim).view(scene.num_rows, c.num_heads, c.head_dim)
    rows = max(16, scene.block_size * c.num_heads // c.num_kv_heads)
    splits = (1, 2) if n >= 64 else (2, 4, 8) if n > 8 else (8, 16, 32)
    cuts = [(32, 2, 3), (32, 2, 4), (64, 2, 3)]  # keys, warps, stages
    cuts += [(32, 4, 3), (32, 4, 4), (32, 8, 3), (64, 4, 2), (64, 4, 3), (64, 4, 4), (64, 8, 3), (128, 4, 2), (128, 8, 2)]
    found = []
    tiles = [tile for tile in (16, 32, 64, 128) if rows // 4 <= tile <= rows]
    for tile, s, (keys, warps, stages) in itertools.product(tiles, splits, cuts):
        if tile == 128 and warps == 4 or tile > 16 and warps == 2 or tile * keys > 8192:
            continue  # registers
        options = dict(tile=tile, splits=s, keys_at_a_time=keys, num_warps=warps, num_stages=stages)
        us = microseconds([lambda i=i, o=options: scene.attend(i, q, **o) for i in range(len(scene.k))], repeats=3)
        found.append((us, options))
    print(f"\nitem attention, {n} items, {scene.num_rows} rows, {scene.cache_bytes / 1e6:.0f} MB a layer")
    for us, options in sorted(found, key=lambda f: f[0])[:12]:
        print(f"  {us:7.1f} us {scene.cache_bytes / us * 1e-6:5.2f} TB/s  {options}", flush=True)


def show(kernels: dict[str, dict[str, float]]) -> None:
    for name, row in kernels.items():
        rates = "  ".join(f"{row[unit]:7.2f} {unit}" for unit in ("TB/s", "TFLOP/s") if row.get(unit))
        print(f"  {name:36} {row['us']:8.1f} us  {rates}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", default="sdar-4b", choices=[name for name in SHAPES if name != "tiny"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--active", default="1,16,64,128,256", help="sequences, several by commas")
    parser.add_argument("--context", type=int, default=1000, help="average number of tokens of a sequence")
    parser.add_argument("--block-size", type=int, default=4)
    parser.add_argument("--reveal", type=int, default=1, help="tokens a forward: how many blocks are finished in each")
    parser.add_argument("--sweep", action="store_true", help="tile sizes instead of the chosen ones")
    parser.add_argument("--sweep-rows", type=int, default=8, help="of the products of few rows")
    parser.add_argument("--products", default="qkv,out,gate_up,down,head", help="which of them")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    ceilings = measure_ceilings(DEVICE)
    print(f"{arguments.shape}: reads at {ceilings.bandwidth * 1e-12:.2f} TB/s, large products {ceilings.flops * 1e-12:.0f} TFLOP/s")
    decoder = random_decoder(arguments.shape, arguments.layers, torch.bfloat16, "cuda").requires_grad_(False)
    if arguments.sweep and arguments.products:
        sweep_products(decoder, arguments.sweep_rows, arguments.products.split(","))
    results: dict[str, Any] = {"ceilings": vars(ceilings), "active": {}}
    for active in (int(n) for n in arguments.active.split(",") if n):
        commits = max(1, active * arguments.reveal // arguments.block_size)
        scene = Scene(decoder, active, arguments.context, arguments.block_size, commits)
        if arguments.sweep:
            sweep_attention(scene)
            continue
        kernels, forward = per_kernel(scene), whole_forward(scene)
        results["active"][active] = {"rows": scene.num_rows, "kernels": kernels, "forward": forward}
        print(f"\n{active} active, {scene.num_rows} rows: a forward without its head, {forward}")
        show(kernels)
    if not arguments.sweep:
        print()
        results["prefill"] = prefill(decoder.config, arguments.block_size)
        show(results["prefill"])
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()

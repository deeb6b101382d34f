"""Finetuning on one very long response: memory of every phase, time, and the longest response that fits.

    python -m benchmarks.sft_long                                  8B layer shapes, 4 layers, 30,000 tokens; a GPU, under 3 minutes
    python -m benchmarks.sft_long --method trace --budget 65536    a slice per block and token, the document cut into parts
    python -m benchmarks.sft_long --shape tiny --backend dense --response 256 --layers 2 --device cpu     checks itself

Random weights of the published shape, N of its layers (the whole vocabulary), bfloat16, recomputed activations, FlexAttention, the
head in chunks: no dense mask and no tensor of tokens x vocabulary is ever made. What those would take is printed beside the peaks.
Forward and backward of all parts, gradients summed, no optimizer. Measured at N layers, at half of them and at half the length;
what lies beside weights and gradients follows tokens * (a * layers + b) + c, from which the whole model is reckoned. Then the
memory that the other layers and their optimizer states would take is really occupied, and the update run once more.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator

import numpy as np
import torch

from benchmarks.shapes import MASK_ID, MASK_IDS, SHAPES, matmul_parameters, random_decoder
from models.attention import attention_backend
from models.decoder import Decoder
from models.family import DecoderConfig
from train.documents import Document, build_document, number
from train.loop import pack_multiple
from train.methods.semi_ar import semi_ar_slices
from train.methods.tracerl import trace_slices
from train.objectives import token_weights
from train.packing import Pack, assign, build_pack
from train.policy import Policy
from train.traces import Response

GIB = 2**30
STATE_BYTES = 2 + 4 + 12
"""Per parameter: bfloat16 weight, float32 gradient (common/dist.py adds micro-batches up in it), float32 master, two moments."""


class Meter:
    """Seconds and peak memory of every phase, summed and maximised over the parts of an update."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.seconds: dict[str, float] = {}
        self.peak: dict[str, int] = {}
        self.start()

    def start(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.began = time.perf_counter()

    def phase(self, name: str) -> None:
        """What has run since the last call was `name`."""
        if self.cuda:
            torch.cuda.synchronize()
            self.peak[name] = max(self.peak.get(name, 0), torch.cuda.max_memory_allocated())
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - self.began
        self.start()


def long_document(arguments: argparse.Namespace, length: int, vocab: int) -> Document:
    """One random response of `length` tokens, whole blocks together with its prompt."""
    rng = np.random.default_rng(arguments.seed)
    size = arguments.block
    length += -(arguments.prompt + length) % size
    response = Response(rng.integers(0, vocab, arguments.prompt), rng.integers(0, vocab, length), length)
    masks = dict(lower_p=0.1, upper_p=0.9, mask_ratio="per_block", mask_times_per_sample=arguments.masks)
    others = dict(loss_weight_by_ratio=False, complementary_mask=arguments.complementary, post_num=None, shrink=1)
    training = SimpleNamespace(**masks, **others, block_size=size)
    if arguments.method == "trace":  # every step reveals one token: as many slices as there can be
        response.step_map = np.arange(1, length + 1)
        trace = trace_slices(response, size, training, rng)
    else:
        trace = semi_ar_slices(response, size, training, rng)
    document = build_document(0, response, trace, size)
    assert document is not None
    return document


class Update:
    """Forward and backward of one document, in parts of the budget."""

    def __init__(self, decoder: Decoder, arguments: argparse.Namespace, length: int) -> None:
        self.arguments, self.device = arguments, arguments.device
        mask_id = MASK_IDS.get(arguments.shape, MASK_ID)
        decoder.recomputed_layers = 0 if arguments.keep_activations else decoder.config.num_layers
        self.policy = Policy(decoder, [mask_id], backend=arguments.backend, head_chunk=arguments.head_chunk).to(self.device)
        document = long_document(arguments, length, mask_id)
        predictions = number([document])
        self.num_predictions = len(predictions)
        self.weights = torch.as_tensor(token_weights(predictions, "token", length, length), dtype=torch.float32)
        budget = arguments.budget or -(-document.num_tokens // 1024) * 1024
        round_to = pack_multiple(torch.device(self.device))
        self.packs = [build_pack(pack, mask_id, round_to) for pack in assign([document], budget, 1)[0]]
        self.num_tokens = document.num_tokens
        self.longest_pack = max(len(pack.input_ids) for pack in self.packs)

    def __call__(self) -> Meter:
        meter = Meter(self.device)
        hooks = [
            self.policy.decoder.register_forward_hook(lambda *_: meter.phase("layers forward")),
            self.policy.decoder.lm_head.register_forward_hook(lambda *_: meter.phase("head forward")),
        ]
        for pack in self.packs:
            self.part(pack.to(self.device), meter)
        for hook in hooks:
            hook.remove()
        return meter

    def part(self, pack: Pack, meter: Meter) -> None:
        attention_backend(self.arguments.backend, replace(pack.token_ids))  # the mask alone, to see its own peak
        meter.phase("mask")
        logprobs = self.policy(pack)[0]
        loss = -(self.weights.to(self.device)[pack.prediction.clamp(min=0)] * logprobs * (pack.prediction >= 0)).sum()
        loss.backward()
        meter.phase("backward")

    def forget(self) -> None:
        self.policy.zero_grad(set_to_none=True)


@dataclass
class Point:
    """One measurement."""

    layers: int
    tokens: int
    """Of the longest part."""
    beside: int
    """Bytes of the peak that are neither weights nor gradients."""
    seconds: float


def num_parameters(config: DecoderConfig) -> int:
    """All of them but the norms."""
    return matmul_parameters(config) + (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size


def measure(arguments: argparse.Namespace, layers: int, length: int, show: bool) -> Point:
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    decoder = random_decoder(arguments.shape, layers, dtype, arguments.device)
    update = Update(decoder, arguments, length)
    began = time.perf_counter()
    update()  # compiles
    first = time.perf_counter() - began
    update.forget()
    meter = update()
    seconds = sum(meter.seconds.values())
    weights = sum(p.numel() * p.element_size() for p in decoder.parameters())
    beside = max(meter.peak.values(), default=0) - 2 * weights
    parts = f" in {len(update.packs)} parts of at most {update.longest_pack:,}" if len(update.packs) > 1 else ""
    size = f"{update.num_tokens:,} packed{parts}, {update.num_predictions:,} predicted"
    print(f"{layers} layers, {length:,} tokens: {size}; the first update took {first:.0f} s")
    if show:
        print(f"  {'phase':<16}{'seconds':>9}{'peak GiB':>10}")
        for name, value in meter.seconds.items():
            print(f"  {name:<16}{value:>9.2f}{meter.peak.get(name, 0) / GIB:>10.2f}")
        logits = [4 * number * decoder.config.vocab_size / GIB for number in (update.num_predictions, update.num_tokens)]
        print(f"  weights {weights / GIB:.2f} GiB, gradients the same. With FlexAttention and the chunked head there is never")
        dense = update.longest_pack**2 / GIB
        print(f"  a dense mask ({dense:.2f} GiB), nor float32 logits ({logits[0]:.2f} GiB; of all tokens {logits[1]:.2f} GiB)")
    rate = f"{update.num_tokens / seconds:,.0f} packed tokens/s"
    print(f"  {seconds:.2f} s, {rate}, beside weights and gradients {beside / GIB:.2f} GiB", flush=True)
    point = Point(layers, update.longest_pack, beside, seconds)
    del update, decoder
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
    return point


@dataclass
class Fit:
    """Bytes beside weights and gradients = tokens * (a * layers + b) + c."""

    a: float
    b: float
    c: float

    @classmethod
    def of(cls, points: list[Point]) -> Fit:
        matrix = np.array([[p.layers * p.tokens, p.tokens, 1.0] for p in points], dtype=np.float64)
        return cls(*np.linalg.solve(matrix, np.array([p.beside for p in points], dtype=np.float64)))

    def __call__(self, layers: int, tokens: float) -> float:
        return tokens * (self.a * layers + self.b) + self.c

    def longest(self, layers: int, room: float) -> float:
        """Tokens for which `room` bytes are enough."""
        return max(0.0, (room - self.c) / (self.a * layers + self.b))


def settings(arguments: argparse.Namespace, fit: Fit, total: float) -> Iterator[tuple[str, float, float]]:
    """(what, bytes of its states on one GPU, bytes left for activations) for ways to train the whole model."""
    whole = SHAPES[arguments.shape]
    n = num_parameters(whole)
    layer = (n - whole.vocab_size * whole.hidden_size) / whole.num_layers
    for gpus in (8, 4, 2):
        # ZeRO-3 gathers a layer at a time, and the next one ahead; the vocabulary's matrices whole.
        states = STATE_BYTES * n / gpus + 2 * (2 * layer + 2 * whole.vocab_size * whole.hidden_size)
        yield f"ZeRO-3 over {gpus} GPUs", states, total - states
    yield "frozen weights (LoRA) on one GPU", 2 * n, total - 2 * n


def report(arguments: argparse.Namespace, points: list[Point], fit: Fit) -> dict[str, Any]:
    whole = SHAPES[arguments.shape].num_layers
    per_token = points[0].tokens / arguments.response
    total = arguments.memory * GIB
    per_layer, per_token_kib = fit.a / 1024, fit.b / 1024
    print("\nbeside weights and gradients, per packed token:", end=" ")
    print(f"{per_layer:.1f} KiB a layer + {per_token_kib:.1f} KiB; and {fit.c / GIB:.2f} GiB whatever the length")
    activations = fit(whole, points[0].tokens)
    slope = (points[0].seconds - points[1].seconds) / max(1, points[0].layers - points[1].layers)
    seconds = points[0].seconds + slope * (whole - points[0].layers)
    print(f"{whole} layers, {arguments.response:,} tokens: {activations / GIB:.1f} GiB, forward and backward {seconds:.1f} s")
    print(f"of {arguments.memory:.0f} GiB:")
    rows = []
    for name, states, room in settings(arguments, fit, total):
        longest = int(fit.longest(whole, room) / per_token) if room > 0 else 0
        rows.append({"setting": name, "states_gib": states / GIB, "longest_response": longest})
        print(f"  {name:<34} states {states / GIB:6.1f} GiB, longest response {longest:>8,} tokens")
    return {"activations_gib": activations / GIB, "seconds": seconds, "settings": rows}


def occupy(arguments: argparse.Namespace, tokens: int) -> float:
    """Run the update while the other layers' share of memory (ZeRO-3 over 8 GPUs) is taken; the peak in GiB."""
    whole = SHAPES[arguments.shape]
    name, states, _ = next(settings(arguments, Fit(0, 0, 0), 0))
    decoder = random_decoder(arguments.shape, arguments.layers, torch.bfloat16, "cuda")
    own = 2 * sum(p.numel() * p.element_size() for p in decoder.parameters())
    checkpoints = (whole.num_layers - arguments.layers) * tokens * whole.hidden_size * 2
    taken = int(max(0, states - own) + checkpoints)
    ballast = torch.empty(taken, dtype=torch.uint8, device="cuda")
    meter = Update(decoder, arguments, arguments.response)()
    peak = max(meter.peak.values()) / GIB
    print(f"\n{taken / GIB:.1f} GiB taken ({name}: its states, and the other layers' checkpoints): it fits, peak {peak:.1f} GiB")
    del ballast
    return peak


def main(argv: list[str] | None = None) -> dict[str, Any]:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sft_long", description=__doc__, formatter_class=raw)
    parser.add_argument("--shape", default="sdar-8b", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--response", type=int, default=30_000)
    parser.add_argument("--block", type=int, default=4)
    parser.add_argument("--method", default="semi-ar", choices=["semi-ar", "trace"])
    parser.add_argument("--masks", type=int, default=1, help="semi-ar: masks per response")
    parser.add_argument("--complementary", action="store_true", help="semi-ar: and their complements")
    parser.add_argument("--budget", type=int, default=0, help="tokens of a part (max_tokens_per_microbatch); 0: all in one")
    parser.add_argument("--backend", default="auto", choices=["auto", "dense", "flex"])
    parser.add_argument("--head-chunk", type=int, default=2048)
    parser.add_argument("--keep-activations", action="store_true", help="recompute nothing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", type=float, help="GiB of one GPU (default: this one's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    arguments = parser.parse_args(argv)
    if arguments.memory is None:
        arguments.memory = torch.cuda.get_device_properties(0).total_memory / GIB if arguments.device == "cuda" else 139.0
    began = time.perf_counter()
    print(f"{arguments.shape}, block {arguments.block}, {arguments.method}, {arguments.device}")
    points = [
        measure(arguments, arguments.layers, arguments.response, show=True),
        measure(arguments, max(1, arguments.layers // 2), arguments.response, show=False),
        measure(arguments, arguments.layers, arguments.response // 2, show=False),
    ]
    result: dict[str, Any] = {"settings": {**vars(arguments), "out": None}, "points": [vars(p) for p in points]}
    if arguments.device == "cuda" and not arguments.budget and points[0].layers != points[1].layers:
        fit = Fit.of(points)
        result |= {"fit": vars(fit), **report(arguments, points, fit)}
        result["occupied_peak_gib"] = occupy(arguments, points[0].tokens)
    print(f"{time.perf_counter() - began:.0f} s in all")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()

"""The update of an RL step, packed, against the reference's rows, in one run and at equal gradient.

    python -m benchmarks.train_step --shape sdar-8b --layers 4 --prompt 200 --response 1000 --reveal 1,2
    python -m benchmarks.train_step --shape sdar-8b --layers 4 --ragged
    python -m benchmarks.train_step --shape tiny --device cpu --responses 4 --response 32 --prompt 8

Random weights of the published shape, N of its layers (the whole vocabulary). Steps are drawn for every block: on average block
size / reveal of them, some block taking as many as it has tokens, so that R, the reference's rows per response, is what is printed.
First the losses and gradients of both ways are compared, then times, memory and MFU are measured: forward and backward of all
micro-batches, without the optimizer. MFU counts (6 x matmul parameters x packed tokens + head + attention), no recomputation,
against 989 TFLOP/s.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import numpy as np
import torch

from benchmarks.reference_rows import Batch, build_rows, row_logprobs
from benchmarks.shapes import MASK_ID, MASK_IDS, matmul_parameters, random_decoder
from models.attention import tile_pairs
from models.decoder import Decoder
from train.methods.tracerl import trace_slices
from train.objectives import OBJECTIVES, ObjectiveInput, token_weights
from train.packing import Document, Pack, assign, build_document, build_pack, number
from train.policy import Policy
from train.traces import Response

PEAK_FLOPS = 989e12
TRAINING = SimpleNamespace(
    shrink=1, post_num=None, eps=0.2, eps_high=None, beta=0.01, use_kl_estimator_k3=True, importance_cap=None, block_size=4
)


def draw_responses(arguments: Any, reveal: float, vocab: int) -> list[Response]:
    """Random tokens; in every block 1 + Binomial(B - 1, p) steps with mean B / reveal, each revealing at least one token."""
    rng = np.random.default_rng(arguments.seed)
    size = TRAINING.block_size
    responses = []
    for _ in range(arguments.responses):
        length = arguments.response
        if arguments.ragged:
            length = int(np.clip(rng.lognormal(np.log(arguments.response / 3), 0.8), 16, arguments.response))
        length = -(-length // size) * size
        prompt = -(-arguments.prompt // size) * size
        num_blocks = length // size
        num_steps = 1 + rng.binomial(size - 1, (size / reveal - 1) / (size - 1), num_blocks)
        steps = np.zeros((num_blocks, size), np.int64)
        first = 1
        for block, count in enumerate(num_steps):
            own = np.concatenate([np.arange(count), rng.integers(0, count, size - count)])
            steps[block] = first + rng.permutation(own)
            first += count
        responses.append(Response(rng.integers(0, vocab, prompt), rng.integers(0, vocab, length), length, steps.ravel()))
    return responses


class Packed:
    """Our way: packed slices, chunked head."""

    def __init__(self, decoder: Decoder, responses: list[Response], arguments: Any, mask_id: int) -> None:
        self.policy = Policy(decoder, [mask_id], backend=arguments.backend, head_chunk=2048).to(arguments.device)
        self.documents: list[Document] = []
        for index, response in enumerate(responses):
            self.documents.append(
                build_document(index, response, trace_slices(response, TRAINING.block_size, TRAINING, None), TRAINING.block_size)
            )
        self.predictions = number(self.documents)
        longest = max(len(r.response_ids) for r in responses)
        self.weights = torch.as_tensor(token_weights(self.predictions, "reference", longest, longest), dtype=torch.float32)
        self.advantages = torch.linspace(-1, 1, len(responses))[torch.as_tensor(self.predictions.response)]
        round_to = max(128, arguments.budget // 8) if arguments.device == "cuda" else 1
        [packs] = assign(self.documents, arguments.budget, 1)
        self.packs = [build_pack(p, mask_id, round_to).to(arguments.device) for p in packs]
        self.weights, self.advantages = self.weights.to(arguments.device), self.advantages.to(arguments.device)

    def update(self) -> float:
        total = 0.0
        for pack in self.packs:
            logprobs, _ = self.policy(pack)
            w, a, old = self.weights[pack.prediction], self.advantages[pack.prediction], logprobs.detach()
            loss = OBJECTIVES.get("clipped")(ObjectiveInput(logprobs, old, old, old, a, w, w), TRAINING).loss
            loss.backward()
            total += loss.detach()
        return float(total)

    @torch.no_grad()
    def logprobs(self) -> None:
        for pack in self.packs:
            self.policy(pack)

    @property
    def num_tokens(self) -> int:
        return sum(len(p.input_ids) - p.num_filler for p in self.packs)

    def flops(self) -> float:
        """Of forward and backward, nothing recomputed: 6 per weight and token, 12 per head dimension and visible pair."""
        c = self.policy.decoder.config
        pairs = sum(visible_pairs(p) for p in self.packs)
        head = 6 * c.vocab_size * c.hidden_size * len(self.predictions)
        return 6 * matmul_parameters(c) * self.num_tokens + head + 12 * pairs * c.num_heads * c.head_dim * c.num_layers


def visible_pairs(pack: Pack) -> int:
    return int(tile_pairs(pack.token_ids).sum(dtype=torch.int64))


class Rows:
    """The reference's way."""

    def __init__(self, decoder: Decoder, responses: list[Response], arguments: Any, mask_id: int) -> None:
        self.decoder, self.arguments, self.mask_id = decoder, arguments, mask_id
        self.responses = responses
        self.rows = build_rows(responses, TRAINING.block_size, mask_id)
        self.longest = max(len(r.response_ids) for r in responses)
        self.advantages = torch.linspace(-1, 1, len(responses)).tolist()

    def batches(self):
        """As the reference's loader gives them: made on the host, dense mask included, and sent over."""
        for start in range(0, len(self.rows), self.arguments.reference_rows):
            yield Batch(self.rows[start : start + self.arguments.reference_rows], TRAINING.block_size, self.arguments.device)

    def update(self, forbidden: int | None = None) -> float:
        total = 0.0
        for batch in self.batches():
            loss = 0.0
            for row, logprobs in zip(batch.rows, row_logprobs(self.decoder, batch), strict=True):
                logprobs = logprobs[torch.from_numpy(row.predicted).to(logprobs.device)]
                old, w = logprobs.detach(), torch.full_like(logprobs, 1 / (self.longest * len(self.rows)))
                a = torch.full_like(logprobs, self.advantages[row.response])
                loss = loss + OBJECTIVES.get("clipped")(ObjectiveInput(logprobs, old, old, old, a, w, w), TRAINING).loss
            loss.backward()
            total += loss.detach()
        return float(total)

    @torch.no_grad()
    def logprobs(self) -> None:
        for batch in self.batches():
            row_logprobs(self.decoder, batch)

    @property
    def num_tokens(self) -> int:
        """Padding included."""
        size = self.arguments.reference_rows
        groups = [self.rows[i : i + size] for i in range(0, len(self.rows), size)]
        return sum(len(g) * max(len(r.ids) for r in g) for g in groups)


def gradients(decoder: Decoder) -> dict[str, torch.Tensor]:
    return {name: p.grad.float().clone() for name, p in decoder.named_parameters()}


def compare(arguments: Any, reveal: float) -> dict[str, float]:
    """Loss and gradient of both ways in float32, on two layers of the shape and few responses."""
    small = argparse.Namespace(**{**vars(arguments), "responses": 2, "response": min(arguments.response, 128), "reference_rows": 2})
    decoder = random_decoder(arguments.shape, 1, torch.float32, arguments.device)
    mask_id = MASK_IDS.get(arguments.shape, MASK_ID)
    responses = draw_responses(small, reveal, mask_id)
    packed, rows = Packed(decoder, responses, small, mask_id), Rows(decoder, responses, small, mask_id)
    packed.policy.forbidden = None  # the reference keeps the mask id in the softmax
    results = []
    for way in (packed, rows):
        decoder.zero_grad()
        results.append((way.update(), gradients(decoder)))
    (loss, ours), (reference_loss, theirs) = results
    error = max(float((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max()) for n in theirs)
    return {"loss": loss, "reference_loss": reference_loss, "gradient_error": error}


def measure(run: Callable[[], Any], arguments: Any) -> tuple[float, float]:
    """(median seconds, peak GiB) over `--repeats`, behind one warm-up."""
    cuda = arguments.device == "cuda"
    run()
    seconds = []
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(arguments.repeats):
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)), torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0


def benchmark(arguments: Any, reveal: float) -> dict[str, Any]:
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    decoder = random_decoder(arguments.shape, arguments.layers, dtype, arguments.device)
    weights = sum(p.numel() * p.element_size() for p in decoder.parameters()) / 2**30
    mask_id = MASK_IDS.get(arguments.shape, MASK_ID)
    responses = draw_responses(arguments, reveal, mask_id)
    packed, rows = Packed(decoder, responses, arguments, mask_id), Rows(decoder, responses, arguments, mask_id)
    num_trained = len(packed.predictions)
    result: dict[str, Any] = {
        "shape": arguments.shape,
        "layers": decoder.config.num_layers,
        "responses": len(responses),
        "mean_response": float(np.mean([len(r.response_ids) for r in responses])),
        "reveal": reveal,
        "ragged": arguments.ragged,
        "rows_per_response": len(rows.rows) / len(responses),
        "packed_tokens_per_response_token": packed.num_tokens / num_trained,
        "reference_tokens_per_response_token": rows.num_tokens / num_trained,
        "num_packs": len(packed.packs),
        "weights_and_gradients_gib": 2 * weights,
    }
    for name, recompute in [("plain", False), ("recompute", True)]:
        decoder.gradient_checkpointing = recompute
        seconds, peak = measure(lambda: (decoder.zero_grad(set_to_none=False), packed.update()), arguments)
        result[f"packed_{name}_seconds"], result[f"packed_{name}_peak_gib"] = seconds, peak
        result[f"packed_{name}_mfu"] = packed.flops() / seconds / PEAK_FLOPS
    decoder.gradient_checkpointing = False
    result["packed_logprobs_seconds"], result["packed_logprobs_peak_gib"] = measure(packed.logprobs, arguments)
    if arguments.compare:
        seconds, peak = measure(lambda: (decoder.zero_grad(set_to_none=False), rows.update()), arguments)
        old, _ = measure(rows.logprobs, arguments)
        result |= {"reference_seconds": seconds, "reference_peak_gib": peak, "reference_old_logprobs_seconds": old}
        result["speedup"] = (seconds + old) / result["packed_plain_seconds"]
        result["speedup_without_old_logprobs"] = seconds / result["packed_plain_seconds"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", default="sdar-8b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--responses", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--response", type=int, default=1000, help="tokens; with --ragged the longest")
    parser.add_argument("--reveal", default="1,2", help="tokens per forward on average, several by commas")
    parser.add_argument("--ragged", action="store_true", help="lognormal lengths around a third of --response")
    parser.add_argument("--budget", type=int, default=16_384, help="tokens of a pack")
    parser.add_argument("--reference-rows", type=int, default=4, help="rows of a reference micro-batch")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compare", dest="compare", action="store_false", help="leave the reference's way out")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    results = []
    for reveal in map(float, arguments.reveal.split(",")):
        equal = compare(arguments, reveal) if arguments.compare else {}
        results.append({**equal, **benchmark(arguments, reveal)})
        for key, value in results[-1].items():
            print(f"{key:38} {value:.4g}" if isinstance(value, float) else f"{key:38} {value}", flush=True)
        print()
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

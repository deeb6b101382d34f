"""The update of an RL step, packed, against the reference's rows, in one run and at equal gradient.

    python -m benchmarks.train_step --shape sdar-8b --layers 4 --prompt 200 --response 1000 --reveal 1,2
    python -m benchmarks.train_step --shape sdar-8b --layers 4 --ragged
    python -m benchmarks.train_step --shape tiny --device cpu --responses 4 --response 32 --prompt 8

Random weights of the published shape, N of its layers (the whole vocabulary). Steps are drawn for every block: on average block
size / reveal of them, some block taking as many as it has tokens, so that R, the reference's rows per response, is what is printed.
First the losses and gradients of both ways are compared, then times, memory and MFU are measured: forward and backward of all
micro-batches, without the optimizer. The packed way shares the prompt of the `--group` responses of a task; "unshared" is the same
without it, "plain torch" without fused layers and head. The reference's way runs plain torch.

Every time is taken at N layers and at half of them, and "whole" is what that makes for all layers of the shape. MFU counts
(6 x matmul parameters x packed tokens + head + attention), no recomputation, against 989 TFLOP/s; "pack" is the same for the layers
of one full pack alone, and "head" the vocabulary's part for 4,000 and 16,000 predicted tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from benchmarks.reference_rows import Batch, build_rows, row_logprobs
from benchmarks.shapes import SHAPES, mask_id_of, matmul_parameters, random_decoder
from models.attention import attention_backend, tile_pairs
from models.decoder import Decoder
from models.family import DecoderConfig
from models.kernels.launch import fused_kernels, set_fused
from train.documents import Document, build_document, number
from train.logprobs import chunked_logprobs
from train.loop import attended_length, pack_multiple
from train.methods.tracerl import trace_slices
from train.objectives import OBJECTIVES, ObjectiveInput, token_weights
from train.packing import Pack, assign, build_pack
from train.policy import Policy
from train.traces import Response

PEAK_FLOPS = 989e12
TRAINING = SimpleNamespace(
    shrink=1, post_num=None, eps=0.2, eps_high=None, beta=0.01, use_kl_estimator_k3=True, importance_cap=None, block_size=4
)


def update_packs(policy: Policy, packs: list[Pack], weights: Tensor, advantages: Tensor, training: Any) -> float:
    """Forward and backward of all packs, the clipped surrogate at a ratio of 1: the loss. weights, advantages: [M]."""
    total = 0.0
    for pack in packs:
        logprobs, _ = policy(pack)
        w, a, old = weights[pack.prediction], advantages[pack.prediction], logprobs.detach()
        loss = OBJECTIVES.get("clipped")(ObjectiveInput(logprobs, old, old, old, a, w, w), training).loss
        loss.backward()
        total += loss.detach()
    return float(total)


def draw_responses(arguments: Any, reveal: float, vocab: int) -> list[Response]:
    """Random tokens, one prompt for every `group` responses. In every block 1 + Binomial(B - 1, p) steps with mean B / reveal, each
    revealing at least one token."""
    rng = np.random.default_rng(arguments.seed)
    size = TRAINING.block_size
    responses = []
    prompt = rng.integers(0, vocab, -(-arguments.prompt // size) * size)
    for index in range(arguments.responses):
        if index and index % arguments.group == 0:
            prompt = rng.integers(0, vocab, len(prompt))
        length = arguments.response
        if arguments.ragged:
            length = int(np.clip(rng.lognormal(np.log(arguments.response / 3), 0.8), 16, arguments.response))
        length = -(-length // size) * size
        num_blocks = length // size
        num_steps = 1 + rng.binomial(size - 1, (size / reveal - 1) / (size - 1), num_blocks)
        steps = np.zeros((num_blocks, size), np.int64)
        first = 1
        for block, count in enumerate(num_steps):
            own = np.concatenate([np.arange(count), rng.integers(0, count, size - count)])
            steps[block] = first + rng.permutation(own)
            first += count
        responses.append(Response(prompt, rng.integers(0, vocab, length), length, steps.ravel()))
    return responses


def advantages_of(responses: list[Response]) -> Tensor:
    """One each; they do not cancel out, so that losses have something to differ in."""
    return torch.linspace(-1, 2, len(responses))


class Packed:
    """Our way: packed slices, chunked head."""

    def __init__(
        self, decoder: Decoder, responses: list[Response], arguments: Any, mask_id: int, share_prompts: bool = True
    ) -> None:
        self.policy = Policy(decoder, [mask_id], backend=arguments.backend, head_chunk=2048).to(arguments.device)
        self.documents: list[Document] = []
        for index, response in enumerate(responses):
            self.documents.append(
                build_document(index, response, trace_slices(response, TRAINING.block_size, TRAINING, None), TRAINING.block_size)
            )
        self.predictions = number(self.documents)
        longest = max(len(r.response_ids) for r in responses)
        self.weights = torch.as_tensor(token_weights(self.predictions, "reference", longest, longest), dtype=torch.float32)
        self.advantages = advantages_of(responses)[torch.as_tensor(self.predictions.response)]
        [packs] = assign(self.documents, arguments.budget, 1, share_prompts)
        round_to = pack_multiple(torch.device(arguments.device))
        attended = attended_length(arguments.budget)
        built = (build_pack(p, mask_id, round_to, share_prompts=share_prompts, attended_length=attended) for p in packs)
        self.packs = [pack.to(arguments.device) for pack in built]
        self.weights, self.advantages = self.weights.to(arguments.device), self.advantages.to(arguments.device)

    def update(self) -> float:
        return update_packs(self.policy, self.packs, self.weights, self.advantages, TRAINING)

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
        return sum(layer_flops(c, p) for p in self.packs) + 6 * c.vocab_size * c.hidden_size * len(self.predictions)


def layer_flops(c: DecoderConfig, pack: Pack) -> float:
    """Of forward and backward of all layers."""
    num_tokens = len(pack.input_ids) - pack.num_filler
    return 6 * matmul_parameters(c) * num_tokens + 12 * visible_pairs(pack) * c.num_heads * c.head_dim * c.num_layers


def visible_pairs(pack: Pack) -> int:
    """Filler's not counted."""
    pairs = int(tile_pairs(pack.token_ids).sum(dtype=torch.int64))
    _, lengths = torch.unique_consecutive(pack.token_ids.document[len(pack.input_ids) - pack.num_filler :], return_counts=True)
    return pairs - int(lengths.square().sum())


class Rows:
    """The reference's way."""

    def __init__(self, decoder: Decoder, responses: list[Response], arguments: Any, mask_id: int) -> None:
        self.decoder, self.device = decoder, arguments.device
        self.rows = build_rows(responses, TRAINING.block_size, mask_id)
        self.longest = max(len(r.response_ids) for r in responses)
        self.advantages = advantages_of(responses).tolist()
        size = arguments.reference_rows
        starts = range(0, len(self.rows), size)
        # On the host, dense masks included, as the reference's loader gives them. What it takes to make them is not timed: it
        # depends on how many cores do it.
        self.made = [Batch(self.rows[start : start + size], TRAINING.block_size) for start in starts]

    def batches(self) -> Iterator[Batch]:
        """Sent over one by one."""
        return (batch.to(self.device) for batch in self.made)

    def update(self) -> float:
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
        return sum(batch.ids.numel() for batch in self.made)


def gradients(decoder: Decoder) -> dict[str, torch.Tensor]:
    return {name: p.grad.float().clone() for name, p in decoder.named_parameters()}


def compare(arguments: Any, reveal: float) -> dict[str, float]:
    """Loss and gradient of both ways in float32, on two layers of the shape and few responses."""
    small = argparse.Namespace(**{**vars(arguments), "responses": 2, "response": min(arguments.response, 128), "reference_rows": 2})
    decoder = random_decoder(arguments.shape, 1, torch.float32, arguments.device)
    mask_id = mask_id_of(arguments.shape)
    responses = draw_responses(small, reveal, mask_id)
    packed, rows = Packed(decoder, responses, small, mask_id), Rows(decoder, responses, small, mask_id)
    packed.policy.forbidden = None  # the reference keeps the mask id in the softmax
    results = []
    for way, how in ((packed, fused_kernels(True)), (rows, fused_kernels(False))):
        decoder.zero_grad()
        with how:
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


def times(arguments: Any, reveal: float, layers: int) -> dict[str, Any]:
    """Seconds and peak memory of everything, at so many layers."""
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    decoder = random_decoder(arguments.shape, layers, dtype, arguments.device)
    mask_id = mask_id_of(arguments.shape)
    responses = draw_responses(arguments, reveal, mask_id)
    packed, unshared = (Packed(decoder, responses, arguments, mask_id, share) for share in (True, False))
    rows = Rows(decoder, responses, arguments, mask_id)
    result: dict[str, Any] = {}

    def timed(name: str, run: Callable[[], Any], recompute: bool = False) -> None:
        decoder.recomputed_layers = decoder.config.num_layers if recompute else 0
        result[f"{name}_seconds"], result[f"{name}_peak_gib"] = measure(run, arguments)

    def update(way: Any) -> Callable[[], Any]:
        return lambda: (decoder.zero_grad(set_to_none=False), way.update())

    timed("packed", update(packed))
    timed("packed_recompute", update(packed), recompute=True)
    if arguments.variants:
        timed("unshared", update(unshared))
        timed("packed_logprobs", packed.logprobs)
    with fused_kernels(False):
        if arguments.variants:
            timed("packed_plain_torch", update(packed))
        if arguments.compare:
            timed("reference", update(rows))
            timed("reference_old_logprobs", rows.logprobs)
    num_trained = len(packed.predictions)
    facts = {
        "rows_per_response": len(rows.rows) / len(responses),
        "mean_response": float(np.mean([len(r.response_ids) for r in responses])),
        "packed_tokens_per_response_token": packed.num_tokens / num_trained,
        "unshared_tokens_per_response_token": unshared.num_tokens / num_trained,
        "reference_tokens_per_response_token": rows.num_tokens / num_trained,
        "num_packs": len(packed.packs),
        "filler_share": 1 - packed.num_tokens / sum(len(p.input_ids) for p in packed.packs),
        "weights_and_gradients_gib": 2 * sum(p.numel() * p.element_size() for p in decoder.parameters()) / 2**30,
        "flops": packed.flops(),
    }
    return {**facts, **result}


def benchmark(arguments: Any, reveal: float) -> dict[str, Any]:
    """At N layers, and what N and N/2 make for the whole shape: its seconds lie on the line through both."""
    result = {"shape": arguments.shape, "layers": arguments.layers, "responses": arguments.responses, "reveal": reveal}
    result |= {"ragged": arguments.ragged, "group": arguments.group, **times(arguments, reveal, arguments.layers)}
    fewer, whole = arguments.layers // 2, SHAPES[arguments.shape].num_layers
    half = times(arguments, reveal, fewer) if fewer else {}
    for prefix, scale in [("", 0.0), ("whole_", (whole - arguments.layers) / max(1, arguments.layers - fewer))]:
        if prefix and not half:
            continue

        def at(name: str, scale: float = scale, own: dict[str, Any] = result) -> float:
            return own[name] + (scale * (own[name] - half[name]) if scale else 0.0)

        own = {"packed_mfu": at("flops") / at("packed_seconds") / PEAK_FLOPS}
        own["packed_recompute_mfu"] = at("flops") / at("packed_recompute_seconds") / PEAK_FLOPS
        if arguments.compare:
            old = at("reference_old_logprobs_seconds")
            own["speedup"] = (at("reference_seconds") + old) / at("packed_seconds")
            own["speedup_without_old_logprobs"] = at("reference_seconds") / at("packed_seconds")
            if arguments.variants:
                own["speedup_unshared"] = (at("reference_seconds") + old) / at("unshared_seconds")
            own["speedup_with_recomputation"] = (at("reference_seconds") + old) / at("packed_recompute_seconds")
        result |= {prefix + name: value for name, value in own.items()}
    return result


def full_pack(arguments: Any) -> dict[str, float]:
    """The layers alone, forward and backward, on one pack of up to `--budget` tokens at two tokens a forward."""
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    decoder, mask_id = random_decoder(arguments.shape, arguments.layers, dtype, arguments.device), mask_id_of(arguments.shape)
    many = argparse.Namespace(**{**vars(arguments), "responses": 64, "group": 64, "ragged": False})
    documents: list[Document] = []
    for index, response in enumerate(draw_responses(many, 2.0, mask_id)):
        trace = trace_slices(response, TRAINING.block_size, TRAINING, None)
        documents.append(build_document(index, response, trace, TRAINING.block_size))
        number(documents)
        if len(build_pack(documents, mask_id, share_prompts=True).input_ids) > arguments.budget:
            documents.pop()
            break
    round_to = pack_multiple(torch.device(arguments.device))
    pack = build_pack(documents, mask_id, round_to, share_prompts=True).to(arguments.device)
    result = {"pack_tokens": float(len(pack.input_ids) - pack.num_filler)}
    flops = layer_flops(decoder.config, pack)

    def run() -> None:
        decoder.zero_grad(set_to_none=True)
        attend = attention_backend(arguments.backend, pack.token_ids, dtype)
        hidden = decoder(pack.input_ids, pack.positions, attend)
        hidden.backward(hidden.detach())

    for name, recompute in [("pack", False), ("pack_recompute", True)]:
        decoder.recomputed_layers = decoder.config.num_layers if recompute else 0
        seconds, peak = measure(run, arguments)
        result |= {f"{name}_seconds": seconds, f"{name}_peak_gib": peak, f"{name}_mfu": flops / seconds / PEAK_FLOPS}
    with fused_kernels(False):
        decoder.recomputed_layers = 0
        result["pack_plain_torch_seconds"], result["pack_plain_torch_peak_gib"] = measure(run, arguments)
    attend = attention_backend(arguments.backend, pack.token_ids, dtype)
    c = decoder.config
    shapes = [(heads, c.head_dim) for heads in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
    heads = [torch.randn(len(pack.input_ids), *shape, device=arguments.device, dtype=dtype, requires_grad=True) for shape in shapes]

    def attention() -> None:
        out = attend(0, *heads)
        torch.autograd.grad(out, heads, out.detach())

    result["pack_attention_seconds"], _ = measure(attention, arguments)
    return result


def head(arguments: Any, num_predicted: int) -> dict[str, float]:
    """Forward and backward of the vocabulary's part; GiB beyond its weights."""
    c = SHAPES[arguments.shape]
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_predicted, c.hidden_size, generator=generator).to(arguments.device, dtype).requires_grad_()
    weight = (0.02 * torch.randn(c.vocab_size, c.hidden_size, generator=generator)).to(arguments.device, dtype).requires_grad_()
    targets = torch.randint(0, c.vocab_size - 1, (num_predicted,), generator=generator).to(arguments.device)
    before = torch.cuda.memory_allocated() / 2**30 if arguments.device == "cuda" else 0.0

    def run() -> None:
        logprobs, _ = chunked_logprobs(hidden, weight, targets)
        torch.autograd.grad(logprobs.sum(), [hidden, weight])

    seconds, peak = measure(run, arguments)
    result = {f"head_{num_predicted}_seconds": seconds, f"head_{num_predicted}_gib": max(0.0, peak - before)}
    with fused_kernels(False):
        result[f"head_{num_predicted}_plain_torch_seconds"], _ = measure(run, arguments)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", default="sdar-8b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--responses", type=int, default=16)
    parser.add_argument("--group", type=int, default=16, help="responses of one prompt")
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
    parser.add_argument("--no-variants", dest="variants", action="store_false", help="leave out: unshared, log-probs, plain torch")
    parser.add_argument("--no-parts", dest="parts", action="store_false", help="leave the full pack and the head alone out")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    set_fused(True)
    results: list[dict[str, Any]] = []

    def show(result: dict[str, Any]) -> None:
        results.append(result)
        for key, value in result.items():
            print(f"{key:38} {value:.4g}" if isinstance(value, float) else f"{key:38} {value}", flush=True)
        print()

    if arguments.parts:
        show({**full_pack(arguments), **head(arguments, 4000), **head(arguments, 16_000)})
    for reveal in map(float, arguments.reveal.split(",")):
        equal = compare(arguments, reveal) if arguments.compare else {}
        show({**equal, **benchmark(arguments, reveal)})
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

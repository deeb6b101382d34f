"""Peak memory and time of the update of an RL step of a full-attention model.

    python -m benchmarks.canvas_update --shape llada-8b --layers 2,4 --responses 8 --response 512 --rows 8
    python -m benchmarks.canvas_update --shape tiny-full --device cpu --layers 1,2 --prompt 8 --response 16 --rows 2 --budget 100

Random weights of the published shape, as many of its layers as `--layers` says (the whole vocabulary), and TraceRL on random step
maps: `--rows` collapsed steps of every response, each a canvas of its own, in packs of `--budget` tokens. Forward and backward of
all packs, without the optimizer. More rows make more packs, not larger ones: the peak is that of a full pack, so that of every
response's whole trace as well.

Two numbers of layers give a straight line; its value at the whole model is printed as `extrapolated`, beside the bytes of weights,
gradients and AdamW's states that go with it (bfloat16 weights and gradients, three float32 copies).
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator

import numpy as np
import torch

from benchmarks.shapes import SHAPES, family_of, mask_id_of, matmul_parameters, random_decoder
from benchmarks.train_step import PEAK_FLOPS, measure, update_packs
from train.documents import Document, number
from train.layout import Layout
from train.loop import attended_length, pack_multiple
from train.objectives import token_weights
from train.packing import assign, build_pack
from train.policy import Policy
from train.traces import Response

TRAINING = SimpleNamespace(
    method="TraceRL", post_num=None, eps=0.2, eps_high=None, beta=0.0, use_kl_estimator_k3=True, importance_cap=None
)


def documents_of(arguments: Any) -> list[Document]:
    """Random responses that revealed one token a step, their steps joined to `rows` of them."""
    training = SimpleNamespace(**vars(TRAINING), shrink=-(-arguments.response // arguments.rows), max_gen_length=arguments.response)
    layout = Layout(family_of(arguments.shape).attention, training)
    assert layout.is_canvas, f"--shape {arguments.shape}: its family has block attention, see benchmarks.train_step"
    rng, vocab = np.random.default_rng(arguments.seed), mask_id_of(arguments.shape)
    documents = []
    for index in range(arguments.responses):
        prompt, tokens = (rng.integers(0, vocab, n) for n in (arguments.prompt, arguments.response))
        response = Response(prompt, tokens, len(tokens), 1 + rng.permutation(len(tokens)))
        documents.append(layout.document(index, response, rng))
    return documents


class Update:
    """The packs of one update, and its loss."""

    def __init__(self, arguments: Any, num_layers: int) -> None:
        family, mask_id = family_of(arguments.shape), mask_id_of(arguments.shape)
        dtype = torch.bfloat16 if arguments.device.type == "cuda" else torch.float32
        self.decoder = random_decoder(arguments.shape, num_layers, dtype, arguments.device)
        self.policy = Policy(self.decoder, [mask_id], backend=arguments.backend, head_chunk=2048).to(arguments.device)
        documents = documents_of(arguments)
        predictions = number(documents)
        weights = token_weights(predictions, "response", arguments.response, arguments.response, family.attention)
        self.weights = torch.as_tensor(weights, dtype=torch.float32, device=arguments.device)
        self.advantages = torch.linspace(-1, 1, arguments.responses)[torch.as_tensor(predictions.response)].to(arguments.device)
        [packs] = assign(documents, arguments.budget, 1)
        round_to = pack_multiple(arguments.device)
        attended = attended_length(arguments.budget)
        built = (build_pack(p, mask_id, round_to, family.logit_shift, attended_length=attended) for p in packs)
        self.packs = [pack.to(arguments.device) for pack in built]
        self.num_predictions = len(predictions)

    def __call__(self) -> float:
        self.decoder.zero_grad(set_to_none=False)
        return update_packs(self.policy, self.packs, self.weights, self.advantages, TRAINING)

    @property
    def num_tokens(self) -> int:
        return sum(len(p.input_ids) - p.num_filler for p in self.packs)

    def flops(self, canvas: int) -> float:
        """Of forward and backward, nothing recomputed: 6 per weight and token, 12 per head dimension and visible pair."""
        c = self.decoder.config
        head = 6 * c.vocab_size * c.hidden_size * self.num_predictions
        attention = 12 * self.num_tokens * canvas * c.num_heads * c.head_dim * c.num_layers
        return 6 * matmul_parameters(c) * self.num_tokens + head + attention


def states_gib(shape: str, num_layers: int) -> float:
    """Weights and gradients in bfloat16 and AdamW's float32 weights and moments of that many layers."""
    config = SHAPES[shape]
    of_layers = matmul_parameters(config) * num_layers / config.num_layers
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return (2 + 2 + 3 * 4) * (of_layers + embeddings) / 2**30


def benchmark(arguments: Any) -> Iterator[dict[str, Any]]:
    cuda = arguments.device.type == "cuda"
    for recompute in (False, True):
        points: list[tuple[int, float]] = []  # layers, peak of activations
        for num_layers in arguments.layers:
            update = Update(arguments, num_layers)
            update.decoder.recomputed_layers = num_layers if recompute else 0
            seconds, peak = measure(update, SimpleNamespace(device=arguments.device.type, repeats=arguments.repeats))
            held = 2 * sum(p.numel() * p.element_size() for p in update.decoder.parameters()) / 2**30
            points.append((num_layers, peak - held))
            result = {
                "shape": arguments.shape,
                "layers": num_layers,
                "recompute": recompute,
                "responses": arguments.responses,
                "canvas": arguments.prompt + arguments.response,
                "rows_per_response": arguments.rows,
                "tokens": update.num_tokens,
                "num_packs": len(update.packs),
                "seconds": seconds,
                "mfu": update.flops(arguments.prompt + arguments.response) / seconds / PEAK_FLOPS,
            }
            yield {**result, "peak_gib": peak, "weights_and_gradients_gib": held} if cuda else result
            del update
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
        if len(points) > 1 and cuda:
            whole = SHAPES[arguments.shape].num_layers
            yield {
                "shape": arguments.shape,
                "layers": whole,
                "recompute": recompute,
                "extrapolated_from_layers": [layers for layers, _ in points],
                "extrapolated_activations_gib": extrapolate(points, whole),
                "states_gib": states_gib(arguments.shape, whole),
            }


def extrapolate(points: list[tuple[int, float]], at: int) -> float:
    """The straight line through the first and the last point."""
    (x0, y0), (x1, y1) = points[0], points[-1]
    return y0 + (y1 - y0) / (x1 - x0) * (at - x0)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.canvas_update", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", default="llada-8b", choices=[name for name in SHAPES if family_of(name).attention == "full"])
    parser.add_argument("--layers", type=lambda text: [int(part) for part in text.split(",")], default=[2, 4])
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--response", type=int, default=512, help="tokens of the canvas behind the prompt")
    parser.add_argument("--rows", type=int, default=8, help="collapsed steps of a response that are trained")
    parser.add_argument("--budget", type=int, default=16_384, help="tokens of a pack")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args(argv)
    results = []
    for result in benchmark(arguments):
        results.append(result)
        for key, value in result.items():
            print(f"{key:32} {value:.4g}" if isinstance(value, float) else f"{key:32} {value}", flush=True)
        print()
        if arguments.out is not None:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""What the ranks of test_accumulation run: a tiny net through common.dist, in every mode, on numbers that need no process to know.

A step is a list of micro-batches of every rank; its loss is a sum over all of them divided by one number. One micro-batch of the
last rank is filler: it joins every collective and adds nothing.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from configs.schema import Config

VOCAB, WIDTH = 11, 8
COUNTS = (1, 3, 2)
"""Micro-batches of each optimizer step, per rank."""
LEARNING_RATES = (0.5, 0.2, 0.4)
MAX_GRAD_NORM = 0.25  # below the norms of the first steps: clipping is part of what must agree


class TinyNet(nn.Module):
    """Has what a decoder has and sharding could break: recomputation, and a weight used outside its module's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layer = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.SiLU(), nn.Linear(4 * WIDTH, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """ids, targets [N] -> negative log-likelihood of each target [N], float32."""
        x = self.embedding(ids)
        x = x + checkpoint(self.layer, x, use_reentrant=False)
        x = self.norm(x)
        return torch.cat(
            [checkpoint(self.loss_of_chunk, part, own, use_reentrant=False) for part, own in zip(x.split(4), targets.split(4))]
        )

    def loss_of_chunk(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, self.head.weight).float(), targets, reduction="none")


class CountingSGD(torch.optim.SGD):
    num_steps = 0

    def step(self, closure=None):
        self.num_steps += 1
        return super().step(closure)


def make_net() -> TinyNet:
    torch.manual_seed(0)
    return TinyNet()


def make_steps(num_ranks: int) -> list[list[list[dict[str, Any]]]]:
    """[step][rank][micro-batch] of ids, targets and the scale of their summed loss. `num_ranks` 1 and 2 hold the same tokens."""
    generator = torch.Generator().manual_seed(1)
    steps = []
    for count in COUNTS:
        of_two = []
        for rank in range(2):
            micro_batches = []
            for index in range(count):
                length = int(torch.randint(3, 12, (), generator=generator))
                ids, targets = torch.randint(0, VOCAB, (2, length), generator=generator)
                is_filler = rank == 1 and index == 1
                micro_batches.append({"ids": ids, "targets": targets, "scale": 0.0 if is_filler else 1.0})
            of_two.append(micro_batches)
        total = sum(len(m["ids"]) for own in of_two for m in own if m["scale"])
        for own in of_two:
            for micro_batch in own:
                micro_batch["scale"] /= total
        steps.append(of_two if num_ranks == 2 else [of_two[0] + of_two[1]])
    return steps


def make_config(
    deepspeed_file: str | None, dtype: str = "float32", max_grad_norm: float | None = MAX_GRAD_NORM, in_float32: bool = False
) -> Config:
    config = Config()
    config.training.reduce_in_float32 = in_float32
    config.experiment.deepspeed_file = deepspeed_file
    config.model.dtype = dtype
    config.training.max_grad_norm = max_grad_norm
    return config


def forget_accelerator() -> None:
    """A job has one accelerator; this lets the next mode make another in the same process (the process group stays)."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._reset_state()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def run_mode(
    deepspeed_file: str | None,
    dtype: str = "float32",
    max_grad_norm: float | None = MAX_GRAD_NORM,
    broken_step: int | None = None,
) -> list[dict[str, Any]]:
    """One record per optimizer step: summed gradients, norm, weights, whether they moved before the step, number of steps.

    broken_step: in it the loss of the last rank's first micro-batch is NaN.
    """
    from common import dist

    forget_accelerator()
    config = make_config(deepspeed_file, dtype, max_grad_norm)
    accelerator = dist.make_accelerator(config)
    net = make_net().to(dist.weights_dtype(config))
    optimizer = CountingSGD(net.parameters(), lr=1.0)
    model, prepared = accelerator.prepare(net, optimizer)
    device, rank = accelerator.device, accelerator.process_index
    records = []
    for step, (of_ranks, learning_rate) in enumerate(zip(make_steps(accelerator.num_processes), LEARNING_RATES)):
        # Through the prepared optimizer or through the one before: both reach the weights.
        for group in (prepared if step % 2 else optimizer).param_groups:
            group["lr"] = learning_rate
        micro_batches = of_ranks[rank]
        before = weights(accelerator, model)
        moved_early = False
        for index, micro_batch in enumerate(micro_batches):
            with dist.accumulate(accelerator, model, index, len(micro_batches)):
                losses = model(micro_batch["ids"].to(device), micro_batch["targets"].to(device))
                is_broken = step == broken_step and index == 0 and rank == accelerator.num_processes - 1
                dist.backward(accelerator, model, losses.sum() * (math.nan if is_broken else micro_batch["scale"]))
            moved_early |= optimizer.num_steps != (records[-1]["num_steps"] if records else 0)
        moved_early |= any(not torch.equal(before[name], value) for name, value in weights(accelerator, model).items())
        gradients = {}  # none are left where the step came too early
        if not moved_early:
            gradients = {name: gradient.float().cpu().clone() for name, gradient in dist.full_gradients(accelerator, model)}
        norm = dist.optimizer_step(accelerator, model, prepared, max_grad_norm)
        records.append({
            "gradients": gradients,
            "norm": norm,
            "weights": weights(accelerator, model),
            "finite": dist.weights_are_finite(accelerator, model),
            "moved_early": moved_early,
            "num_steps": optimizer.num_steps,
            "num_processes": accelerator.num_processes,
        })  # fmt: skip
    return records


def weights(accelerator: Any, model: nn.Module) -> dict[str, Tensor]:
    """The whole weights; empty on other ranks than the first under ZeRO-3. All ranks together."""
    state = accelerator.get_state_dict(model) or {}
    return {name: value.detach().float().cpu().clone() for name, value in state.items()}


def run_modes(modes: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {name: run_mode(**arguments) for name, arguments in modes.items()}


def talk() -> dict[str, Any]:
    """The collectives of common.dist."""
    import time

    from common import dist

    forget_accelerator()
    accelerator = dist.make_accelerator(make_config(None))
    rank = accelerator.process_index
    order = []
    with dist.main_first(accelerator):
        order.append(time.monotonic())
        time.sleep(0.2)
    watch = dist.Stopwatch(accelerator)
    with watch("sleep"):
        time.sleep(0.05 + 0.2 * rank)
    nested = dist.Stopwatch(accelerator)
    start = time.perf_counter()
    with nested("outer"), nested("inner"):
        time.sleep(0.1)
    with nested("outer"):
        time.sleep(0.05)
        with nested("inner"):
            time.sleep(0.1)
    elapsed = time.perf_counter() - start
    return {
        "gathered": dist.gather_objects(accelerator, {"rank": rank, "text": "x" * (10 + 1000 * rank)}),
        "broadcast": dist.broadcast_object(accelerator, f"from {rank}"),
        "first": order[0],
        "slowest": watch.slowest(),
        "own": dict(watch.seconds),
        "nested": (nested.seconds["inner"], nested.seconds["outer"], elapsed),
    }


def sharding_under_accelerate(config_file: str | None) -> tuple[int, str, str]:
    """As the accelerator has it where `accelerate launch` says ZeRO-3 with all on the host and the config names `config_file`."""
    from unittest import mock

    from common import dist

    forget_accelerator()
    devices = {f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE": "cpu" for what in ("OPTIMIZER", "PARAM")}
    with mock.patch.dict(os.environ, ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE="3", **devices):
        found = dist.sharding(dist.make_accelerator(make_config(config_file)))
    return found.zero_stage, found.offload_optimizer, found.offload_param


NUM_MICRO_BATCHES = 128


def many_micro_batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    pairs = (torch.randint(0, VOCAB, (2, 6), generator=generator) for _ in range(NUM_MICRO_BATCHES))
    return [{"ids": ids, "targets": targets} for ids, targets in pairs]


def master_changes(modes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Tensor]]:
    """By mode (arguments of make_config) and weight the summed gradient of all micro-batches, dealt to the ranks in turn: by how
    much the float32 masters of bfloat16 weights are smaller behind a step of SGD at a rate of 1."""
    from common import dist, state

    changes = {}
    for mode, arguments in modes.items():
        forget_accelerator()
        config = make_config(dtype="bfloat16", max_grad_norm=None, **arguments)
        accelerator = dist.make_accelerator(config)
        net = make_net().to(torch.bfloat16)
        model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=1.0))
        parts = state._parts(accelerator)
        own = many_micro_batches()[accelerator.process_index :: accelerator.num_processes]
        before = masters(parts)
        for index, m in enumerate(own):
            with dist.accumulate(accelerator, model, index, len(own)):
                dist.backward(accelerator, model, model(m["ids"], m["targets"]).sum())
        dist.optimizer_step(accelerator, model, optimizer, None)
        changes[mode] = {name: before[name] - after for name, after in masters(parts).items()}
    return changes


def masters(parts: Any) -> dict[str, Tensor]:
    """parts: of common/state.py."""
    from common.state import WEIGHT

    return {name: parts.read(p, WEIGHT).clone().view(parts.shape(p)) for name, p in parts.parameters()}


def alone_in_an_operators_environment(
    modes: dict[str, dict[str, Any]], rank: str = "0", size: str = "1"
) -> dict[str, list[dict[str, Any]]]:
    """run_modes in one process, in a container that was told of a rank and a host that is not there."""
    operators = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "1"}
    os.environ.update(operators)
    return run_modes(modes)

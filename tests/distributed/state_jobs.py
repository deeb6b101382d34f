"""What the ranks of test_state run: a tiny net is trained a little, its state is written, and read into a fresh one."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.distributed.probe import forget_accelerator, make_config, make_net, make_steps, weights


def build(deepspeed_file: str | None, dtype: str) -> tuple[Any, Any, Any]:
    """accelerator, prepared model and prepared optimizer."""
    from common import dist

    forget_accelerator()
    config = make_config(deepspeed_file, dtype)
    accelerator = dist.make_accelerator(config)
    net = make_net().to(dist.weights_dtype(config))
    matrices, vectors = ([p for p in net.parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    model, optimizer = accelerator.prepare(net, torch.optim.AdamW(groups, lr=1e-2))
    return accelerator, model, optimizer


def step(accelerator: Any, model: Any, optimizer: Any, number: int) -> None:
    """One optimizer step on the tokens of step `number`, whatever the number of ranks."""
    from common import dist

    of_two = make_steps(2)[number]
    share = of_two[accelerator.process_index :: accelerator.num_processes]
    micro_batches = [m for own in share for m in own]
    for index, m in enumerate(micro_batches):
        with dist.accumulate(accelerator, model, index, len(micro_batches)):
            dist.backward(accelerator, model, model(m["ids"], m["targets"]).sum() * m["scale"])
    dist.optimizer_step(accelerator, model, optimizer, 0.25)


def whole(accelerator: Any, model: Any) -> dict[str, Any]:
    """Everything that a state is made of, put together, and the weights as accelerate gives them."""
    from common import state

    parts = state._parts(accelerator)
    kept = {
        name: {key: parts.read(p, key).clone().view(parts.shape(p)) for key in [state.WEIGHT, *parts.keys()]}
        for name, p in parts.parameters()
    }
    scalars = {key: float(value) for key, value in parts.scalars().items()}
    return {"kept": kept, "scalars": scalars, "weights": weights(accelerator, model)}


def write(modes: dict[str, tuple[str | None, str]], folder: str) -> dict[str, dict[str, Any]]:
    """Two steps, a state, what is in it, and where a third step leads."""
    from common.state import save_state

    results = {}
    for name, arguments in modes.items():
        accelerator, model, optimizer = build(*arguments)
        for number in range(2):
            step(accelerator, model, optimizer, number)
        random.seed(100 + accelerator.process_index)
        torch.manual_seed(200 + accelerator.process_index)
        save_state(accelerator, Path(folder, name))
        draws = (random.random(), float(torch.rand(())))
        before = whole(accelerator, model)
        step(accelerator, model, optimizer, 2)
        results[name] = {"before": before, "after": whole(accelerator, model), "draws": draws}
    return results


def write_and_read(
    written: dict[str, tuple[str | None, str]], read_into: dict[str, tuple[str, str | None, str]], folder: str
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Both, in processes that are started once."""
    return write(written, folder), read(read_into, folder)


def read(modes: dict[str, tuple[str, str | None, str]], folder: str) -> dict[str, dict[str, Any]]:
    """By name: the state that is read, and into what. The second rank is another machine's, which cannot see the folder."""
    from common.state import load_state

    results = {}
    for name, (source, *arguments) in modes.items():
        accelerator, model, optimizer = build(*arguments)
        with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE="1"):
            load_state(accelerator, Path(folder, source) if accelerator.is_main_process else Path("/nowhere"))
        draws = (random.random(), float(torch.rand(())))
        before = whole(accelerator, model)
        step(accelerator, model, optimizer, 2)
        results[name] = {"before": before, "after": whole(accelerator, model), "draws": draws}
    return results

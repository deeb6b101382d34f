"""Norms of the gradient by published tensor: which layers an update moves, and where one blows up.

Several published tensors are rows of one fused parameter, so the norm of every row is taken first, and the rows of each name are
put together: sum over names of norm^2 = norm^2 of the whole gradient.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from common import dist
from models.checkpoint import Pretrained
from models.lora import PREFIX, tensor_names
from models.value import VALUE_HEAD


class GradientNorms:
    """Measures every so many optimizer steps, and keeps what was measured until the run has written it."""

    def __init__(self, module: nn.Module, model: Pretrained, every: int | None) -> None:
        """module: what is trained, around the decoder of `model`; every: `logging.gradient_norms_every`."""
        self.every = every
        self.places = {} if every is None else published_places(module, model)
        self.rows: list[dict[str, Any]] = []

    def measure(self, accelerator: Any, module: nn.Module, num_steps: int) -> None:
        """Between the last backward and the step, the `num_steps`-th of the run; all ranks together."""
        if self.every is None or num_steps % self.every:
            return
        norms: dict[str, Tensor] = {}
        for name, gradient in dist.full_gradients(accelerator, module):
            own = self.places[name]
            if gradient is None:
                norms |= {published: torch.zeros((), dtype=torch.float64, device=accelerator.device) for published, _ in own}
                continue
            rows = row_norms(gradient)
            norms |= {published: torch.linalg.vector_norm(rows[place]) for published, place in own}
        values = torch.stack(list(norms.values())).tolist()  # the device is waited for once
        self.rows.append({"optimizer_step": num_steps, "norms": dict(zip(norms, values, strict=True))})

    def take(self) -> list[dict[str, Any]]:
        """What was measured since the last call: {"optimizer_step": from 1, "norms": {published name: norm}}."""
        rows, self.rows = self.rows, []
        return rows


def row_norms(gradient: Tensor) -> Tensor:
    """Gradient [R, ...] -> norm of every row [R], float64. Within a row float32 is exact enough, and no tensor is converted."""
    return torch.linalg.vector_norm(gradient.reshape(len(gradient), -1), dim=1, dtype=torch.float32).double()


def published_places(module: nn.Module, model: Pretrained) -> dict[str, list[tuple[str, slice]]]:
    """{parameter of `module`: [(name of a tensor in the checkpoint, its rows)]}; of a model with an adapter, the adapter's.

    module: bare, holds the decoder of `model`.
    """
    places: dict[str, list[tuple[str, slice]]] = defaultdict(list)
    prefix = next(name for name, part in module.named_modules() if part is model.decoder) + "."
    config, adapter = model.decoder.config, model.adapter
    if adapter is None:
        for piece in model.family.pieces(config):
            places[prefix + piece.parameter].append((piece.published, slice(piece.start, piece.start + piece.rows)))
    else:
        for published, name in tensor_names(model.family, config, adapter.targets).items():
            places[prefix + name].append((published, slice(None)))
    # A policy's value head is a file of its own, a value model's is in the checkpoint (models/value.py).
    places["value_head.weight"].append((VALUE_HEAD, slice(None)))
    places["model.head.weight"].append((VALUE_HEAD if adapter is None else PREFIX + VALUE_HEAD, slice(None)))
    return dict(places)

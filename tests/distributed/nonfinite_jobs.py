"""What the ranks of test_nonfinite run: an RL run in which one micro-batch has no finite loss, or a weight is broken."""

from __future__ import annotations

import math
from typing import Any

import torch

from common import dist
from common.errors import UserError
from tests.train.steps import forget_accelerator

BROKEN_STEP = 3


def rl_run(argv: list[str], breaks: str) -> dict[str, Any]:
    """breaks: what is NaN in step 3, the first "loss" of every model on the last rank, or a "weight" behind the update.

    Returns the policy's weights behind every step, its optimizer steps, and what the run ended with.
    """
    import rl

    kept: dict[str, Any] = {"weights": [], "num_steps": [], "error": None}
    met: set[type] = set()
    in_broken_step = False
    backward = dist.backward

    def poisoned(accelerator: Any, model: torch.nn.Module, loss: torch.Tensor) -> None:
        bare = type(getattr(model, "module", model))
        if in_broken_step and bare not in met and accelerator.process_index == accelerator.num_processes - 1:
            met.add(bare)
            loss = loss * math.nan
        backward(accelerator, model, loss)

    class Watched(rl.RLRun):
        def update(self, scored: list[Any], step: int) -> None:
            nonlocal in_broken_step
            in_broken_step = step == BROKEN_STEP and breaks == "loss"
            super().update(scored, step)
            in_broken_step = False
            self.engine_weights.refresh(self.run.trainer.num_steps)
            decoder = self.engine_weights.decoder
            kept["weights"].append({n: p.detach().clone() for n, p in decoder.named_parameters()})
            kept["num_steps"].append(self.run.trainer.num_steps)
            if step == BROKEN_STEP and breaks == "weight" and dist.shards_weights(self.run.accelerator):
                if self.run.accelerator.process_index == 1:  # the last entry of its piece of one tensor
                    weight = next(self.run.trainer.module.parameters())
                    weight.ds_tensor.data[weight.ds_numel - weight.ds_tensor.numel() - 1] = math.inf
            elif step == BROKEN_STEP and breaks == "weight":
                next(decoder.parameters()).data.view(-1)[5] = math.nan

    original, rl.RLRun = rl.RLRun, Watched
    dist.backward = poisoned
    forget_accelerator()
    try:
        rl.main.__wrapped__(argv)  # not its entry point, which ends the process
    except UserError as error:
        kept["error"] = str(error)
    finally:
        rl.RLRun, dist.backward = original, backward
    return kept


def rl_runs(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: rl_run(**arguments) for name, arguments in runs.items()}

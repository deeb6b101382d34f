"""The one training loop: documents in, optimizer steps out. RL, SFT and the golden checker all go through `Trainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Iterator

import numpy as np
import torch
from torch import Tensor

from common import dist
from models.checkpoint import Pretrained
from train.objectives import Objective, ObjectiveInput, kl_estimate
from train.optim import build_optimizer, policy_learning_rate, schedule_factor
from train.packing import Document, Pack, assign, build_pack
from train.policy import Policy

PACK_SIZES = 8
"""On CUDA packs are filled up to one of this many sizes, so that kernels are compiled for few of them."""


@dataclass
class Tables:
    """What the objective needs about every prediction of a batch, each float array [M]. None: as the trainer computes it now."""

    advantages: np.ndarray
    weights: np.ndarray
    kl_weights: np.ndarray
    old_logprobs: np.ndarray | None = None
    """None: the log-probs of the update itself, without gradient (exactly on-policy: the ratio is 1)."""
    kl_logprobs: np.ndarray | None = None
    """None: old_logprobs."""
    engine_logprobs: np.ndarray | None = None
    """As sampled; None where nothing was (SFT)."""


@dataclass
class StepResult:
    """One optimizer step, reduced over ranks."""

    loss: float
    gradient_norm: float
    """Before clipping."""
    learning_rate: float
    means: dict[str, float] = field(default_factory=dict)
    """Means over the step's predictions."""
    extremes: dict[str, float] = field(default_factory=dict)
    num_predictions: int = 0
    num_tokens: int = 0
    """Packed tokens, filler excluded."""


class Trainer:
    """Owns the wrapped policy and its optimizer."""

    def __init__(self, model: Pretrained, config: Any, accelerator: Any, temperature: float = 1.0) -> None:
        """temperature: of the rollouts; 1 for supervised finetuning."""
        self.config, self.accelerator = config, accelerator
        self.mask_id, self.logit_shift = model.mask_id, model.family.logit_shift
        model.decoder.gradient_checkpointing = config.training.gradient_checkpointing_enable
        policy = self.build_policy(model, temperature)
        self.optimizer = build_optimizer(policy, config)
        self.policy, self.wrapped_optimizer = accelerator.prepare(policy, self.optimizer)
        self.num_steps = 0
        """Optimizer steps taken: the version of the weights."""

    def build_policy(self, model: Pretrained, temperature: float) -> Policy:
        t = self.config.training
        return Policy(model.decoder, model.forbidden_ids, temperature, t.attention_backend, t.head_chunk)

    def micro_batches(self, documents: list[Document]) -> list[Pack]:
        """This rank's packs; their number is the same on every rank."""
        budget = self.config.training.max_tokens_per_microbatch
        own = assign(documents, budget, self.accelerator.num_processes)[self.accelerator.process_index]
        round_to = max(128, budget // PACK_SIZES) if self.accelerator.device.type == "cuda" else 1
        return [build_pack(d, self.mask_id, round_to, self.logit_shift) for d in own]

    @torch.no_grad()
    def logprobs(self, documents: list[Document], num_predictions: int, policy: torch.nn.Module | None = None) -> np.ndarray:
        """Log-probability of every prediction [num_predictions] under the current weights, known to every rank.

        policy: another one (a frozen reference) instead of the trained one.
        """
        table = torch.zeros(num_predictions, dtype=torch.float32, device=self.accelerator.device)
        for pack in self.micro_batches(documents):
            pack = pack.to(self.accelerator.device)
            values, _ = (policy or self.policy)(pack)
            real = pack.prediction >= 0
            table[pack.prediction[real]] = values[real]
        # Every prediction is on exactly one rank: the sum over ranks is the table.
        return self.accelerator.reduce(table, "sum").cpu().numpy()

    def step(self, documents: list[Document], tables: Tables, objective: Objective, progress: float) -> StepResult:
        """One optimizer step over `documents` (the whole step's, the same list on every rank).

        progress: share of the run that is done, 0..1, for the learning rate.
        """
        rate = self.learning_rate(progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        device_tables = DeviceTables(tables, self.accelerator.device)
        totals = Totals(self.accelerator.device)
        packs = self.micro_batches(documents)
        for index, pack in enumerate(packs):
            pack = pack.to(self.accelerator.device)
            with dist.accumulate(self.accelerator, self.policy, index, len(packs)):
                logprobs, entropy = self.policy(pack)
                x = device_tables.pick(pack, logprobs)
                output = objective(x, self.config.training)
                dist.backward(self.accelerator, self.policy, output.loss)
            totals.add(output, x, entropy, pack)
        norm = dist.optimizer_step(self.accelerator, self.policy, self.wrapped_optimizer, self.config.training.max_grad_norm)
        self.num_steps += 1
        return totals.reduce(self.accelerator, norm, rate)

    def learning_rate(self, progress: float) -> float:
        scheduler = self.config.lr_scheduler
        warmup = min(1.0, (self.num_steps + 1) / max(1, scheduler.params.warmup_steps))
        return policy_learning_rate(self.config) * warmup * schedule_factor(
            scheduler.scheduler, progress, scheduler.params.min_lr_scale
        )


class DeviceTables:
    """Tables on the device, with the rule for what is missing."""

    def __init__(self, tables: Tables, device: torch.device) -> None:
        self.columns = {
            name: torch.as_tensor(value, dtype=torch.float32).to(device) for name, value in vars(tables).items() if value is not None
        }

    def pick(self, pack: Pack, logprobs: Tensor) -> ObjectiveInput:
        """The rows of a pack. Filler predictions get weight 0: they count nothing, but keep the graph whole."""
        real = pack.prediction >= 0
        index = pack.prediction.clamp(min=0)

        def column(name: str, default: Tensor) -> Tensor:
            return self.columns[name][index] if name in self.columns and len(self.columns[name]) else default

        old = column("old_logprobs", logprobs.detach())
        zero = torch.zeros_like(old)
        return ObjectiveInput(
            logprobs=logprobs,
            old_logprobs=old,
            kl_logprobs=column("kl_logprobs", old),
            engine_logprobs=column("engine_logprobs", old),
            advantages=column("advantages", zero),
            weights=column("weights", zero) * real,
            kl_weights=column("kl_weights", zero) * real,
        )


class Totals:
    """Sums and extremes over the micro-batches of a step, on the device until the end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.extremes: dict[str, Tensor] = {}

    def add(self, output: Any, x: ObjectiveInput, entropy: Tensor, pack: Pack) -> None:
        real = pack.prediction >= 0
        with torch.no_grad():
            # How far the engine's log-probs were from the trainer's: rounding only, if what is trained is what was sampled.
            gap = (x.old_logprobs - x.engine_logprobs)[real]
            sums = {
                "loss": output.loss.detach(),
                "num_predictions": real.sum(),
                "num_tokens": torch.tensor(len(pack.input_ids) - pack.num_filler, device=self.device),
                "entropy": entropy[real].sum(),
                "gap/logprob_mean": gap.abs().sum(),
                "gap/k3": kl_estimate(-gap, torch.zeros_like(gap), k3=True).sum(),
            }
            if real.all():  # filler is alone in its pack
                sums |= output.sums
                for name, value in {**output.extremes, "gap/logprob_max": gap.abs().max()}.items():
                    keep = torch.minimum if name.endswith("_min") else torch.maximum
                    self.extremes[name] = keep(self.extremes[name], value) if name in self.extremes else value.detach()
            for name, value in sums.items():
                self.sums[name] = self.sums.get(name, 0) + value.detach().double()

    def reduce(self, accelerator: Any, gradient_norm: float, learning_rate: float) -> StepResult:
        own = ({k: float(v) for k, v in self.sums.items()}, {k: float(v) for k, v in self.extremes.items()})
        sums: dict[str, float] = {}
        extremes: dict[str, float] = {}
        for rank_sums, rank_extremes in dist.gather_objects(accelerator, own):
            for name, value in rank_sums.items():
                sums[name] = sums.get(name, 0.0) + value
            for name, value in rank_extremes.items():
                keep = min if name.endswith("_min") else max
                extremes[name] = keep(extremes[name], value) if name in extremes else value
        loss, num_tokens = sums.pop("loss"), int(sums.pop("num_tokens"))
        count = int(sums.pop("num_predictions"))
        means = {name: value / max(count, 1) for name, value in sums.items()}
        return StepResult(loss, gradient_norm, learning_rate, means, extremes, count, num_tokens)


def merge_results(results: list[StepResult]) -> dict[str, float]:
    """The metrics of one RL step from those of its updates: means over updates, extremes over all, the sums of tokens."""

    def items(name: str) -> Iterator[tuple[str, float]]:
        for result in results:
            yield from getattr(result, name).items()

    metrics: dict[str, list[float]] = {}
    for result in results:
        for name in ("loss", "gradient_norm", "learning_rate"):
            metrics.setdefault(f"train/{name}", []).append(getattr(result, name))
    for name, value in items("means"):
        metrics.setdefault(name if "/" in name else f"train/{name}", []).append(value)
    merged = {name: float(np.mean(values)) for name, values in metrics.items()}
    for name, value in items("extremes"):
        key = name if "/" in name else f"train/{name}"
        keep = min if name.endswith("_min") else max
        merged[key] = keep(merged[key], value) if key in merged else value
    merged["train/num_updates"] = float(len(results))
    merged["train/num_tokens"] = float(sum(r.num_tokens for r in results))
    merged["train/num_predictions"] = float(sum(r.num_predictions for r in results))
    return merged

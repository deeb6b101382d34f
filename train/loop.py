"""The one training loop: documents in, optimizer steps out. RL, SFT and the golden checker all go through `Trainer`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from common import dist
from models.checkpoint import Pretrained
from models.row_length import TILE
from train.documents import Document
from train.gap import gap_measures
from train.gradient_norms import GradientNorms
from train.layout import Layout
from train.objectives import Measures, Objective, ObjectiveInput, ObjectiveOutput
from train.offload import HostCopy
from train.optim import build_optimizer, learning_rate
from train.packing import Pack, assign, build_pack


def pack_multiple(device: torch.device) -> int:
    """What packs are filled up to a multiple of: on CUDA whole tiles of the mask."""
    return TILE if device.type == "cuda" else 1


def attended_length(budget: int) -> int:
    """`TokenIds.attended_length` of packs of up to so many tokens: all of them of one size, unless they are long. To fill a short
    pack up that far would cost more than to compile for it."""
    return min(budget, 16_384)


@dataclass
class Tables:
    """What a policy objective needs about every prediction of a batch, each float array [M]. None: as the trainer has it now."""

    advantages: np.ndarray
    weights: np.ndarray
    kl_weights: np.ndarray
    old_logprobs: np.ndarray | None = None
    """None: the log-probs of the update itself, without gradient (exactly on-policy: the ratio is 1)."""
    kl_logprobs: np.ndarray | None = None
    """None: old_logprobs."""
    engine_logprobs: np.ndarray | None = None
    """As sampled; None where nothing was (SFT, masks that sampling never saw)."""
    is_first: bool = True
    """Whether these weights are still those that sampled: only then is the gap to the engine's log-probs rounding alone."""

    def pick(self, columns: Columns, outputs: tuple[Tensor, ...]) -> ObjectiveInput:
        """The rows of a pack. Filler predictions get weight 0: they count nothing, but keep the graph whole."""
        logprobs = outputs[0]
        zero = torch.zeros_like(logprobs)
        old = columns.get("old_logprobs", logprobs.detach())
        return ObjectiveInput(
            logprobs=logprobs,
            old_logprobs=old,
            kl_logprobs=columns.get("kl_logprobs", old),
            engine_logprobs=columns.get("engine_logprobs", old),
            advantages=columns.get("advantages", zero),
            weights=columns.get("weights", zero) * columns.real,
            kl_weights=columns.get("kl_weights", zero) * columns.real,
        )

    def diagnose(self, x: ObjectiveInput, outputs: tuple[Tensor, ...]) -> Measures:
        """Entropy, and how far engine and trainer log-probs are apart: rounding only, if what is trained is what was sampled."""
        measures = Measures({"entropy": outputs[1].sum()})
        if self.engine_logprobs is None or not self.is_first:
            return measures
        gap = gap_measures(x.logprobs.detach(), x.engine_logprobs)
        return Measures(measures.sums | gap.sums, gap.extremes)


@dataclass
class Packs:
    """Micro-batches that are laid out one by one, as they are asked for: a step of full-attention rows is many times its text."""

    documents: list[list[Document]]
    build: Callable[[list[Document]], Pack]

    def __len__(self) -> int:
        return len(self.documents)

    def __iter__(self) -> Iterator[Pack]:
        return map(self.build, self.documents)


@dataclass
class StepResult:
    """One optimizer step, reduced over ranks."""

    loss: float
    gradient_norm: float
    """Before clipping. Not finite: the step was not taken."""
    learning_rate: float
    means: dict[str, float] = field(default_factory=dict)
    """Means over the step's predictions."""
    extremes: dict[str, float] = field(default_factory=dict)
    num_predictions: int = 0
    num_tokens: int = 0
    """Packed tokens, filler excluded."""
    num_shared_tokens: int = 0
    """Packed tokens that shared prompts have saved."""

    @property
    def is_taken(self) -> bool:
        return math.isfinite(self.gradient_norm)


class Trainer:
    """Owns a wrapped module and its optimizer. The module takes a `Pack` and gives a tuple of outputs, each [M]."""

    def __init__(self, module: nn.Module, model: Pretrained, config: Any, accelerator: Any, peak_rate: float) -> None:
        """module: what is trained (train/policy.py, train/value.py) on the decoder of `model`; peak_rate: the learning rate."""
        self.config, self.accelerator, self.peak_rate = config, accelerator, peak_rate
        self.mask_id, self.logit_shift = model.mask_id, model.family.logit_shift
        self.layout = Layout(model.family.attention, config.training)
        """How responses become documents for this family."""
        all_layers = model.decoder.config.num_layers
        # auto: none, unless the job's start knows of a GPU's memory (train/run.py).
        model.decoder.recomputed_layers = all_layers if config.training.gradient_checkpointing_enable is True else 0
        self.optimizer = build_optimizer(module, config, peak_rate)
        self.gradient_norms = GradientNorms(module, model, config.logging.gradient_norms_every)
        self.module, self.wrapped_optimizer = accelerator.prepare(module, self.optimizer)
        self.num_steps = 0
        """Optimizer steps taken: the version of the weights. One that is left out counts for no warm-up either."""
        self.host_copy = HostCopy(accelerator.device)

    def micro_batches(self, documents: list[Document]) -> Packs:
        """This rank's packs; their number is the same on every rank."""
        budget = self.config.training.max_tokens_per_microbatch
        on_gpu = self.accelerator.device.type == "cuda"
        # A dense mask, as on a CPU, holds all pairs of tokens of a group: there sharing costs more than it saves.
        saves = on_gpu and self.config.training.attention_backend != "dense"
        shares = {"auto": saves, "always": True, "never": False}[self.config.training.shared_prompts]
        own = assign(documents, budget, self.accelerator.num_processes, shares)[self.accelerator.process_index]
        round_to = pack_multiple(self.accelerator.device)
        attended = attended_length(budget)
        return Packs(own, lambda d: build_pack(d, self.mask_id, round_to, self.logit_shift, shares, attended))

    @torch.no_grad()
    def outputs(
        self, documents: list[Document], num_predictions: int, module: nn.Module | None = None, output: int = 0
    ) -> np.ndarray:
        """One output of the module (log-probs, values) for every prediction [num_predictions], known to every rank.

        module: another one (a frozen reference) instead of the trained one; output: its place among the outputs.
        """
        assert not self.is_offloaded
        table = torch.zeros(num_predictions, dtype=torch.float32, device=self.accelerator.device)
        for pack in self.micro_batches(documents):
            pack = pack.to(self.accelerator.device)
            values = (module or self.module)(pack)[output]
            real = pack.prediction >= 0
            table[pack.prediction[real]] = values[real]
        # Every prediction is on exactly one rank: the sum over ranks is the table.
        return self.accelerator.reduce(table, "sum").cpu().numpy()

    def step(self, documents: list[Document], tables: Any, objective: Objective, progress: float) -> StepResult:
        """One optimizer step over `documents` (the whole step's, the same list on every rank).

        tables: `Tables`, or what another kind of module has in its place (train/value.py). progress: share of the run that is done,
        0..1, for the learning rate.
        """
        assert not self.is_offloaded
        rate = learning_rate(self.peak_rate, self.config.lr_scheduler, progress, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        table = OnDevice(tables, self.accelerator.device)
        totals = Totals(self.accelerator.device)
        packs = self.micro_batches(documents)
        for index, pack in enumerate(packs):
            pack = pack.to(self.accelerator.device)
            with dist.accumulate(self.accelerator, self.module, index, len(packs)):
                outputs = self.module(pack)
                x = tables.pick(table.rows_of(pack), outputs)
                output = objective(x, self.config.training)
                dist.backward(self.accelerator, self.module, output.loss)
            with torch.no_grad():
                totals.add(output, tables.diagnose(x, outputs), pack)
        self.gradient_norms.measure(self.accelerator, self.module, self.num_steps + 1)
        norm = dist.optimizer_step(self.accelerator, self.module, self.wrapped_optimizer, self.config.training.max_grad_norm)
        self.num_steps += math.isfinite(norm)
        return totals.reduce(self.accelerator, norm, rate)

    def weights_are_finite(self) -> bool:
        """All ranks together."""
        assert not self.is_offloaded
        return dist.weights_are_finite(self.accelerator, self.module)

    @property
    def is_offloaded(self) -> bool:
        return bool(self.host_copy.moved)

    def offload(self, keeps_weights: bool, new_host_bytes: float = math.inf) -> bool:
        """Take gradients and optimizer states off the GPU until `reload`, and the weights unless they are needed meanwhile.

        False, with nothing moved, where the host would have to give more than `new_host_bytes` for it.
        """
        things, scratch = [self.module, self.optimizer], []
        if dist.uses_deepspeed(self.accelerator):
            things = [self.module.module, self.module.optimizer, self.optimizer]
            # Of gradients on their way to other ranks. Not whole buckets: they name weights, too.
            scratch = [bucket.buffer for bucket in getattr(self.module.optimizer, "ipg_buckets", {}).values()]
        weights = [*things[0].parameters(), *things[0].buffers()]
        stays = [weight.data for weight in weights] if keeps_weights else []  # not what hangs on them
        return self.host_copy.offload(things, stays, scratch, new_host_bytes)

    def reload(self) -> None:
        """Have all back, bit for bit; nothing to do where it is here."""
        self.host_copy.reload()

    def state_dict(self) -> dict[str, Tensor]:
        """The module's whole state dict, on the main process; all ranks together."""
        assert not self.is_offloaded
        if dist.uses_deepspeed(self.accelerator):
            return self.accelerator.get_state_dict(self.module)
        # DDP's module, or the policy itself; accelerate would import DeepSpeed to find out.
        return getattr(self.module, "module", self.module).state_dict()


@dataclass
class Columns:
    """The rows of a pack from tables on the device."""

    values: dict[str, Tensor]
    """Each [M], float32."""
    real: Tensor
    """bool [M]: False for a filler prediction."""

    def get(self, name: str, default: Tensor) -> Tensor:
        return self.values.get(name, default)


class OnDevice:
    """The arrays of a dataclass of tables on the device; those that are None are left out."""

    def __init__(self, tables: Any, device: torch.device) -> None:
        arrays = {name: value for name, value in vars(tables).items() if isinstance(value, np.ndarray) and len(value)}
        self.columns = {name: torch.as_tensor(value, dtype=torch.float32).to(device) for name, value in arrays.items()}

    def rows_of(self, pack: Pack) -> Columns:
        index = pack.prediction.clamp(min=0)
        return Columns({name: column[index] for name, column in self.columns.items()}, pack.prediction >= 0)


class Totals:
    """Sums and extremes over the micro-batches of a step, on the device until the end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.extremes: dict[str, Tensor] = {}

    def add(self, output: ObjectiveOutput, diagnosis: Measures, pack: Pack) -> None:
        """Count a micro-batch. Filler is alone in its pack, so a pack counts whole or not at all."""
        num_tokens = torch.tensor(len(pack.input_ids) - pack.num_filler, device=self.device)
        num_shared = torch.tensor(pack.num_shared, device=self.device)
        sums = {"loss": output.loss, "num_tokens": num_tokens, "num_shared_tokens": num_shared}
        sums["num_predictions"] = (pack.prediction >= 0).sum()
        if pack.num_filler < len(pack.input_ids):
            sums |= output.measures.sums | diagnosis.sums
            for name, value in (output.measures.extremes | diagnosis.extremes).items():
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
        loss = sums.pop("loss")
        num_tokens, num_shared, count = (int(sums.pop(f"num_{name}")) for name in ("tokens", "shared_tokens", "predictions"))
        means = {name: value / max(count, 1) for name, value in sums.items()}
        return StepResult(loss, gradient_norm, learning_rate, means, extremes, count, num_tokens, num_shared)


def merge_results(results: list[StepResult], group: str = "train") -> dict[str, float]:
    """The metrics `group/*` of one RL step from those of its updates: means over updates, extremes over all, sums of counts.

    A name that has a group already keeps it. No results, no metrics. Of updates that were not taken, their gradient not being
    finite, the counts alone.
    """
    metrics: dict[str, float] = {}
    if not results:
        return metrics
    taken = [r for r in results if r.is_taken]
    for name in ("loss", "gradient_norm", "learning_rate") if taken else ():
        metrics[f"{group}/{name}"] = float(np.mean([getattr(r, name) for r in taken]))
    for name in taken[0].means if taken else ():  # the first has them all: some are measured there only
        metrics[name if "/" in name else f"{group}/{name}"] = float(np.mean([r.means[name] for r in taken if name in r.means]))
    for name in taken[0].extremes if taken else ():
        keep = min if name.endswith("_min") else max
        metrics[name if "/" in name else f"{group}/{name}"] = keep(r.extremes[name] for r in taken if name in r.extremes)
    metrics[f"{group}/num_updates"] = float(len(results))
    metrics[f"{group}/num_skipped_updates"] = float(len(results) - len(taken))
    for name in ("num_tokens", "num_shared_tokens", "num_predictions"):
        metrics[f"{group}/{name}"] = float(sum(getattr(r, name) for r in results))
    return metrics

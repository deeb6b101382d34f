"""The processes of a job: what accelerate and DeepSpeed are asked for, and one way to take an optimizer step under all of them.

    for index, micro_batch in enumerate(micro_batches):      # as many on every rank; a rank without data passes a loss of 0 * ...
        with accumulate(accelerator, model, index, len(micro_batches)):
            backward(accelerator, model, loss_sum(model(micro_batch)) / global_number)
    norm = optimizer_step(accelerator, model, optimizer, max_grad_norm)

Between the last backward and the step the gradient is the *sum* over micro-batches and ranks of the gradients of the losses that
were passed in, in one process, under DDP and under ZeRO-1, 2 and 3 alike. Two habits of the libraries stand in the way:

- DDP and DeepSpeed average over ranks: `backward` multiplies the loss by their number.
- Through `accelerator.backward`, accelerate (>= 1.8) steps a DeepSpeed optimizer inside every backward outside
  `accelerator.accumulate`, whose number of micro-batches is fixed, and DeepSpeed divides the loss by its own
  gradient_accumulation_steps. So that stays 1, and here the engine is told which backward is the last and asked for the step.

There is no scheduler: the learning rate is a function of the progress of the run (train/optim.py), set on the optimizer before
every step. accelerate's wrapper of one would advance it once per process.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import itertools
import logging
import math
import os
import time
import uuid
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Iterator, TypeVar

import torch
import torch.distributed
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DeepSpeedPlugin, DistributedType

from common.deepspeed_files import Sharding, sharding_asked_for
from common.errors import UserError
from common.launch import free_port, world_size

if TYPE_CHECKING:
    from configs.schema import Config

T = TypeVar("T")

POLICY, VALUE = "policy", "value"
"""Names of the models that are trained."""
COLLECTIVE_TIMEOUT = datetime.timedelta(hours=4)
"""A rank that has finished its rollouts waits for the one with the longest answers. A dead rank is the launcher's matter."""


# ---------------------------------------------------------------------------------------------------------------- set-up


def weights_dtype(config: Config) -> torch.dtype:
    """The precision of the weights, in trainer and engine alike: `model.dtype`; if auto, `training.mixed_precision` decides."""
    name = config.model.dtype
    if name == "auto":
        name = "bfloat16" if config.training.mixed_precision == "bf16" else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def set_numerics(config: Config, device: torch.device) -> None:
    """Precision of float32 products, and threads."""
    torch.set_float32_matmul_precision("high" if config.training.enable_tf32 and device.type == "cuda" else "highest")
    if device.type == "cpu":
        # Small models gain nothing from a second thread, and lose much where processes share the cores.
        torch.set_num_threads(1)


def make_accelerator(config: Config, trains: bool = True) -> Accelerator:
    """The accelerator of this process: plain, DDP, or DeepSpeed ZeRO-1/2/3; CPU (gloo) or GPU (nccl); launched or alone.

    DeepSpeed is used where `accelerate launch` was told so (its file wins), else where `experiment.deepspeed_file` names a file,
    else, as ZeRO-1, to train bfloat16 weights: without its float32 master copies, updates smaller than 1/256 of a weight are lost.
    A job that does not train (`trains` False) has none. Nothing is ever autocast: the model runs in the precision of its weights,
    as it does while sampling.

    To be prepared with it: one model whose forward does all that is computed with the weights, the head's chunks too (under ZeRO-3
    they are whole only while their module runs), and its optimizer.
    """
    plugin = _deepspeed_plugin(config) if trains else None
    plugins = plugin
    if plugin is not None and config.model.value_base_model is not None:
        plugins = {POLICY: plugin, VALUE: _deepspeed_plugin(config)}  # one for each model that is trained
    on_cpu = not torch.cuda.is_available() or _asked_for_cpu()
    check_engine(config, on_cpu)
    _silence_libraries(on_cpu)
    if plugin is not None:
        _prepare_environment_for_deepspeed(on_cpu)
    else:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # by `accelerate launch`, for a job that does not train
    expected = world_size()
    for name in ("RANK", "WORLD_SIZE"):
        if not os.environ.get(name):  # a job operator's; accelerate wants a number or nothing
            os.environ.pop(name, None)
    # Naming a backend where there is no process group makes accelerate ask for the group's size.
    backend = None if "LOCAL_RANK" not in os.environ else "gloo" if on_cpu else "nccl"
    accelerator = Accelerator(
        mixed_precision="bf16" if plugin is not None and weights_dtype(config) == torch.bfloat16 else "no",
        # DeepSpeed with cpu=True silently becomes DDP; without the backend it takes itself for a single process.
        cpu=on_cpu and plugin is None,
        deepspeed_plugin=plugins,
        kwargs_handlers=[
            InitProcessGroupKwargs(backend=backend, timeout=COLLECTIVE_TIMEOUT),
            _ddp_settings(),
        ],
    )
    assert accelerator.num_processes == expected, f"{accelerator.num_processes} processes joined, {expected} were launched"
    assert (accelerator.distributed_type == DistributedType.DEEPSPEED) == (plugin is not None)
    atexit.register(_leave_process_group)
    return accelerator


def check_engine(config: Config, on_cpu: bool) -> None:
    """Raises UserError where the config asks for an engine of kernels, and there is no GPU for them."""
    if on_cpu and config.rollout.engine == "triton":
        raise UserError("rollout.engine: got triton, which needs a GPU, and there is none: leave it at auto")


def _silence_libraries(on_cpu: bool) -> None:
    """What accelerate and DeepSpeed say to their own developers, some of it at every step and on every rank."""
    replaced = r"`(torch\.distributed\.(all_gather_into|reduce_scatter)_tensor|broadcast_buffers)` is deprecated"
    warnings.filterwarnings("ignore", message=replaced, category=FutureWarning)
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it has found no other


def value_accelerator(accelerator: Accelerator) -> Accelerator:
    """A second accelerator for the value model, of the same kind as the policy's: one prepares one model and its optimizer.

    To be made when the policy has been prepared, for DeepSpeed's settings are switched over to the value model's.
    """
    if uses_deepspeed(accelerator):
        accelerator.state.select_deepspeed_plugin(VALUE)
        return Accelerator()
    on_cpu = accelerator.device.type == "cpu"
    return Accelerator(mixed_precision="no", cpu=on_cpu, kwargs_handlers=[_ddp_settings()])


def _ddp_settings() -> DistributedDataParallelKwargs:
    # The buffers (rotary frequencies) are alike everywhere; gradients as views of the buckets save a copy of them from the last
    # backward to the step. The sum over the micro-batches before it is beside the buckets.
    return DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)


def _leave_process_group() -> None:
    """A gloo rank that just exits is, every other time, aborted by its own threads: exit code 134 after a good run."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def end_together(accelerator: Accelerator) -> None:
    """Behind the last of a job that has ended well, on all ranks: now and then gloo also aborts a rank whose peer has left while it
    was still at work. The process group is left when the process ends, for a caller of `main` may go on to another job with it."""
    barrier(accelerator)


def _asked_for_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")


def _deepspeed_plugin(config: Config) -> DeepSpeedPlugin | None:
    clipping = config.training.max_grad_norm or 0.0
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        # The stage and the offloading come from the environment of `accelerate launch`.
        plugin = DeepSpeedPlugin(gradient_accumulation_steps=1, gradient_clipping=clipping, zero3_save_16bit_model=True)
    elif (asked := sharding_asked_for(config, weights_dtype(config) == torch.bfloat16)).zero_stage:
        plugin = DeepSpeedPlugin(
            zero_stage=asked.zero_stage,
            offload_optimizer_device=asked.offload_optimizer,
            offload_param_device=asked.offload_param,
            gradient_accumulation_steps=1,
            gradient_clipping=clipping,
            zero3_init_flag=False,
            zero3_save_16bit_model=True,  # `accelerator.get_state_dict` needs it under ZeRO-3
        )
    else:
        return None
    plugin.deepspeed_config.update(
        gradient_accumulation_steps=1,
        gradient_clipping=clipping,
        train_micro_batch_size_per_gpu=1,  # accelerate wants a number where it prepares no DataLoader; nothing depends on it
        zero_force_ds_cpu_optimizer=False,  # with offloading: torch's optimizer instead of one that is compiled at first use
        data_types={"grad_accum_dtype": "fp32"},  # else many micro-batches add up in bfloat16
    )
    # ZeRO-1 rounds the sum to what it sends; ZeRO-2 and 3 send each micro-batch's gradient, which is what the weights are.
    sends_nothing = world_size() == 1 and plugin.zero_stage == 1
    if config.training.reduce_in_float32 or sends_nothing:
        plugin.deepspeed_config["communication_data_type"] = "fp32"
    return plugin


def _prepare_environment_for_deepspeed(on_cpu: bool) -> None:
    if on_cpu:
        if torch.cuda.is_available():
            raise UserError("ACCELERATE_USE_CPU is set, but DeepSpeed takes the GPU it finds: set CUDA_VISIBLE_DEVICES= instead")
        os.environ.pop("ACCELERATE_USE_CPU", None)
        import deepspeed.ops

        # Shared-memory collectives, an operator that takes a minute to compile. Must be known before the process group starts.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Alone, without a launcher (or accelerate's, of one process): a group of one. RANK may be a job operator's.
    if "LOCAL_RANK" not in os.environ and world_size() == 1:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


# ---------------------------------------------------------------------------------------------------- one optimizer step


def uses_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def sharding(accelerator: Accelerator) -> Sharding:
    """What DeepSpeed really does, whoever asked for it: the config, or the file of `accelerate launch`."""
    if not uses_deepspeed(accelerator):
        return Sharding(0, "none", "none")
    plugin = accelerator.state.deepspeed_plugin
    return Sharding(int(plugin.zero_stage), plugin.offload_optimizer_device or "none", plugin.offload_param_device or "none")


def shards_weights(accelerator: Accelerator) -> bool:
    """Whether no rank holds the whole weights of a prepared model (ZeRO-3)."""
    return sharding(accelerator).zero_stage == 3


@contextmanager
def accumulate(accelerator: Accelerator, model: torch.nn.Module, index: int, count: int) -> Iterator[None]:
    """Around forward and backward of micro-batch `index` (from 0) of the `count` of one optimizer step.

    `count` may change from step to step but is the same on every rank: ranks meet in the last backward (ZeRO-2, 3: in each).
    """
    assert 0 <= index < count, f"micro-batch {index} of {count}"
    last = index == count - 1
    accelerator.gradient_state._set_sync_gradients(last)  # what a prepared plain optimizer asks before it steps
    if uses_deepspeed(accelerator):
        model.set_gradient_accumulation_boundary(last)
        yield
    else:
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            yield


def backward(accelerator: Accelerator, model: torch.nn.Module, loss: torch.Tensor) -> None:
    """Add the gradient of `loss` (a scalar, this rank's part of the sum over the optimizer step) to that of the step."""
    loss = loss * accelerator.num_processes  # the average over ranks becomes a sum
    if uses_deepspeed(accelerator):
        model.backward(loss)
    else:
        accelerator.backward(loss)


def full_gradients(accelerator: Accelerator, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor | None]]:
    """(name in the bare model, whole gradient), between the last backward and the step; all ranks together.

    One parameter at a time is gathered under ZeRO: use it up before asking for the next. None: no gradient reached it.
    """
    bare = getattr(model, "module", model)  # what DDP or DeepSpeed wraps; accelerate would import DeepSpeed to find out
    for name, parameter in bare.named_parameters():
        if not parameter.requires_grad:
            continue
        if uses_deepspeed(accelerator):
            from deepspeed.utils import safe_get_full_grad

            yield name, safe_get_full_grad(parameter)
        else:
            yield name, parameter.grad


def optimizer_step(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any, max_grad_norm: float | None) -> float:
    """Clip, step, and forget the gradients; returns the norm of the whole summed gradient before clipping.

    Where the norm is not finite the step is not taken: the weights and the optimizer's states stay as they are, in every mode, for
    every rank has the same norm. Called once, after the last backward. `max_grad_norm` None or 0: no clipping. Under DeepSpeed it
    must be `training.max_grad_norm`, which its engine was built with.
    """
    if uses_deepspeed(accelerator):
        assert model.gradient_clipping() == (max_grad_norm or 0.0), "DeepSpeed's engine was built with another max_grad_norm"
        assert model.is_gradient_accumulation_boundary(), "the last backward of the step was not run inside accumulate"
        model.step()
        norm = model.get_global_grad_norm() if model.was_step_applied() else math.inf
        if not model.was_step_applied() and sharding(accelerator).zero_stage < 3:
            # DeepSpeed forgets them too, but not where the optimizer is offloaded: all later gradients would be added to these.
            gradients = getattr(model.optimizer, "averaged_gradients", {})  # not of its optimizer of bfloat16 weights, ZeRO-1
            gradients.update(dict.fromkeys(gradients))
        assert math.isfinite(norm) == model.was_step_applied(), f"DeepSpeed took a step with a gradient of norm {norm}"
    else:
        assert accelerator.sync_gradients, "the last backward of the step was not run inside accumulate"
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf"))
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(norm)


def weights_are_finite(accelerator: Accelerator, model: torch.nn.Module) -> bool:
    """Whether no trained weight of a prepared model is NaN or infinite, on any rank; all ranks together."""
    extremes = [torch.zeros(1)]
    for parameter in model.parameters():
        own = parameter.detach()
        if hasattr(parameter, "ds_tensor"):  # ZeRO-3: this rank's piece, without what fills up the last one
            piece = parameter.ds_tensor.detach()
            own = piece[: max(0, parameter.ds_numel - torch.distributed.get_rank(parameter.ds_process_group) * piece.numel())]
        if parameter.requires_grad and own.numel():
            extremes.append(torch.stack(own.aminmax()).float())  # NaN, if one is there
    return all(gather_objects(accelerator, bool(torch.cat([e.to(accelerator.device) for e in extremes]).isfinite().all())))


# ------------------------------------------------------------------------------------------------------ between the ranks


def barrier(accelerator: Accelerator) -> None:
    """Go on when every rank has come here."""
    if accelerator.num_processes > 1:
        torch.distributed.barrier(group=_host_group())


def gather_objects(accelerator: Accelerator, item: T) -> list[T]:
    """Every rank's `item`, in rank order, on every rank. They are pickled and travel through host memory."""
    items: list[T] = [item] * accelerator.num_processes
    if accelerator.num_processes > 1:
        torch.distributed.all_gather_object(items, item, group=_host_group())
    return items


def broadcast_object(accelerator: Accelerator, item: T | None = None) -> T:
    """Rank 0's `item`, on every rank."""
    items = [item]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(items, src=0, group=_host_group())
    return items[0]


class SharedCounter:
    """Counts 0, 1, 2, ... over all ranks: each number goes to exactly one of them, whoever asks first. It lives in the key-value
    store of the process group (the launcher's, which all machines reach), so asking waits for no other rank."""

    def __init__(self, accelerator: Accelerator) -> None:
        """All ranks together: rank 0 names it, so that no two of them are ever mixed up."""
        self._is_main, self._alone = accelerator.is_main_process, itertools.count()
        self._name = broadcast_object(accelerator, f"unmask/counter/{uuid.uuid4().hex}")
        self._store = torch.distributed.distributed_c10d._get_default_store() if accelerator.num_processes > 1 else None

    def next(self) -> int:
        return next(self._alone) if self._store is None else self._store.add(self._name, 1) - 1

    def close(self) -> None:
        """Take it out of the store, when no rank will ask again."""
        if self._store is not None and self._is_main:
            self._store.delete_key(self._name)


@contextmanager
def main_first(accelerator: Accelerator) -> Iterator[None]:
    """The first rank of every machine runs the body first (it downloads, generates, caches), the others once those are through,
    also if they failed."""
    if not accelerator.is_local_main_process:
        barrier(accelerator)
    try:
        yield
    finally:
        if accelerator.is_local_main_process:
            barrier(accelerator)


class Stopwatch:
    """Seconds spent per phase, of the device too: a GPU's queue is waited for at both ends. A phase within a phase is
    counted once, as itself, so that all together are the time that has gone by.

    >>> watch = Stopwatch(accelerator)
    >>> with watch("rollout"): ...
    >>> watch.seconds["rollout"]
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start, counted = self._now(), sum(self.seconds.values())
        try:
            yield
        finally:
            within = sum(self.seconds.values()) - counted
            self.seconds[phase] = self.seconds.get(phase, 0.0) + self._now() - start - within

    def slowest(self) -> dict[str, float]:
        """Of every phase the most that any rank took, on every rank; all ranks together."""
        slowest: dict[str, float] = {}
        for seconds in gather_objects(self.accelerator, self.seconds):
            for phase, value in seconds.items():
                slowest[phase] = max(value, slowest.get(phase, 0.0))
        return slowest

    def _now(self) -> float:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)
        return time.perf_counter()


_host_groups: dict[Any, Any] = {}  # default group -> the gloo group beside it


def _host_group() -> Any:
    """Ranks talk to each other through host memory: over nccl, gathering pickled rollouts would take gigabytes of the GPU's."""
    default = torch.distributed.group.WORLD
    if torch.distributed.get_backend() == "gloo":
        return default
    if default not in _host_groups:
        _host_groups[default] = torch.distributed.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    return _host_groups[default]

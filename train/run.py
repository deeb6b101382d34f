"""What every training run is made of, whatever it trains on: processes, run directory, model, trainer, metrics, resume."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
from accelerate.utils import set_seed

from common import dist
from common.errors import UserError, warn
from common.files import link_directory
from common.metrics import MetricsLog
from common.report import write_report
from common.run_dir import STATE_FILE, RunDir
from common.state import load_state, save_state
from models.checkpoint import Pretrained, check_tokenizer, find_directory, load_pretrained, save_pretrained
from models.family import TINY_RANDOM
from models.kernels.launch import set_fused
from models.lora import merge, merged_folder, prepare_for_training
from train.loop import Trainer
from train.memory_engine import engine_wants
from train.memory_estimate import check_fits, choice, read_shape, setup_of
from train.memory_estimate import table as memory_table
from train.memory_setup import Setup
from train.offload import RolloutOffload
from train.policy import policy_trainer
from train.shared_value import SharedValueUpdate
from train.value import ValueUpdate

REPORT_EVERY_SECONDS = 20.0


def gpu_memory(accelerator: Any) -> int | None:
    """Bytes of the smallest GPU of the job: every rank has to draw the same conclusions. None on CPUs. All ranks together."""
    if accelerator.device.type != "cuda":
        return None
    return min(dist.gather_objects(accelerator, torch.cuda.get_device_properties(accelerator.device).total_memory))


class Run:
    """One run directory and what works in it. RL (rl.py) and SFT (train/sft.py) each hold one."""

    def __init__(
        self,
        config: Any,
        total_steps: int,
        temperature: float,
        check: Callable[[Pretrained], None] = lambda model: None,
        samples: bool = False,
    ) -> None:
        """total_steps: of the run; temperature: that the trained tokens were sampled under; samples: whether an engine samples
        them beside the training (RL).

        check: what the job asks of its model, called before the weights are read. The run directory is locked from here to
        `close`; until `resume` nothing else is written.
        """
        self.config, self.total_steps = config, total_steps
        self.accelerator = dist.make_accelerator(config)
        self.is_main = self.accelerator.is_main_process
        dist.set_numerics(config, self.accelerator.device)
        set_fused(config.training.fused_kernels)
        if config.training.attention_backend == "flex" and self.accelerator.device.type != "cuda":
            raise UserError("training.attention_backend: got flex, which needs a GPU, and there is none: leave it at auto")
        set_seed(config.training.seed)  # of ours LoRA's dropout alone draws from the global generators, but a plugin may
        self.directory = RunDir(config.experiment.project)
        with dist.main_first(self.accelerator):
            if self.is_main:
                self.directory.take(config)
        critic = config.model.value_base_model
        if critic is not None and critic != TINY_RANDOM:  # known before the policy is read and prepared
            with dist.main_first(self.accelerator):
                find_directory(critic, "model.value_base_model")

        self.gpu_bytes = gpu_memory(self.accelerator)
        self.setup: Setup | None = None
        """What the job was estimated by, where a GPU's memory is known."""

        def check_all(model: Pretrained) -> None:
            check(model)
            if self.gpu_bytes is not None:
                self.check_memory(model, samples)

        self.watch = dist.Stopwatch(self.accelerator)
        self.offload = RolloutOffload(self.watch, self.accelerator.device)
        """What leaves the GPU while an engine samples."""
        self.model = self.load_model(check_all)
        prepare_for_training(self.model, config.training.lora, config.model.pretrained_model, config.training.seed)
        self.trainer = policy_trainer(self.model, config, self.accelerator, temperature)
        self.trained: dict[str, tuple[Pretrained, Trainer]] = {dist.POLICY: (self.model, self.trainer)}
        """What has an optimizer of its own, by name."""
        self.value: ValueUpdate | SharedValueUpdate | None = None
        if config.model.value_shared:
            self.value = SharedValueUpdate(self.trainer, config)
        elif config.model.value_base_model is not None:
            self.value = ValueUpdate(config, dist.value_accelerator(self.accelerator))
            self.trained[dist.VALUE] = self.value.model, self.value.trainer
            self.offload.add(self.value.trainer, config.model.value_offload, keeps_weights=False)
        # Under ZeRO-3 the engine has weights of its own.
        keeps_weights = not dist.shards_weights(self.accelerator)
        self.offload.add(self.trainer, config.training.offload_optimizer, keeps_weights)
        for model, _ in self.trained.values():
            if config.model.block_size is not None:  # what the checkpoints will say
                model.config = {**model.config, "block_size": config.model.block_size}
            if self.setup is not None and config.training.gradient_checkpointing_enable == "auto":
                model.decoder.recomputed_layers = self.setup.recomputed_of(model.decoder.config.num_layers)
        self.metrics: MetricsLog | None = None
        self.step = 0
        """The last finished step."""
        self._report_at = time.monotonic()

    def check_memory(self, model: Pretrained, samples: bool) -> None:
        """Say what the job will take of the GPUs' memory, and what of its activations is recomputed where that is chosen by memory.
        Raises UserError where it cannot fit, unless the config says to try."""
        config, critic = self.config, self.config.model.value_base_model
        value = model.decoder.config if critic == TINY_RANDOM else None
        if critic is not None and value is None:
            value = read_shape(str(find_directory(critic, "model.value_base_model")), model.family)
        job, gpus = "rl" if samples else "sft", self.accelerator.num_processes
        sharding = dist.sharding(self.accelerator)
        self.setup = setup_of(config, job, model.family, model.decoder.config, gpus, self.gpu_bytes, value, sharding)
        self.offload.wanted_bytes = engine_wants(self.setup)
        if self.is_main:
            print(memory_table(self.setup, self.gpu_bytes), flush=True)
            if config.training.gradient_checkpointing_enable == "auto":
                print(choice(self.setup, self.gpu_bytes), flush=True)
        if config.experiment.check_memory:
            check_fits(self.setup, self.gpu_bytes)

    def load_model(self, check: Callable[[Pretrained], None] = lambda model: None) -> Pretrained:
        """The model the run starts from."""
        config = self.config

        def check_all(model: Pretrained) -> None:
            check_tokenizer(model)
            check(model)

        with dist.main_first(self.accelerator):  # the first downloads, the others find it in the cache
            return load_pretrained(
                config.model.pretrained_model,
                config.model.model_base,
                dist.weights_dtype(config),
                self.accelerator.device,
                seed=config.training.seed,
                check=check_all,
            )

    def load_reference(self) -> Pretrained:
        """The frozen reference of a KL term: what the policy starts from. Its adapter is merged where the policy's was, for
        merged weights are rounded to their precision."""
        reference = self.load_model()
        if reference.adapter is not None and self.model.adapter is None:
            merge(reference)
        return reference

    # -- resume

    def resume(self, restore: Callable[[dict[str, Any]], None] = lambda extra: None) -> None:
        """Go on from the newest state, if there is one, and write from now on.

        restore: called with what `save_state` was given; where it raises, the run directory is as it was.
        """
        # Only machine 0 has the run directory.
        there = None
        if self.is_main:
            there = (self.directory.latest_state(), self.directory.read_state(), bool(self.directory.differences(self.config)))
        folder, saved, is_another = dist.broadcast_object(self.accelerator, there)
        if saved is not None:
            self.step, self.trainer.num_steps = saved["step"], saved["num_optimizer_steps"]
            restore(saved["extra"])
            self.check_step(is_another)
            load_state(self.accelerator, folder)
            if self.value is not None:
                self.value.load_state(folder)
            if self.is_main and self.step < self.total_steps:
                print(f"going on with {self.directory.path} behind step {self.step}", flush=True)
        started_at = self.config.experiment.current_epoch
        if started_at > 1 and started_at != self.step + 1:
            warn(f"experiment.current_epoch is {started_at}, the run's state says {self.step + 1}: the state is followed")
        with dist.main_first(self.accelerator):
            if self.is_main:
                self.directory.create(self.config)
        self.metrics = MetricsLog(self.directory.path, self.config, self.is_main)
        self.metrics.truncate_after(self.step)

    def check_step(self, is_another: bool) -> None:
        """Raises UserError where nothing is left to do of a run that was not of this very config (is_another): it would be called
        finished by settings that have done nothing."""
        if self.step > self.total_steps or (is_another and self.step == self.total_steps):
            raise UserError(
                f"experiment.project: {self.directory.path}: the run is at step {self.step} already, and with these settings it "
                f"ends with step {self.total_steps}: ask for more steps (experiment.total_step; finetuning: training.max_steps or "
                "num_train_epochs, and a higher stop_at_solve_rate where it was reached), or choose another project"
            )

    def save_state(self, extra: dict[str, Any]) -> None:
        """Write what resuming needs. `extra`: JSON, what the caller needs besides weights, optimizer and counters."""
        self.offload.reload()
        self.check_weights()
        saved = {
            "step": self.step,
            "finished": self.step == self.total_steps,
            "num_optimizer_steps": self.trainer.num_steps,
            "num_processes": self.accelerator.num_processes,
            "extra": extra,
        }

        def write(folder: Path) -> None:
            save_state(self.accelerator, folder)
            if self.value is not None:
                self.value.save_state(folder)
            if self.is_main:
                (folder / STATE_FILE).write_text(json.dumps(saved), encoding="utf-8")

        self.directory.write_state(self.step, write, self.is_main, lambda: dist.barrier(self.accelerator))

    def check_weights(self) -> None:
        """Raises UserError where a trained weight is not finite: what is good is not replaced. All ranks together."""
        broken = [name for name, (_, trainer) in self.trained.items() if not trainer.weights_are_finite()]
        if broken:
            folder = dist.broadcast_object(self.accelerator, self.directory.latest_state() if self.is_main else None)
            good = f"the last good state is {folder}" if folder is not None else "there is no state yet"
            raise UserError(
                f"step {self.step}: weights of the {' and the '.join(broken)} model are NaN or infinite, so nothing was written, "
                f"and {good}: lower optimizer.params.learning_rate or training.max_grad_norm, and go on from there with "
                "experiment.start_from_scratch=false"
            )

    # -- checkpoints

    def save_checkpoint(self, *names: str) -> None:
        """Write the weights in Hugging Face format as ckpt/NAME, for every name: once, further names link to them."""
        self.offload.reload()
        self.check_weights()
        state = self.trainer.state_dict()
        if self.is_main:
            prefix = "decoder."
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
            written, *others = [self.directory.checkpoints / name for name in names]
            save_pretrained(self.model, state, written)
            for folder in others:
                link_directory(written, folder)
                if self.model.adapter is not None and self.model.adapter.save_merged:
                    link_directory(merged_folder(written), merged_folder(folder))
        if self.value is not None:
            self.value.save_checkpoint(self.directory.checkpoints / self.config.model.optimized_value_name)
        dist.barrier(self.accelerator)

    # -- a step

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a phase of the step."""
        with self.watch(name):
            yield

    def finish_step(self, metrics: dict[str, float], extra: dict[str, Any]) -> None:
        """Count the step, log it, and keep what has to be kept. The state comes last: a kill before it loses nothing.

        time/save_seconds: the step's checkpoint, and the state that was written behind the step before (its own is still to come).
        """
        experiment = self.config.experiment
        self.step += 1
        for group, what in (("train", "the model"), ("value", "the value model")):
            skipped, number = (int(metrics.get(f"{group}/num_{name}", 0)) for name in ("skipped_updates", "updates"))
            if skipped and self.is_main:
                warn(f"step {self.step}: {skipped} of {number} updates of {what} not made: the gradient was NaN or infinite")
        is_last = self.step == self.total_steps
        if self.step % experiment.save_every == 0 or is_last:
            with self.phase("save"):
                self.save_checkpoint(self.config.model.optimized_name, f"step-{self.step}")
        metrics = {**metrics, **self.device_metrics()}
        self.write_gradient_norms()
        self.metrics.write(self.step, metrics)
        self.metrics.line(self.step, self.total_steps, metrics)
        if self.is_main and (is_last or time.monotonic() - self._report_at > REPORT_EVERY_SECONDS):
            write_report(self.directory.path)
            self._report_at = time.monotonic()
        if self.step % experiment.save_state_every == 0 or is_last:
            with self.phase("save"):
                self.save_state(extra)

    def write_gradient_norms(self) -> None:
        """Of the updates since the last step, where they were measured (`logging.gradient_norms_every`)."""
        for name, (_, trainer) in self.trained.items():
            for row in trainer.gradient_norms.take():
                self.metrics.write_gradient_norms(self.step, name, **row)

    def device_metrics(self) -> dict[str, float]:
        """Seconds of every phase of the step (the slowest rank's) and the peak memory since the last call."""
        metrics = {f"time/{name}_seconds": seconds for name, seconds in self.watch.slowest().items()}
        self.watch.seconds.clear()
        metrics |= self.offload.take_metrics()
        if self.accelerator.device.type == "cuda":
            metrics["memory/recomputed_layers"] = float(self.model.decoder.recomputed_layers)
            metrics["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
        return metrics

    def say_goodbye(self) -> None:
        if self.is_main:
            print(self.directory.goodbye(self.config), flush=True)

    def close(self) -> None:
        if self.metrics is not None:
            self.metrics.close()
        self.directory.lock.release()

    def end_together(self) -> None:
        """Behind all else, where the job has ended well."""
        dist.end_together(self.accelerator)

"""What the ranks of test_training run: updates and whole RL runs, under one mode of parallelism after another."""

from __future__ import annotations

import os
from typing import Any

import torch

from common import dist
from common.records import ScoredRollout
from models.checkpoint import load_pretrained
from tests.train.steps import forget_accelerator, kept_gradients, requests_of_every_remainder, rl_config, sample, tiny_model
from train.documents import number
from train.engine_weights import EngineWeights
from train.packing import Pack
from train.policy import policy_trainer
from train.rl import PolicyUpdate


def updates(modes: dict[str, tuple[list[str], list[list[ScoredRollout]], str]]) -> dict[str, dict[str, Any]]:
    """One RL update for every list of rollouts, under every mode: overrides of the config, the rollouts, and their family."""
    return {name: updates_of(*arguments) for name, arguments in modes.items()}


def updates_of(overrides: list[str], steps: list[list[ScoredRollout]], family: str = "sdar") -> dict[str, Any]:
    forget_accelerator()
    config = rl_config(*overrides, family=family)
    accelerator = dist.make_accelerator(config)
    model = tiny_model(7, family)
    update = PolicyUpdate(policy_trainer(model, config, accelerator, 1.0), config, model.fill_id)
    engine_weights = EngineWeights(accelerator, model)
    stepped = []  # DeepSpeed calls the optimizer once for each group of parameters, with the others empty; torch once for all
    update.trainer.optimizer.register_step_post_hook(lambda o, *_: stepped.extend(g for g in o.param_groups if g["params"]))
    num_groups = len(update.trainer.optimizer.param_groups)
    record: dict[str, Any] = {"pack_sizes": [], "logprobs": [], "metrics": [], "weights": [], "num_steps": []}
    with kept_gradients() as record["gradients"]:
        for step, rollouts in enumerate(steps, start=1):
            documents = update.documents(rollouts, step)
            record["pack_sizes"].append([num_real(pack) for pack in update.trainer.micro_batches(documents)])
            record["logprobs"].append(torch.from_numpy(update.trainer.outputs(documents, len(number(documents)))))
            record["metrics"].append(update(rollouts, step))
            record["num_steps"].append(len(stepped) / num_groups)
            engine_weights.refresh(update.trainer.num_steps)
            record["weights"].append({n: p.detach().clone() for n, p in engine_weights.decoder.named_parameters()})
    # Every rank samples other prompts, so it runs another number of forwards; and training goes on behind it.
    model.decoder, whole = engine_weights.decoder, model.decoder
    requests = requests_of_every_remainder(4, seed=3)[accelerator.process_index :]
    record["sampled"] = {r.task_id: r for r in sample(model, requests, block_size=4, max_tokens=6)}
    model.decoder = whole
    record["sharded"] = engine_weights.sharded
    return record


def num_real(pack: Pack) -> int:
    """Predictions that count."""
    return int((pack.prediction >= 0).sum())


def rl_runs(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Whole RL runs: by name the command line, and optionally the step behind which the run is broken off and started again."""
    return {name: rl_run(**arguments) for name, arguments in runs.items()}


def rl_run(argv: list[str], broken_off_after: int | None = None) -> dict[str, Any]:
    """The engine's weights at the end, beside what the checkpoint holds."""
    import rl

    os.environ.pop("UNMASK_ERROR_FILE", None)  # breaking off is no failure of this rank
    kept: dict[str, Any] = {}

    class BrokenOff(Exception):
        pass

    class Watched(rl.RLRun):
        def finish(self) -> None:
            super().finish()
            if self.run.step == broken_off_after and not kept:
                kept["broken off"] = True
                raise BrokenOff

        def close(self) -> None:
            self.engine_weights.refresh(self.run.trainer.num_steps)
            kept["weights"] = {n: p.detach().clone() for n, p in self.engine_weights.decoder.named_parameters()}
            kept["num_steps"], kept["num_processes"] = self.run.trainer.num_steps, self.run.accelerator.num_processes
            checkpoint = self.run.directory.checkpoints / "optimized"
            if checkpoint.exists():
                loaded = load_pretrained(str(checkpoint), self.config.model.model_base, torch.float32)
                kept["checkpoint"] = {n: p.detach() for n, p in loaded.decoder.named_parameters()}
            super().close()

    original, rl.RLRun = rl.RLRun, Watched
    try:
        if broken_off_after is not None:
            forget_accelerator()
            try:
                rl.main(argv)
            except BrokenOff:
                pass
        forget_accelerator()
        rl.main(argv)
    finally:
        rl.RLRun = original
    return kept

"""Reinforcement learning of a diffusion language model: sample, score, update, evaluate, again.

    python rl.py config=configs/rl_trado.yaml [section.key=value ...] [--print-config] [--help]

Starts one process per GPU by itself. Killed at any instant and started again with the same command, it goes on: a finished
phase is not done again, one that was cut short begins anew, and on CPU the run ends where the unbroken one ends, bit for bit.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from common.errors import entry_point, warn
from common.launch import launch_if_needed
from common.records import Rollout, ScoredRollout, Task, read_rollouts, write_jsonl


@entry_point
def main(argv: list[str] | None = None) -> None:
    from configs.load import load_config

    config = load_config("rl", sys.argv[1:] if argv is None else argv)
    launch_if_needed(config)
    rl = RLRun(config)
    try:
        for step in range(rl.run.step + 1, config.experiment.total_step + 1):
            rollouts = rl.collect(step)
            rl.update(rollouts, step)
            rl.evaluate(step)
            rl.finish()
        rl.say_goodbye()
    finally:
        rl.close()


class RLRun:
    """The stages of an RL step, wired together. Torch is imported here, behind the checks of the config."""

    def __init__(self, config: Any) -> None:
        from data.tasks import TaskCursor, load_tasks
        from eval import Evaluator, prompt_builder
        from reward.scoring import Scorer
        from sample.engine import build_engine
        from sample.rollout import check_block_size, sampling_settings
        from train.rl import PolicyUpdate
        from train.run import Run

        self.config = config
        tasks = load_tasks(config.dataset.train_dataset, config.dataset.data_type)  # before the model: mistakes show at once
        self.run = Run(config, config.experiment.total_step, config.rollout.temperature)
        model = self.run.model
        check_block_size(model, config.rollout.block_size, "rollout.block_size")
        self.engine = build_engine(model.decoder, model.family, max_active=config.rollout.max_active)
        self.settings = sampling_settings(config.rollout, model, config.training.seed)
        self.prompts = prompt_builder(config, config.rollout, model)
        self.scorer = Scorer(config, tasks, model.tokenizer)
        self.cursor = TaskCursor(tasks, config.training.seed)
        reference = self.run.load_model() if config.training.kl_to == "reference" and config.training.beta else None
        self.policy_update = PolicyUpdate(self.run.trainer, config, config.training.block_size, reference)
        self.evaluator = None
        if config.evaluation.if_eval and config.dataset.eval_dataset:
            self.evaluator = Evaluator(config, model, self.engine, self.run.accelerator)
        self.step_metrics: dict[str, float] = {}
        extra = self.run.resume()
        if extra:
            self.cursor.restore(extra["cursor"])

    # -- rollout and reward

    def collect(self, step: int) -> list[ScoredRollout]:
        """The scored rollouts of a step, the same list on every rank; read from the run directory where they are finished."""
        from common import dist
        from common.metrics import rollout_metrics

        file = self.run.directory.rollout_file(step)
        notes = file.with_suffix(".json")  # where the cursor stood behind this step
        if dist.broadcast_object(file.is_file() and notes.is_file()):
            scored, cursor = dist.broadcast_object((read_rollouts(file), json.loads(notes.read_text())) if self.run.is_main else None)
            self.cursor.restore(cursor)
        else:
            scored = self.sample_and_score(step)
            if self.run.is_main:
                notes.parent.mkdir(exist_ok=True)
                write_jsonl(notes, [self.cursor.state()])
                write_jsonl(file, scored)
                for leftover in self.run.directory.rollouts.glob(f"step_{step:06d}.round_*.jsonl"):
                    leftover.unlink()
        self.step_metrics = rollout_metrics(scored)
        return scored

    def sample_and_score(self, step: int) -> list[ScoredRollout]:
        """Rounds of sampling and scoring: one, or with `rollout.resample` until enough groups are kept."""
        rollout, scored = self.config.rollout, []
        missing = rollout.num_task_per_step
        for round_ in range(1 + (rollout.resample_max_rounds if rollout.resample else 0)):
            tasks = self.cursor.take(missing)
            with self.run.phase("rollout"):
                rollouts = self.sample(tasks, step, round_)
            with self.run.phase("reward"):
                scored += self.score(rollouts, tasks)
            kept = {r.task_id for r in scored if r.dropped is None}
            missing = rollout.num_task_per_step - len(kept)
            if missing <= 0:
                break
        return scored

    def sample(self, tasks: list[Task], step: int, round_: int) -> list[Rollout]:
        """One round of responses; a finished one is read back."""
        from common import dist
        from sample.rollout import sample_on_all_ranks

        file = self.run.directory.round_file(step, round_)
        requests = self.prompts(tasks, self.config.rollout.num_response_per_task)
        if dist.broadcast_object(file.is_file()):
            return dist.broadcast_object(read_rollouts(file, scored=False) if self.run.is_main else None)
        # A task comes again in later epochs: its noise must be new, so the step is part of the seed.
        settings = self.settings.with_seed(self.config.training.seed, step)
        rollouts = sample_on_all_ranks(
            self.engine, requests, settings, self.run.accelerator, self.run.trainer.num_steps, f"step {step}: rollout"
        )
        if self.run.is_main:
            write_jsonl(file, rollouts)
        return rollouts

    def score(self, rollouts: list[Rollout], tasks: list[Task]) -> list[ScoredRollout]:
        """Every rank scores the tasks that it sampled; tasks whose prompt was too long appear as dropped."""
        from common import dist

        rank, num_ranks = dist.rank(), dist.world_size()
        own_tasks = {task.id for task in tasks[rank::num_ranks]}
        scored = dist.gather_objects(self.scorer.score([r for r in rollouts if r.task_id in own_tasks]))
        place = {task.id: index for index, task in enumerate(tasks)}
        scored.sort(key=lambda r: (place[r.task_id], r.sample))
        return scored + self.prompts.take_dropped()

    # -- update, evaluation

    def update(self, scored: list[ScoredRollout], step: int) -> None:
        trained = [r for r in scored if r.dropped is None]
        with self.run.phase("update"):
            metrics = self.policy_update(trained, step) if trained else {}
        if not metrics:
            warn(f"step {step}: every response was dropped (all right, all wrong or too long): no update")
        self.step_metrics |= {"train/skipped": float(not metrics), **metrics}

    def evaluate(self, step: int) -> None:
        if self.evaluator is None or (step % self.config.experiment.eval_every and step != self.run.total_steps):
            return
        with self.run.phase("evaluation"):
            results = self.evaluator(self.run.trainer.num_steps)
        for result in results:
            self.step_metrics |= result.metrics()
        if self.run.is_main:
            self.evaluator.save(results, self.run.directory.results, f"step-{step}")

    def finish(self) -> None:
        sampled_tokens = self.step_metrics.get("rollout/num_tokens", 0.0)
        seconds = self.run.watch.seconds
        if seconds.get("rollout"):
            self.step_metrics["rate/rollout_tokens_per_second"] = sampled_tokens / seconds["rollout"]
        if seconds.get("update"):
            self.step_metrics["rate/update_tokens_per_second"] = self.step_metrics.get("train/num_tokens", 0.0) / seconds["update"]
        self.run.finish_step(self.step_metrics, {"cursor": self.cursor.state()})

    def say_goodbye(self) -> None:
        if self.run.is_main:
            folder = self.run.directory
            print(f"finished: weights in {folder.checkpoints / self.config.model.optimized_name}, curves in {folder.path / 'report.html'}")

    def close(self) -> None:
        self.scorer.close()
        if self.evaluator is not None:
            self.evaluator.close()
        self.run.close()


if __name__ == "__main__":
    main()

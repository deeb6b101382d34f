"""Reinforcement learning of a diffusion language model: sample, score, update, evaluate, again.

    python rl.py config=configs/rl_trado.yaml [section.key=value ...] [--print-config] [--help]

Starts one process per GPU by itself. Killed at any instant and started again with the same command, it goes on: a finished
phase is not done again, one that was cut short begins anew, and on CPU the run ends where the unbroken one ends, bit for bit.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Callable

from common.errors import UserError, entry_point, warn
from common.launch import already_launched, launch, needs_launch, writes_the_run
from common.nodes_link import Link
from common.records import Rollout, ScoredRollout, Task, read_rollouts, write_jsonl
from common.run_dir import is_over
from models.names import check_models


@entry_point
def main(argv: list[str] | None = None, link: Link | None = None) -> None:
    """link: to the launchers of the other machines (multinode_rl.py)."""
    from configs.load import load_config

    argv = sys.argv[1:] if argv is None else argv
    config = load_config("rl", argv)
    if writes_the_run(link) and is_over(config):
        return
    tasks, eval_tasks = load_data(config)
    if writes_the_run(link):
        make_missing_model(config)
    if link is None:  # else the machines are asked for their models together, common/nodes_check.py
        check_models("rl", config)
    if needs_launch(config, link):
        launch("rl", config, sys.argv[0], argv, link)
    rl = RLRun(config, tasks, eval_tasks)
    try:
        for step in range(rl.run.step + 1, config.experiment.total_step + 1):
            rollouts = rl.collect(step)
            rl.update(rollouts, step)
            rl.evaluate(step)
            rl.finish()
        rl.run.say_goodbye()
    finally:
        rl.close()
    rl.run.end_together()


def load_data(config: Any) -> tuple[list[Task], list[Task] | None]:
    """The tasks to learn from, and those to evaluate on: before anything long, so that mistakes in them show at once."""
    from data.tasks import load_tasks
    from reward.registry import check_function

    check_function(config.reward)
    scoring = config.dataset.data_type, config.reward.function
    tasks = load_tasks(config.dataset.train_dataset, *scoring)
    if config.rollout.num_task_per_step > len(tasks):
        raise UserError(
            f"rollout.num_task_per_step: got {config.rollout.num_task_per_step}, but dataset.train_dataset, "
            f"{config.dataset.train_dataset}, has {len(tasks)} tasks, and no step takes one twice: ask for fewer"
        )
    evaluates = config.evaluation.if_eval and config.dataset.eval_dataset
    return tasks, load_tasks(config.dataset.eval_dataset, *scoring) if evaluates else None


def make_missing_model(config: Any) -> None:
    """Run the finetuning job `model.prepare_config` where the model that this job starts from, and that one makes, is not there, or
    is half-finetuned: that job keeps checkpoints on its way, so where it was interrupted it goes on."""
    from configs.prepare import FINETUNING, read_preparation

    preparation = None if already_launched() else read_preparation(config)
    if preparation is None or preparation.script != FINETUNING or not preparation.makes(config.model.pretrained_model):
        return
    directory, path = preparation.directory, preparation.model
    if path.exists() and not (directory.config.is_file() and directory.is_interrupted()):
        return
    missing = "is not finished" if path.exists() else "is not there yet"
    print(f"{path} {missing}: making it with {preparation.config}", flush=True)
    script = Path(__file__).resolve().parent / preparation.script
    code = subprocess.run([sys.executable, str(script), f"config={preparation.config}"]).returncode
    if code:
        sys.exit(code)


class RLRun:
    """The stages of an RL step, wired together. Torch is imported here, behind the checks of the config."""

    def __init__(self, config: Any, tasks: list[Task], eval_tasks: list[Task] | None) -> None:
        from data.tasks import TaskCursor
        from eval import Evaluator, check_prompts
        from models.checkpoint import check_block_size
        from reward.scoring import Scorer
        from sample.engine import build_engine
        from sample.rollout import PromptBuilder, check_decoding
        from train.engine_weights import EngineWeights
        from train.offload import Frozen
        from train.rl import PolicyUpdate
        from train.run import Run

        self.config = config

        def check(model: Any) -> None:
            check_decoding(model, config.rollout, "rollout", config.model.block_size)
            check_prompts(config, config.rollout, model, tasks, "dataset.train_dataset")
            check_block_size(model, config.training.block_size, "training.block_size", config.model.block_size)
            if eval_tasks is not None:
                Evaluator.check(config, model, eval_tasks)

        self.run = Run(config, config.experiment.total_step, config.rollout.temperature, check, samples=True)
        model = self.run.model
        self.engine_weights = EngineWeights(self.run.accelerator, model)
        rollout = config.rollout
        self.engine = build_engine(self.engine_weights.decoder, model.family, rollout.max_active, rollout.engine)
        self.prompts = PromptBuilder(config, config.rollout, model)
        self.scorer = Scorer(config, {task.id: task for task in tasks}, model.tokenizer)
        self.cursor = TaskCursor(tasks, config.training.seed)
        reference = self.run.load_reference() if config.training.kl_to == "reference" and config.training.beta else None
        self.policy_update = PolicyUpdate(self.run.trainer, config, model.fill_id, reference, self.run.value)
        if self.policy_update.reference is not None:
            frozen = Frozen(self.policy_update.reference, self.run.accelerator.device)
            self.run.offload.add(frozen, config.training.offload_optimizer, keeps_weights=False)
        self.evaluator = None
        if eval_tasks is not None:
            self.evaluator = Evaluator(config, model, self.engine, self.run.accelerator, eval_tasks, self.prepare_engine)
        self.step_metrics: dict[str, float] = {}
        self.run.resume(lambda extra: self.cursor.restore(extra["cursor"]))

    # -- rollout and reward

    def collect(self, step: int) -> list[ScoredRollout]:
        """The scored rollouts of a step, the same list on every rank; where they are finished, the file says what they are.

        Rounds of sampling and scoring: one, or with `rollout.resample` until enough groups are kept. A finished step goes through
        the same rounds without sampling, so the cursor ends where it ended.
        """
        from common.metrics import rollout_metrics
        from reward.scoring import metrics_on_all_ranks

        rollout, file = self.config.rollout, self.run.directory.rollout_file(step)
        finished = self.from_main(lambda: read_rollouts(file) if file.is_file() else None)
        scored: list[ScoredRollout] = []
        for round_ in range(1 + (rollout.resample_max_rounds if rollout.resample else 0)):
            missing = rollout.num_task_per_step - len({r.task_id for r in scored if r.dropped is None})
            tasks = self.cursor.take(missing, exclude={r.task_id for r in scored}) if missing else []
            if not tasks:
                break
            if finished is not None:
                names = {task.id for task in tasks}
                scored += [r for r in finished if r.task_id in names]
                continue
            with self.run.phase("rollout"):
                rollouts = self.sample(tasks, step, round_)
            with self.run.phase("reward"):
                scored += self.score(rollouts, tasks)
        if self.run.is_main:
            if finished is None:
                write_jsonl(file, scored)
            for round_file in self.run.directory.rollouts.glob(f"step_{step:06d}.round_*.jsonl"):
                round_file.unlink()
        self.step_metrics = {**rollout_metrics(scored), **metrics_on_all_ranks(self.scorer, self.run.accelerator)}
        return scored

    def from_main(self, read: Callable[[], Any]) -> Any:
        """What `read` returns on the main process, on every rank: the run directory need not be shared."""
        from common import dist

        return dist.broadcast_object(self.run.accelerator, read() if self.run.is_main else None)

    def sample(self, tasks: list[Task], step: int, round_: int) -> list[Rollout]:
        """One round of responses; a finished one is read back."""
        from sample.rollout import sample_on_all_ranks, sampling_settings

        file = self.run.directory.round_file(step, round_)
        finished = self.from_main(lambda: read_rollouts(file, scored=False) if file.is_file() else None)
        if finished is not None:
            return finished
        requests, _ = self.prompts(tasks, self.config.rollout.num_response_per_task)
        settings = sampling_settings(self.config.rollout, self.run.model, self.config.training.seed, step)
        version, title = self.run.trainer.num_steps, f"step {step}: rollout"
        self.prepare_engine(version)
        by_index = self.config.rollout.deterministic
        rollouts = sample_on_all_ranks(self.engine, requests, settings, self.run.accelerator, version, title, by_index)
        self.engine.release()  # the update, and a judge on this GPU, want the memory of its cache
        if self.run.is_main:
            write_jsonl(file, rollouts)
        return rollouts

    def prepare_engine(self, weights_version: int) -> None:
        """Give the engine the weights of that version, then the memory that only the update needs."""
        self.engine_weights.refresh(weights_version)
        self.run.offload.offload()

    def score(self, rollouts: list[Rollout], tasks: list[Task]) -> list[ScoredRollout]:
        """All responses of `tasks`, scored; a task whose prompt was too long has one record, without a response."""
        from reward.scoring import score_on_all_ranks
        from sample.rollout import prompt_too_long

        scored = score_on_all_ranks(self.scorer, rollouts, self.run.accelerator)
        answered = {r.task_id for r in scored}
        return scored + [prompt_too_long(task, self.config.rollout.block_size) for task in tasks if task.id not in answered]

    # -- update, evaluation

    def update(self, scored: list[ScoredRollout], step: int) -> None:
        trained = [r for r in scored if r.dropped is None]
        with self.run.phase("update"):
            self.run.offload.reload()
            metrics = self.policy_update(trained, step) if trained else {}
        if not metrics and self.run.is_main:
            reasons = Counter(r.dropped for r in scored if r.dropped is not None)
            said = ", ".join(f"{reason}: {reasons[reason]}" for reason in sorted(reasons))
            of_those_kept = f"of {len(trained)} responses nothing was masked" if trained else "every response was dropped"
            warn(f"step {step}: {of_those_kept}{f' ({said})' if said and not trained else ''}: no update")
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

    def close(self) -> None:
        self.scorer.close()
        if self.evaluator is not None:
            self.evaluator.close()
        self.run.close()


if __name__ == "__main__":
    main()

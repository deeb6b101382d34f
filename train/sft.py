"""Supervised finetuning of any family: prompt and response records -> masked blocks -> optimizer steps.

    python train/sft.py config=configs/sft_tiny.yaml [section.key=value ...] [--print-config] [--help]

The other train/sft_*.py scripts are this one for the family in their name: there model.model_base may be left out, and another
family is refused.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: the repo's root, not this folder

import numpy as np

from common.errors import UserError, entry_point
from common.launch import launch, needs_launch, writes_the_run
from common.nodes_link import Link
from common.nodes_start import is_for_all_machines, run_on_all_machines
from common.records import Task
from common.run_dir import is_over
from data.sft import SFTRecord, load_sft, split
from data.tasks import load_tasks
from models.names import check_models
from reward.registry import check_function
from train.methods import METHODS


@entry_point
def main(argv: list[str] | None = None, link: Link | None = None, model_base: str | None = None) -> None:
    """link: to the launchers of the other machines, where there are several. model_base: the family of the script."""
    from configs.load import load_config, with_default

    argv = sys.argv[1:] if argv is None else argv
    if model_base is not None:
        argv = with_default("sft", argv, "model.model_base", model_base)
    config = load_config("sft", argv)
    if model_base not in (None, config.model.model_base):
        raise UserError(
            f"model.model_base: got {config.model.model_base}, but train/sft_{model_base}.py finetunes {model_base}: start "
            f"train/sft.py, which takes any family, or set model.model_base={model_base}"
        )
    if is_for_all_machines(config, link):
        run_on_all_machines("sft", main, argv)
    if writes_the_run(link) and is_over(config):
        return
    data = load_data(config)
    if link is None:  # else the machines are asked for their models together, common/nodes_check.py
        check_models("sft", config)
    if needs_launch(config, link):
        launch("sft", config, sys.argv[0], argv, link)
    sft = SFTRun(config, data)
    try:
        while sft.run.step < sft.run.total_steps:
            sft.update(sft.run.step + 1)
            sft.evaluate(sft.run.step + 1)
            sft.finish()
        sft.run.say_goodbye()
    finally:
        sft.close()
    sft.run.end_together()


@dataclass
class SFTData:
    train: list[SFTRecord]
    validation: list[SFTRecord]
    """Held out for the validation loss; empty: none is computed."""
    eval_tasks: list[Task] | None
    """To sample answers to; None: not."""


def load_data(config: Any) -> SFTData:
    """All that is read besides the model: before anything long, so that mistakes in it show at once."""
    dataset, training = config.dataset, config.training
    records = load_sft(dataset.optimization_data, dataset.data_type)
    if dataset.validation_data is not None:
        validation = load_sft(dataset.validation_data, dataset.data_type)
    else:
        records, validation = split(records, training.validation_share, training.seed)
    if METHODS.get(training.method).trace == "trace":
        for record in [*records, *validation]:
            if record.step_map is None:
                raise UserError(
                    f"training.method: got 'trace', but record {record.id} has no step_map: `python -m data.prepare_sft "
                    "--sample-steps MODEL` makes them, or choose semi-ar"
                )
    evaluates = config.evaluation.if_eval and dataset.eval_dataset
    if evaluates:
        check_function(config.reward)
    tasks = load_tasks(dataset.eval_dataset, dataset.data_type, config.reward.function) if evaluates else None
    return SFTData(records, validation, tasks)


class SFTRun:
    """One finetuning run. Torch is imported here, behind the checks of the config."""

    def __init__(self, config: Any, data: SFTData) -> None:
        from configs.checks_training import warn_of_warmup
        from eval import Evaluator
        from models.checkpoint import Pretrained, check_block_size
        from train.registry import OBJECTIVES
        from train.run import Run
        from train.sft_data import build_responses, fingerprint, warn_of_cuts, warn_of_end
        from train.validation import Validation

        self.config = config
        training = config.training
        method = METHODS.get(training.method, "training.method")
        self.objective = OBJECTIVES.get(training.objective or method.objective_of("sft"), "training.objective")

        def check(model: Pretrained) -> None:
            # Before evaluations, which follow it where they are not told otherwise.
            setting = "training.block_size (rollout.block_size, where it is not given)"
            check_block_size(model, training.block_size, setting, config.model.block_size)
            if data.eval_tasks is not None:
                Evaluator.check(config, model, data.eval_tasks)

        self.run = Run(config, training.max_steps or 1, temperature=1.0, check=check)
        model, dataset, is_main = self.run.model, config.dataset, self.run.is_main
        self.layout = self.run.trainer.layout
        self.responses = build_responses(config, model, data.train, str(dataset.optimization_data), is_main)
        self.run.total_steps = training.max_steps or training.num_train_epochs * -(-len(self.responses) // training.batch_size)
        self.fingerprint = fingerprint(self.responses)
        warn_of_warmup(config, self.run.total_steps)
        if is_main:
            warn_of_end(config, model)
            warn_of_cuts(self.responses, self.layout)
        self.validation = None
        if data.validation:
            source = str(dataset.validation_data or f"held-out part of {dataset.optimization_data}")
            self.validation = Validation(build_responses(config, model, data.validation, source, is_main), self.layout)
        self.evaluator = None if data.eval_tasks is None else Evaluator.for_run(self.run, data.eval_tasks)
        self.step_metrics: dict[str, float] = {}
        self.accuracy: float | None = None
        """On the held-out tasks, if they were evaluated behind this very step."""
        self.run.resume(self.restore)

    def restore(self, extra: dict[str, Any]) -> None:
        if extra["data"] != self.fingerprint:
            raise UserError(
                f"dataset.optimization_data: {self.config.dataset.optimization_data} has changed since this run was saved: put the "
                "old file back, or start another run directory (experiment.project)"
            )
        self.accuracy = extra.get("accuracy")
        if self.is_solved():
            self.run.total_steps = self.run.step

    def is_solved(self) -> bool:
        """Whether the run ends here, for enough of the held-out tasks are solved."""
        enough = self.config.training.stop_at_solve_rate
        return enough is not None and self.accuracy is not None and self.accuracy >= enough

    def batch(self, step: int) -> list[int]:
        """Responses of a step: shuffled epochs, one behind the other, a function of seed and step alone."""
        size, number, seed = self.config.training.batch_size, len(self.responses), self.config.training.seed
        places = np.arange((step - 1) * size, step * size)
        orders = {epoch: np.random.default_rng([seed, epoch]).permutation(number) for epoch in np.unique(places // number)}
        return [int(orders[p // number][p % number]) for p in places]

    def update(self, step: int) -> None:
        """One optimizer step. All that is random in it is a function of seed and step, so a resumed run repeats it; LoRA's
        dropout alone draws from each rank's own generator, whose state is resumed on as many ranks (common/state.py)."""
        from train.documents import number
        from train.loop import Tables, merge_results
        from train.validation import build_documents, drawn_and_weighted

        with self.run.phase("update"):
            self.run.offload.reload()
            responses = [self.responses[index] for index in self.batch(step)]
            documents = build_documents(responses, self.layout, [step])
            self.step_metrics = {"train/num_documents": float(len(documents)), "train/skipped": float(not documents)}
            if not documents:  # short responses, and every mask was drawn empty
                return
            predictions = number(documents)
            longest = max(len(response.response_ids) for response in responses)
            documents, weights = drawn_and_weighted(documents, predictions, longest, self.layout, [step])
            zeros = np.zeros(len(predictions))
            progress = (step - 1) / self.run.total_steps
            result = self.run.trainer.step(documents, Tables(zeros, weights, zeros), self.objective, progress)
        self.step_metrics |= merge_results([result])

    def evaluate(self, step: int) -> None:
        """Validation loss and held-out tasks, every so many steps; ends the run where the tasks are solved well enough."""
        self.accuracy = None
        if step % self.config.training.eval_every and step != self.run.total_steps:
            return
        if self.validation is not None:
            with self.run.phase("validation"):
                self.step_metrics |= self.validation(self.run.trainer)
        if self.evaluator is None:
            return
        with self.run.phase("evaluation"):
            results = self.evaluator(self.run.trainer.num_steps)
        for result in results:
            self.step_metrics |= result.metrics()
        self.accuracy = results[0].accuracy
        if self.is_solved():
            self.run.total_steps = step

    def finish(self) -> None:
        seconds = self.run.watch.seconds.get("update")
        if seconds and "train/num_tokens" in self.step_metrics:
            self.step_metrics["rate/update_tokens_per_second"] = self.step_metrics["train/num_tokens"] / seconds
        self.run.finish_step(self.step_metrics, {"accuracy": self.accuracy, "data": self.fingerprint})

    def close(self) -> None:
        if self.evaluator is not None:
            self.evaluator.close()
        self.run.close()


if __name__ == "__main__":
    main()

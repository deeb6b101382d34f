"""Supervised finetuning: prompt and response records -> masked blocks -> optimizer steps. The train/sft_*.py scripts start here."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from common.errors import UserError, entry_point
from common.launch import launch, needs_launch
from common.records import Task
from common.run_dir import is_over
from data.sft import SFTRecord, load_sft
from data.tasks import load_tasks
from train.methods import METHODS
from train.traces import TRACES, Response


@entry_point
def main(argv: list[str] | None = None) -> None:
    from configs.load import load_config

    argv = sys.argv[1:] if argv is None else argv
    config = load_config("sft", argv)
    if is_over(config):
        return
    records, eval_tasks = load_data(config)
    if needs_launch(config):
        launch(config, sys.argv[0], argv)
    sft = SFTRun(config, records, eval_tasks)
    try:
        while sft.run.step < sft.run.total_steps:
            sft.update(sft.run.step + 1)
            sft.evaluate(sft.run.step + 1)
            sft.finish()
        sft.run.say_goodbye()
    finally:
        sft.close()


def load_data(config: Any) -> tuple[list[SFTRecord], list[Task] | None]:
    """The records to finetune on, and the tasks to evaluate on: before anything long, so that mistakes in them show at once."""
    records = load_sft(config.dataset.optimization_data, config.dataset.data_type)
    evaluates = config.evaluation.if_eval and config.dataset.eval_dataset
    return records, load_tasks(config.dataset.eval_dataset, config.dataset.data_type) if evaluates else None


def as_response(prompt_ids: list[int], response_ids: list[int], step_map: list[int] | None, fill_id: int, block_size: int, max_response: int) -> Response:
    """A record as training sees it: cut to `max_response` tokens, then filled up to the end of its last block.

    The fill is trained like any token as far as `training.post_num` allows: a model samples whole blocks, so it has to know what
    stands behind a stop token. In a given step map the fill is revealed one step behind everything else.
    """
    response_ids = response_ids[:max_response]
    num_fill = -(len(prompt_ids) + len(response_ids)) % block_size
    is_pad = np.arange(len(response_ids) + num_fill) >= len(response_ids)
    steps = None
    if step_map is not None:
        steps = np.asarray(step_map[: len(response_ids)] + [max(step_map, default=0) + 1] * num_fill, dtype=np.int64)
    ids = np.asarray(response_ids + [fill_id] * num_fill, dtype=np.int64)
    return Response(np.asarray(prompt_ids, dtype=np.int64), ids, len(ids), steps, is_pad)


class SFTRun:
    """One finetuning run. Torch is imported here, behind the checks of the config."""

    def __init__(self, config: Any, records: list[SFTRecord], eval_tasks: list[Task] | None) -> None:
        from eval import Evaluator
        from train.objectives import OBJECTIVES
        from train.run import Run

        self.config = config
        training = config.training
        method = METHODS.get(training.method, "training.method")
        if method.stage != "sft":
            choices = [name for name in METHODS if METHODS.get(name).stage == "sft"]
            raise UserError(f"training.method: {training.method} is for {method.stage}, this is sft: choose {' or '.join(choices)}")
        self.trace = TRACES.get(method.trace)
        self.objective = OBJECTIVES.get(training.objective or method.objective, "training.objective")
        per_epoch = -(-len(records) // training.batch_size)
        check = (lambda model: None) if eval_tasks is None else (lambda model: Evaluator.check(config, model))
        self.run = Run(config, training.max_steps or training.num_train_epochs * per_epoch, temperature=1.0, check=check)
        self.responses = self.build_responses(records)
        self.evaluator = None
        if eval_tasks is not None:
            self.evaluator = self.build_evaluator(eval_tasks)
        self.step_metrics: dict[str, float] = {}
        self.is_solved = False
        self.run.resume(self.restore)
        if self.is_solved:
            self.run.total_steps = self.run.step

    def restore(self, extra: dict[str, Any]) -> None:
        self.is_solved = extra["is_solved"]

    def build_responses(self, records: list[Any]) -> list[Response]:
        from data.prompts import encode, render_chat
        from reward.registry import REWARDS

        model, training = self.run.model, self.config.training
        is_chat = REWARDS.get(self.config.dataset.data_type).chat
        responses, num_long = [], 0
        for record in records:
            text = render_chat(record.prompt, model.family.chat_style, model.tokenizer) if is_chat else record.prompt
            prompt_ids = encode(model.tokenizer, text)
            if len(prompt_ids) > training.max_prompt_len:
                num_long += 1
                continue
            response_ids = model.tokenizer(record.response, add_special_tokens=False)["input_ids"] + [model.eos_ids[0]]
            step_map = None if record.step_map is None else [*record.step_map, max(record.step_map) + 1]
            responses.append(
                as_response(prompt_ids, response_ids, step_map, model.fill_id, training.block_size, training.max_gen_length)
            )
        if num_long and self.run.is_main:
            print(f"{num_long} of {len(records)} records dropped: prompt longer than training.max_prompt_len={training.max_prompt_len}")
        if not responses:
            raise UserError(f"{self.config.dataset.optimization_data}: every prompt is longer than training.max_prompt_len: raise it")
        return responses

    def build_evaluator(self, tasks: list[Task]) -> Any:
        from eval import Evaluator
        from sample.engine import build_engine
        from train.engine_weights import EngineWeights

        model = self.run.model
        self.engine_weights = EngineWeights(self.run.accelerator, model)
        engine = build_engine(self.engine_weights.decoder, model.family, max_active=self.config.rollout.max_active)
        return Evaluator(self.config, model, engine, self.run.accelerator, tasks)

    def batch(self, step: int) -> list[int]:
        """Records of a step: shuffled epochs, one behind the other, a function of seed and step alone."""
        size, number, seed = self.config.training.batch_size, len(self.responses), self.config.training.seed
        places = np.arange((step - 1) * size, step * size)
        orders = {epoch: np.random.default_rng([seed, epoch]).permutation(number) for epoch in np.unique(places // number)}
        return [int(orders[p // number][p % number]) for p in places]

    def update(self, step: int) -> None:
        from train.loop import Tables, merge_results
        from train.objectives import token_weights
        from train.packing import build_document, number

        training = self.config.training
        with self.run.phase("update"):
            documents = []
            for place, index in enumerate(self.batch(step)):
                generator = np.random.default_rng([training.seed, step, place])
                trace = self.trace(self.responses[index], training.block_size, training, generator)
                document = build_document(place, self.responses[index], trace, training.block_size)
                if document is not None:
                    documents.append(document)
            predictions = number(documents)
            longest = max(len(self.responses[i].response_ids) for i in self.batch(step))
            weights = token_weights(predictions, training.loss_weighting, longest, training.max_gen_length)
            zeros = np.zeros(len(predictions))
            progress = (step - 1) / self.run.total_steps
            result = self.run.trainer.step(documents, Tables(zeros, weights, zeros), self.objective, progress)
        metrics = merge_results([result])
        self.step_metrics = {key: value for key, value in metrics.items() if not key.startswith("gap/")}

    def evaluate(self, step: int) -> None:
        """The held-out tasks, every so many steps; ends the run where they are solved well enough."""
        training = self.config.training
        if self.evaluator is None or (step % training.eval_every and step != self.run.total_steps):
            return
        with self.run.phase("evaluation"):
            self.engine_weights.refresh(self.run.trainer.num_steps)
            results = self.evaluator(self.run.trainer.num_steps)
        for result in results:
            self.step_metrics |= result.metrics()
        if training.stop_at_solve_rate is not None and results[0].accuracy >= training.stop_at_solve_rate:
            self.is_solved = True
            self.run.total_steps = step

    def finish(self) -> None:
        seconds = self.run.watch.seconds.get("update")
        if seconds:
            self.step_metrics["rate/update_tokens_per_second"] = self.step_metrics["train/num_tokens"] / seconds
        self.run.finish_step(self.step_metrics, {"is_solved": self.is_solved})

    def close(self) -> None:
        if self.evaluator is not None:
            self.evaluator.close()
        self.run.close()

"""Evaluation: sample answers to a task set with every decoding of the config, score them, print and keep a table.

    python eval.py config=configs/trado_eval.yaml [section.key=value ...] [--print-config] [--help]

Results go to results/ of the run directory: a JSON file with the numbers and the settings that produced them, the table as text,
and every response.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

from common.errors import UserError, entry_point, warn_once
from common.launch import launch, needs_launch, writes_the_run
from common.nodes_link import Link
from common.records import ScoredRollout, Task, write_jsonl
from common.run_dir import RunDir, write_text
from configs.load import load_config
from data.tasks import load_tasks
from models.names import check_models
from reward.registry import check_function


@entry_point
def main(argv: list[str] | None = None, link: Link | None = None) -> None:
    """link: to the launchers of the other machines (multinode_eval.py)."""
    argv = sys.argv[1:] if argv is None else argv
    config = load_config("eval", argv)
    if writes_the_run(link):
        directory, name = RunDir(config.experiment.project), results_name(config)
        directory.results_lock(name).check()
        directory.check_results(config, name)
    tasks = load_tasks(config.dataset.eval_dataset, config.dataset.data_type, config.reward.function)
    check_function(config.reward)
    if link is None:  # else the machines are asked for their models together, common/nodes_check.py
        check_models("eval", config)
    if needs_launch(config, link):
        launch("eval", config, sys.argv[0], argv, link)
    run(config, tasks)


def run(config: Any, tasks: list[Task]) -> None:
    """The whole job, in every process. Torch is imported from here on."""
    from common import dist
    from models.checkpoint import load_pretrained
    from sample.engine import build_engine

    accelerator = dist.make_accelerator(config, trains=False)
    dist.set_numerics(config, accelerator.device)
    directory, name = RunDir(config.experiment.project), results_name(config)
    lock = directory.results_lock(name)
    with dist.main_first(accelerator):
        if accelerator.is_main_process:
            directory.check_path()
            lock.acquire()
            directory.check_results(config, name)
    model = load_pretrained(
        config.model.pretrained_model,
        config.model.model_base,
        dist.weights_dtype(config),
        accelerator.device,
        config.training.seed,
        check=lambda model: Evaluator.check(config, model, tasks),
    )
    engine = build_engine(model.decoder, model.family, config.evaluation.max_active, config.rollout.engine)
    evaluator = Evaluator(config, model, engine, accelerator, tasks)
    try:
        results = evaluator(weights_version=0)
    finally:
        evaluator.close()
    if accelerator.is_main_process:
        directory.save_config(config, name)  # first: what is there belongs to it, also where this is killed
        file = evaluator.save(results, directory.results, name)
        lock.release()
        print(table(results))
        print(f"kept in {file}, responses beside it")
    dist.end_together(accelerator)


def results_name(config: Any) -> str:
    """What the files in results/ begin with."""
    return Path(config.dataset.eval_dataset).stem


@dataclass
class EvalResult:
    """One decoding of one task set."""

    name: str
    """strategy, with top_k and block size where the config lists several."""
    settings: dict[str, Any]
    num_tasks: int
    num_responses: int
    num_prompts_too_long: int
    mean_reward: float
    accuracy: float | None
    """Mean over responses of being right. This and the next two are None where the reward does not say what is right."""
    standard_error: float | None
    """Of the accuracy, over tasks."""
    pass_at_k: float | None
    """Share of tasks that one of the k responses solves."""
    k: int
    mean_length: float
    cut_off_share: float
    tokens_per_forward: float
    seconds: float
    tokens_per_second: float
    rollouts: list[ScoredRollout] = dataclasses.field(repr=False, default_factory=list)

    def metrics(self) -> dict[str, float]:
        """For metrics.jsonl."""
        keys = ["mean_reward", "accuracy", "standard_error", "pass_at_k", "mean_length", "cut_off_share", "tokens_per_forward"]
        numbers = {f"eval/{self.name}/{key}": float(getattr(self, key)) for key in keys if getattr(self, key) is not None}
        return {**numbers, f"rate/eval_{self.name}_tokens_per_second": self.tokens_per_second}

    def record(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "rollouts"}


class Evaluator:
    """Evaluates the weights that its engine holds, as often as it is called."""

    def __init__(
        self,
        config: Any,
        model: Any,
        engine: Any,
        accelerator: Any,
        tasks: list[Task],
        refresh: Callable[[int], None] = lambda weights_version: None,
    ) -> None:
        """refresh: gives the engine the weights of that version, before they are evaluated; all ranks together."""
        from reward.scoring import Scorer

        self.config, self.model, self.engine, self.accelerator = config, model, engine, accelerator
        self.tasks, self.refresh = tasks, refresh
        self.scorer = Scorer(config, {task.id: task for task in self.tasks}, model.tokenizer, config.evaluation)
        self.variants = named_variants(config.evaluation)

    @classmethod
    def for_run(cls, run: Any, tasks: list[Task]) -> Evaluator:
        """Of a training run (train/run.py) that has no engine of its own: with one over the weights that it trains."""
        from sample.engine import build_engine
        from train.engine_weights import EngineWeights

        weights = EngineWeights(run.accelerator, run.model)
        config = run.config
        engine = build_engine(weights.decoder, run.model.family, config.evaluation.max_active, config.rollout.engine)

        def refresh(weights_version: int) -> None:
            weights.refresh(weights_version)
            run.offload.offload()

        return cls(run.config, run.model, engine, run.accelerator, tasks, refresh)

    @staticmethod
    def check(config: Any, model: Any, tasks: list[Task]) -> None:
        """Raises UserError where the model cannot be sampled from as `evaluation` says, or no task can be."""
        from sample.rollout import check_decoding

        for decoding in config.evaluation.variants():
            check_decoding(model, decoding, "evaluation", config.model.block_size)
        check_prompts(config, config.evaluation, model, tasks, "dataset.eval_dataset")

    def __call__(self, weights_version: int) -> list[EvalResult]:
        """One result per decoding, the same on every rank."""
        self.refresh(weights_version)
        return [self.evaluate(name, decoding, weights_version) for name, decoding in self.variants.items()]

    def evaluate(self, name: str, decoding: Any, weights_version: int) -> EvalResult:
        from common.metrics import tokens_per_forward
        from reward.scoring import score_on_all_ranks
        from sample.rollout import PromptBuilder, sample_on_all_ranks, sampling_settings

        k = self.config.evaluation.num_response_per_task
        requests, too_long = PromptBuilder(self.config, decoding, self.model)(self.tasks, k)
        if too_long:
            warn_once(
                f"{len(too_long)} of {len(self.tasks)} evaluation tasks have a prompt longer than training.max_prompt_len="
                f"{self.config.training.max_prompt_len}: they are not sampled and count as not solved"
            )
        settings = sampling_settings(decoding, self.model, self.config.training.seed)
        start = time.perf_counter()
        title = f"evaluation: {name}"
        rollouts = sample_on_all_ranks(
            self.engine, requests, settings, self.accelerator, weights_version, title, decoding.deterministic
        )
        seconds = time.perf_counter() - start
        self.engine.release()  # what follows, an update or a judge on this GPU, wants the memory of its cache
        scored = score_on_all_ranks(self.scorer, rollouts, self.accelerator)
        num_tokens = sum(r.num_response for r in scored)
        return EvalResult(
            name=name,
            settings={"pretrained_model": self.config.model.pretrained_model, "seed": self.config.training.seed, **vars(decoding)},
            num_tasks=len(self.tasks),
            num_responses=len(scored),
            num_prompts_too_long=len(too_long),
            mean_reward=sum(r.reward for r in scored) / max(1, len(scored)),
            **solve_rates(scored, [task.id for task in self.tasks], k),
            k=k,
            mean_length=num_tokens / max(1, len(scored)),
            cut_off_share=sum(r.finish == "length" for r in scored) / max(1, len(scored)),
            tokens_per_forward=tokens_per_forward(scored),
            seconds=seconds,
            tokens_per_second=num_tokens / seconds,
            rollouts=scored,
        )

    def save(self, results: list[EvalResult], folder: Path, name: str) -> Path:
        """FOLDER/NAME.json, NAME.txt and a file of responses per decoding. Returns the JSON file."""
        file = folder / f"{name}.json"
        for result in results:
            write_jsonl(folder / f"{name}.{result.name}.jsonl", result.rollouts)
        write_text(folder / f"{name}.txt", table(results) + "\n")
        write_text(file, json.dumps([result.record() for result in results], indent=2) + "\n")
        return file

    def close(self) -> None:
        self.scorer.close()


def check_prompts(config: Any, decoding: Any, model: Any, tasks: list[Task], setting: str) -> None:
    """Raises UserError where every prompt of a data set, named by `setting`, is longer than `training.max_prompt_len`."""
    from sample.rollout import PromptBuilder

    build, limit, shortest = PromptBuilder(config, decoding, model), config.training.max_prompt_len, math.inf
    build.max_length = shortest  # those that are too long are wanted too
    for task in tasks:
        (request,), _ = build([task], 1)
        shortest = min(shortest, len(request.prompt_ids))
        if shortest <= limit:
            return
    raise UserError(
        f"training.max_prompt_len: got {limit}, but all {len(tasks)} prompts of {setting} are longer, the shortest has {shortest} "
        "tokens: raise it"
    )


def named_variants(evaluation: Any) -> dict[str, Any]:
    """The decodings to run; a name says what differs between them, and the number where nothing does."""
    variants = evaluation.variants()
    varied = [key for key in ("remasking_strategy", "top_k", "block_size") if len({str(getattr(v, key)) for v in variants}) > 1]

    def name(decoding: Any) -> str:
        words = [decoding.remasking_strategy]
        words += [f"{key}{getattr(decoding, key)}" for key in varied if key != "remasking_strategy"]
        return "-".join(words)

    named: dict[str, Any] = {}
    for variant in variants:
        first = name(variant)
        number = sum(name(other) == first for other in named.values())
        named[first if not number else f"{first}-{number + 1}"] = variant
    return named


def solve_rates(scored: list[ScoredRollout], task_ids: list[str], k: int) -> dict[str, float | None]:
    """accuracy (mean over k responses of every task), its standard error over tasks, and pass@k.

    A task without a response (its prompt was too long) is one that was not solved. All None where a response has no verdict.
    """
    if any(r.correct is None for r in scored):
        return {"accuracy": None, "standard_error": None, "pass_at_k": None}
    num_right = dict.fromkeys(task_ids, 0)
    for r in scored:
        num_right[r.task_id] += r.correct
    rates = [right / k for right in num_right.values()]
    accuracy = sum(rates) / len(rates)
    variance = sum((rate - accuracy) ** 2 for rate in rates) / max(1, len(rates) - 1)
    return {
        "accuracy": accuracy,
        "standard_error": math.sqrt(variance / len(rates)),
        "pass_at_k": sum(right > 0 for right in num_right.values()) / len(rates),
    }


def table(results: list[EvalResult]) -> str:
    """The results as aligned text."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    head = ["decoding", "reward", "accuracy", "s.e.", "pass@k", "k", "length", "cut off", "tokens/forward", "tokens/s"]
    rows = [
        [
            r.name,
            share(r.mean_reward),
            share(r.accuracy),
            share(r.standard_error),
            share(r.pass_at_k),
            str(r.k),
            f"{r.mean_length:.1f}",
            f"{r.cut_off_share:.3f}",
            f"{r.tokens_per_forward:.2f}",
            f"{r.tokens_per_second:.0f}",
        ]
        for r in results
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in [head, *rows]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


if __name__ == "__main__":
    main()

"""In what the settings of a run, or of results, differ from those of a job that wants to go on with it, or write over them."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from configs.reference import UNUSED, flatten
from configs.schema import Config

MAY_CHANGE = (
    "experiment.start_from_scratch",
    "experiment.current_epoch",
    "experiment.num_node",
    "experiment.node_index",
    "experiment.num_processes",
    "experiment.deepspeed_file",
    "reward.judge.base_url",
    "reward.judge.api_key_env",
    "reward.judge.concurrency",
    "reward.judge.timeout_seconds",
    "reward.judge.retry_seconds",
    "system.",
    "wandb.",
    "logging.",
)
"""What a run may go on with another value of: the processes and machines, where and how patiently the judge is asked, what is
logged."""

NOT_OF_RESULTS = (
    "experiment.",
    "model.prepare_config",
    "model.optimized_",
    "model.value_",
    "dataset.train_dataset",
    "dataset.optimization_data",
    "dataset.validation_data",
    "rollout.num_",
    "rollout.resample",
    "training.",
    "optimizer.",
    "lr_scheduler.",
    "evaluation.if_eval",
    "evaluation.max_active",
)
"""What an evaluation does not read, or computes the same with..."""
OF_RESULTS = (
    "experiment.plugins",
    "training.seed",
    "training.max_prompt_len",
    "training.mixed_precision",
    "training.enable_tf32",
)
"""...but for these."""

PATHS = (
    "model.pretrained_model",
    "model.value_base_model",
    "model.process_reward_model",
    "dataset.train_dataset",
    "dataset.eval_dataset",
    "dataset.optimization_data",
    "dataset.validation_data",
)
"""Names of directories and files, where there are such here: one may be written in several ways."""


def config_difference(saved: str, config: Config, of_results: bool = False) -> list[str]:
    """Settings in which a run directory's config.yaml (its text) and `config` differ: "training.eps: 0.2 there, 0.3 here".

    of_results: `saved` is of the results of an evaluation, and of its settings those alone count that they depend on. A setting
    that the file does not have counts as its default; one that has no use here any more does not count.
    """
    there = flatten(OmegaConf.to_container(OmegaConf.load(io.StringIO(saved))))
    here = flatten(dataclasses.asdict(config))
    defaults = flatten(dataclasses.asdict(Config()))

    def counts(key: str) -> bool:
        is_free = key.startswith(MAY_CHANGE) or (of_results and key.startswith(NOT_OF_RESULTS) and key not in OF_RESULTS)
        return not is_free and key not in UNUSED

    different = []
    for key in sorted(filter(counts, here.keys() | there.keys())):
        old, new = there.get(key, defaults.get(key)), here.get(key, "unknown")
        if old != new and not (key in PATHS and _is_one_path(old, new)):
            different.append(f"{key}: {old!r} there, {new!r} here")
    return different


def _is_one_path(*names: Any) -> bool:
    if not all(isinstance(name, str) and name for name in names):
        return False
    paths = [Path(name).expanduser() for name in names]
    return paths[0].exists() and len({path.resolve() for path in paths}) == 1

"""`model.prepare_config`: the config whose job makes the model that another job starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.run_dir import RunDir
from configs.load import file_settings, read_config

FINETUNING, RL = "train/sft.py", "rl.py"


@dataclass(frozen=True)
class Preparation:
    """The job of a config, as far as others have to know it."""

    config: str
    script: str
    """FINETUNING or RL."""
    directory: RunDir
    model: Path
    """What it makes."""

    def makes(self, name: str) -> bool:
        return Path(name).expanduser().resolve() == self.model.resolve()


def read_preparation(config: Any) -> Preparation | None:
    """The job of `config.model.prepare_config`; None where there is none, or the file is none that a job could read: the job that
    makes a model says what is wrong with its own config."""
    name = config.model.prepare_config
    if name is None:
        return None
    arguments = [f"config={name}"]
    try:
        is_finetuning = "dataset.optimization_data" in file_settings("sft", arguments)
        made_by = read_config("sft" if is_finetuning else "rl", arguments)
    except UserError:
        return None
    directory = RunDir(made_by.experiment.project)
    return Preparation(name, FINETUNING if is_finetuning else RL, directory, directory.checkpoints / made_by.model.optimized_name)

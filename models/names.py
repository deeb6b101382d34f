"""What a model is called: a directory here, or owner/name of the hub. Nothing here imports torch, so jobs ask before they begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.errors import UserError
from models.family import TINY_RANDOM


def is_path(name: str) -> bool:
    """Whether a name can only be that of a directory. "runs/x" may be one of the hub's too."""
    return name.count("/") > 1 or name.startswith(("/", ".", "~"))


def no_directory(name: str, setting: str, made_by: str | None = None) -> UserError:
    """made_by: the config whose job makes it, where that is known."""
    if made_by is None:
        return UserError(f"{setting}: no directory {name}: give an existing directory or a hub name (owner/name)")
    script = "train/sft.py" if Path(made_by).name.startswith("sft") else "rl.py"
    return UserError(f"{setting}: no directory {name}: `python {script} config={made_by}` makes it, or give an existing directory")


def check_models(config: Any, uses_judge: bool = False) -> None:
    """Raises UserError where a model of the config can be nothing but a directory that is not here. uses_judge: whether answers
    are graded by the model that `model.process_reward_model` names, in this process."""
    model = config.model
    names = {"pretrained_model": model.pretrained_model, "value_base_model": model.value_base_model}
    if uses_judge and config.reward.judge.base_url is None:
        names["process_reward_model"] = model.process_reward_model
    for key, name in names.items():
        if name not in (None, TINY_RANDOM) and is_path(name) and not Path(name).expanduser().exists():
            raise no_directory(name, f"model.{key}", model.prepare_config if key == "pretrained_model" else None)

"""What a model is called: a directory here, or owner/name of the hub. Nothing here imports torch, so jobs ask before they begin."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from models.family import TINY_RANDOM

if TYPE_CHECKING:
    from configs.prepare import Preparation


def is_path(name: str) -> bool:
    """Whether a name can only be that of a directory. "runs/x" may be one of the hub's too, where all are owner/name."""
    return name.count("/") != 1 or name.startswith(("/", ".", "~"))


def no_directory(name: str, setting: str, made_by: Preparation | None = None) -> UserError:
    """made_by: the job of `model.prepare_config`, where it is asked."""
    what_to_do = "give an existing directory or a hub name (owner/name)"
    if made_by is not None:
        command = f"`python {made_by.script} config={made_by.config}` makes {'it' if made_by.makes(name) else made_by.model}"
        what_to_do = f"{command}, or give an existing directory"
    return UserError(f"{setting}: no directory {name}: {what_to_do}")


def models_read(job: str, config: Any) -> dict[str, str]:
    """{key of `model`: name} of the models that the processes of a job read."""
    from reward.registry import scoring_reward

    keys = ["pretrained_model"]
    if job == "rl":
        keys.append("value_base_model")
    # Evaluations ask the judge only where nothing else scores (reward/scoring.py); an endpoint's model is not ours to read.
    scoring = scoring_reward(config.dataset.data_type, config.reward.function)
    is_judged = job == "rl" or (job == "eval" and scoring is not None and not scoring.has_outcome)
    if is_judged and config.reward.judge.base_url is None:
        keys.append("process_reward_model")
    return {key: getattr(config.model, key) for key in keys if getattr(config.model, key) is not None}


def check_models(job: str, config: Any) -> None:
    """Raises UserError where a model that the job reads can be nothing but a directory that is not here."""
    for key, name in models_read(job, config).items():
        if name == TINY_RANDOM or (key == "process_reward_model" and "/" not in name):
            continue  # transformers, which reads the judge, has names without an owner
        if is_path(name) and not Path(name).expanduser().exists():
            from configs.prepare import read_preparation

            raise no_directory(name, f"model.{key}", read_preparation(config) if key == "pretrained_model" else None)

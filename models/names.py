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
        if name != TINY_RANDOM and is_path(name) and not Path(name).expanduser().exists():
            raise no_directory(name, f"model.{key}", config.model.prepare_config if key == "pretrained_model" else None)

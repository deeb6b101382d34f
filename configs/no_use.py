"""Settings that a job has no use for as its other settings are. They are said in a line, not refused: one file serves several jobs,
and those of the reference carry many. What belongs to the other attention kind is said by configs/checks_decoding.py."""

from __future__ import annotations

from typing import Callable

from common.errors import warn_once
from configs.schema import Config, get


def _has_value_model(config: Config) -> bool:
    return config.model.value_base_model is not None or config.model.value_shared


ONLY_FINETUNING = """
    dataset.validation_data training.max_steps training.batch_size training.eval_every training.validation_share
    training.stop_at_solve_rate
"""

NO_USE: list[tuple[str, Callable[[Config, str], bool], str]] = [
    ("in RL", lambda config, job: job == "rl", ONLY_FINETUNING),
    ("in RL, which evaluates with rollout.max_active", lambda config, job: job == "rl", "evaluation.max_active"),
    (
        "in RL with training.num_updates_per_step",
        lambda config, job: job == "rl" and config.training.num_updates_per_step is not None,
        "training.num_train_epochs training.batch_size_lm training.gradient_accumulation_steps",
    ),
    ("in RL with training.beta=0", lambda config, job: job == "rl" and not config.training.beta, "training.kl_to"),
    (
        "in finetuning, which maximises the likelihood",
        lambda config, job: job == "sft" and _maximises_likelihood(config),
        "training.eps training.eps_high training.beta training.kl_to training.advantage",
    ),
    ("in eval.py, which evaluates all the same", lambda config, job: job == "eval", "evaluation.if_eval"),
    (
        "with a method that draws no masks",
        lambda config, job: job != "eval" and _draws_no_masks(config),
        "training.mask_ratio",
    ),
    (
        "without a value model",
        lambda config, job: job != "eval" and not _has_value_model(config),
        """
        experiment.train_value_every training.gam training.lam training.value_loss_weight model.value_offload
        optimizer.params.value_learning_rate
        """,
    ),
    ("with a value model, which takes its place", lambda config, job: _has_value_model(config), "training.advantage"),
    (
        "with a value model of its own",
        lambda config, job: config.model.value_base_model is not None and not config.model.value_shared,
        "training.value_loss_weight",
    ),
    (
        "with model.value_shared, where the policy's update trains the value head",
        lambda config, job: config.model.value_shared,
        "model.value_offload optimizer.params.value_learning_rate",
    ),
    (
        "without training.lora.rank",
        lambda config, job: job != "eval" and not config.training.lora.rank,
        "training.lora.alpha training.lora.dropout training.lora.target_modules training.lora.save_merged",
    ),
    (
        "with a constant schedule",
        lambda config, job: job != "eval" and config.lr_scheduler.scheduler == "constant",
        "lr_scheduler.params.min_lr_scale",
    ),
    (
        "where prompts are no chat, as of this data type",
        lambda config, job: not _is_chat(config),
        "rollout.start_with_think evaluation.start_with_think",
    ),
]
"""(where, whether it is so in a job, the settings that have no use there)."""

FOLLOWS = {
    "optimizer.params.value_learning_rate": "optimizer.params.learning_rate",
    "training.eps_high": "training.eps",
    "evaluation.max_active": "rollout.max_active",
}
"""Settings whose default is another one's value."""


def _draws_no_masks(config: Config) -> bool:
    from train.methods import METHODS

    return METHODS.get(config.training.method).trace in ("trace", "next_token")


def _maximises_likelihood(config: Config) -> bool:
    from train.methods import METHODS

    return (config.training.objective or METHODS.get(config.training.method).objective_of("sft")) == "likelihood"


def _is_chat(config: Config) -> bool:
    from reward.registry import REWARDS

    return REWARDS.get(config.dataset.data_type).chat


def warn_of_settings_without_use(config: Config, job: str) -> None:
    """One line per reason, naming the settings that differ from their default."""
    defaults = Config()

    def is_given(key: str) -> bool:
        return get(config, key) != (get(config, FOLLOWS[key]) if key in FOLLOWS else get(defaults, key))

    for where, holds, keys in NO_USE:
        given = [key for key in keys.split() if is_given(key)]
        if given and holds(config, job):
            warn_once(f"settings that have no use {where}: {', '.join(given)}")

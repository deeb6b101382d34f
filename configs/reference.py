"""YAML files of the reference implementation: other names, another layout for evaluation, and settings without a use here.

Works on flat settings, {"section.key": value}, before they meet the schema.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Callable

from common.errors import UserError
from configs.schema import Evaluation

ALIASES = {
    # evaluation files of the reference have these at the top level
    "model": "model.pretrained_model",
    "model_base": "model.model_base",
    "vq_model_path": "model.vq_model_path",
    "image_resolution": "model.image_resolution",
    "answer_must_in_box": "reward.answer_must_in_box",
    "strict_len_check": "reward.strict_len_check",
    # RL files of the reference may say beside the decoding of evaluation what is evaluated on
    "evaluation.eval_dataset": "dataset.eval_dataset",
    "evaluation.data_type": "dataset.data_type",
    # one setting under two names
    "rollout.max_gen_length": "rollout.max_token",
    "evaluation.max_gen_length": "evaluation.max_token",
    "model.process_reward_chunk_size": "rollout.reward_model.reward_chunk_length",
}
"""Other names of settings."""

_OLDER_NAMES = {"model.process_reward_chunk_size"}  # files of the reference give it beside its newer name, which counts

UNUSED = {
    "experiment.function": "stages are not separate scripts",
    "system.env_name": "no conda environments are switched",
    "system.envs_dir": "no conda environments are switched",
    "system.reward_env_name": "no conda environments are switched",
    "system.base_dir": "processes start where the launcher starts",
    "rollout.tensor_parallel_size": "every process holds an engine of its own",
    "evaluation.tensor_parallel_size": "every process holds an engine of its own",
    "rollout.output_unmasking_history": "step maps are always kept",
    "evaluation.output_unmasking_history": "step maps are always kept",
    "rollout.batch_size": "max_active says how many canvases are in flight, where the memory does not",
    "evaluation.batch_size": "max_active says how many canvases are in flight, where the memory does not",
    "evaluation.num_task_per_step": "all tasks are evaluated",
    "optimizer.params.scale_lr": "the learning rate is taken as given",
}
"""Settings of the reference that are accepted and do nothing, and why."""

_DONE_ANYWAY = {"output_unmasking_history": True}
"""Values of them that are no news: what is asked for is done."""

_EVALUATION_FIELDS = {f.name for f in dataclasses.fields(Evaluation)}
_LISTS = {f"evaluation.{name}" for name in ["remasking_strategy", "top_k", "block_size"]}


def canonical_key(key: str, job: str) -> str:
    """The schema's name of a setting. In evaluation jobs `rollout` is another name of `evaluation`."""
    key = ALIASES.get(key, key)
    section, _, name = key.partition(".")
    if job == "eval" and section == "rollout" and name in _EVALUATION_FIELDS:
        return f"evaluation.{name}"
    return key


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}. Lists are leaves; sections that are empty vanish."""
    flat = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            flat.update(flatten(value, f"{key}."))
        else:
            flat[key] = value
    return flat


def canonical(settings: dict[str, Any], job: str) -> tuple[dict[str, Any], list[str]]:
    """Flat settings under the schema's names, and the keys among them that have no use here.

    Raises UserError where two names of one setting get different values.
    """
    rename = _renamer(job)
    result: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    unused = [key for key, value in settings.items() if key in UNUSED and value != _DONE_ANYWAY.get(key.rpartition(".")[2])]
    # Keys under their own name come last and win, in evaluation jobs `evaluation.x` over `rollout.x`.
    order = sorted(set(settings) - set(UNUSED), key=lambda key: (key.startswith("evaluation."), canonical_key(key, job) == key))
    for given in order:
        key = canonical_key(given, job)
        value = _canonical_value(key, _rename_interpolations(settings[given], rename))
        other = given_as.get(key, given)
        one_yields = other in _OLDER_NAMES or (other.startswith("rollout.") and given.startswith("evaluation."))
        if key in result and result[key] != value and not one_yields:
            raise UserError(
                f"{given}: got {value!r}, but {other} says {result[key]!r}: they are one setting, give only one of them"
            )
        result[key], given_as[key] = value, given
    return result, unused


def check_data_types(layers: list[tuple[dict[str, Any], str]], job: str) -> None:
    """Raises UserError where one of flat layers (settings, where they are from) says by one name alone another data type than an
    earlier one by the other: it means what is evaluated or what is trained, and both are scored by one."""
    names = "dataset.data_type", "evaluation.data_type"
    said: dict[str, tuple[Any, str]] = {}
    for settings, where in layers if job != "eval" else []:
        for name, other in (names, names[::-1]):
            is_alone = name in settings and other not in settings
            if is_alone and other in said and settings[name] != said[other][0]:
                raise UserError(
                    f"{name}: got {settings[name]!r} {where}, but {other} is {said[other][0]!r} {said[other][1]}: training and "
                    "evaluation are scored by one data type, give both"
                )
        said |= {name: (settings[name], where) for name in names if name in settings}


def _canonical_value(key: str, value: Any) -> Any:
    if key in _LISTS and value is not None and not isinstance(value, list):
        return [value]
    if key == "training.mixed_precision" and value is False:
        return "no"  # YAML reads a bare no as false
    if key.endswith(".stop_token_list") and value is None:
        return []
    return value


def _renamer(job: str) -> Callable[[re.Match], str]:
    return lambda match: f"${{{canonical_key(match[1], job)}}}"


def _rename_interpolations(value: Any, rename: Callable[[re.Match], str]) -> Any:
    """`${rollout.max_gen_length}` follows its setting to the setting's name here."""
    if isinstance(value, str) and "${" in value:
        return re.sub(r"\$\{\s*([\w.]+)\s*\}", rename, value)
    if isinstance(value, list):
        return [_rename_interpolations(one, rename) for one in value]
    return value


def unused_in_sft(settings: dict[str, Any]) -> list[str]:
    """The settings among them by which the reference batches finetuning, where they say what training.batch_size does not.

    They count masked rows per process, and how many rows a document has depends on its masks: no number of documents is the same.
    """
    says_ours = "training.batch_size" in settings
    names = ["training.batch_size_lm", "training.gradient_accumulation_steps"]
    return [name for name in names if name in settings and not (says_ours and settings[name] == 1)]


def inherit_evaluation(settings: dict[str, Any]) -> dict[str, str]:
    """What evaluation does not say is as in rollout (in place). Returns {setting: the one that it came from}.

    num_response_per_task is not inherited: groups are for RL.
    """
    inherited = {}
    for name in sorted(_EVALUATION_FIELDS - {"num_response_per_task", "if_eval"}):
        ours, theirs = f"evaluation.{name}", f"rollout.{name}"
        if theirs in settings and ours not in settings:
            settings[ours], inherited[ours] = _canonical_value(ours, settings[theirs]), theirs
    return inherited

"""From the command line and a YAML file to a checked `Config`, without torch.

    config = load_config("rl", sys.argv[1:])      # config=configs/rl_trado.yaml training.eps=0.3

A mistake raises UserError with one line: the setting, what was got, what is meant.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import math
import os
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal, NoReturn, Sequence

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.errors import UserError, warn_once
from common.plugins import load_plugins
from common.registry import NO_IMAGES, closest, did_you_mean
from common.run_dir import CACHE
from configs.checks import check
from configs.help import help_text
from configs.no_use import ONLY_FINETUNING
from configs.reference import ALIASES, UNUSED, canonical, check_data_types, flatten, inherit_evaluation, unused_in_sft
from configs.schema import Config, get

Job = Literal["rl", "eval", "sft"]
ROOT = Path(__file__).resolve().parents[1]

REQUIRED: dict[str, dict[str, str]] = {
    job: {
        "experiment.project": "the run directory",
        "model.pretrained_model": "the path or hub name of the model",
        "model.model_base": "the model's family",
        **special,
    }
    for job, special in {
        "rl": {"dataset.train_dataset": "the tasks to learn from"},
        "eval": {"dataset.eval_dataset": "the tasks to evaluate on"},
        "sft": {"dataset.optimization_data": "the data to finetune on"},
    }.items()
}
"""What a job cannot do without, and what it is."""

IMAGES = (
    "model.vq_model_path model.image_resolution dataset.image_root dataset.add_think_prompt reward.answer_must_in_box "
    "reward.strict_len_check"
).split()
"""Settings of models that see images: accepted, and read by nothing."""


def load_config(job: Job, argv: Sequence[str] | None = None) -> Config:
    """The checked config of a job, all defaults resolved, plugins imported.

    `argv` (default: the command line) holds `config=FILE.yaml`, `section.key=value` overrides, `--print-config`, `--help`;
    the two options print and leave with exit code 0. Raises UserError.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        _print_and_leave(help_text(job))
    config = read_config(job, arguments)
    load_plugins(config)
    check(config, job)
    export_environment(config)
    if "--print-config" in arguments:
        _print_and_leave(to_yaml(config).rstrip())
    return config


def read_config(job: Job, arguments: Sequence[str]) -> Config:
    """The config of a job with its defaults resolved, its values unchecked and its plugins not imported. Raises UserError."""
    path, overrides = _parse_arguments(job, arguments)
    return merge(job, [(_read_yaml(path), f"in {path}"), (overrides, "on the command line")])


def with_default(job: Job, arguments: Sequence[str], key: str, value: str) -> list[str]:
    """`arguments`, and `key=value` behind them where neither they nor the file that they name say it. Raises UserError."""
    if {"--help", "-h"} & set(arguments):
        return list(arguments)
    is_given = file_settings(job, arguments).get(key) is not None
    return list(arguments) if is_given else [*arguments, f"{key}={value}"]


def file_settings(job: Job, arguments: Sequence[str]) -> dict[str, Any]:
    """The flat settings of the file and of the command line over it, as they stand there. Raises UserError."""
    path, overrides = _parse_arguments(job, arguments)
    layers = [canonical(flatten(tree), job)[0] for tree in (_read_yaml(path), overrides)]
    return {key: value for layer in layers for key, value in layer.items()}


def export_environment(config: Config) -> None:
    """`system` into the environment of this process and those that it starts, before a library is imported that reads it; and
    where compiled kernels are kept, unless the environment says so: in the run directory, so that only its first start compiles."""
    system = config.system
    cache = Path(config.experiment.project).absolute() / CACHE
    for name, folder in [("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")]:
        os.environ.setdefault(name, str(cache / folder))
    if system.HTTP_PROXY is not None:
        # Libraries differ in which of these they read, and where they read both the lower case one counts.
        os.environ.update(dict.fromkeys(["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"], system.HTTP_PROXY))
    if system.HF_HOME is not None:
        os.environ["HF_HOME"] = system.HF_HOME


def merge(job: Job, layers: list[tuple[dict[str, Any], str]]) -> Config:
    """Layers of raw settings (a nested or flat dict, and where it is from), later ones over earlier ones -> a resolved Config.

    Types, names and required settings are checked; values are not (configs/checks.py).
    """
    settings: dict[str, Any] = {}
    source: dict[str, str] = {}
    check_data_types([(flatten(tree), where) for tree, where in layers], job)
    for tree, where in layers:
        named, unused = canonical(flatten(tree), job)
        why = {key: UNUSED[key] for key in unused}
        why |= {key: NO_IMAGES for key in IMAGES if key in named and named[key] != get(Config(), key)}
        if why:
            reasons = {reason: ", ".join(key for key in why if why[key] == reason) for reason in dict.fromkeys(why.values())}
            listed = "; ".join(f"{keys} ({reason})" for reason, keys in reasons.items())
            warn_once(f"settings {where} that have no use here: {listed}")
        for key, value in named.items():
            if key in _sections() and value is None:
                continue  # a section with nothing in it
            _check_name(job, key, value, where)
            settings[key], source[key] = value, where
    if job == "sft" and "training.block_size" in settings and "rollout.block_size" not in settings:
        settings["rollout.block_size"], source["rollout.block_size"] = (
            settings["training.block_size"],
            source["training.block_size"],
        )
    for key, value in _method_defaults(settings.get("training.method")).items():
        if key not in settings:
            settings[key], source[key] = value, f"by training.method={settings['training.method']}"
    for key, of in inherit_evaluation(settings).items():
        source[key] = source[of]
    tree = copy.deepcopy(_defaults())
    for key, value in settings.items():
        _assign(tree, key, value, source[key])
    for key in settings:
        _resolve_interpolation(tree, key, source[key])
    config: Config = OmegaConf.to_object(tree)
    for key, meaning in REQUIRED[job].items():
        if get(config, key) is None:
            raise UserError(f"{key}: is missing, it is {meaning}: set it in {layers[0][1].removeprefix('in ')} or as {key}=...")
    resolve_defaults(config, job)
    unused = unused_in_sft(settings) if job == "sft" else []
    if unused:
        warn_once(
            f"settings that have no use in finetuning: {', '.join(unused)}: an optimizer step is "
            f"training.batch_size={config.training.batch_size} documents, over all processes"
        )
    return config


@functools.cache
def _defaults() -> Any:
    """The schema as OmegaConf has it: making it takes five times as long as copying it."""
    return OmegaConf.structured(Config)


def _method_defaults(name: Any) -> dict[str, Any]:
    """Settings that a training method stands for; a method that is unknown here (a plugin's) has none."""
    from train.methods import METHODS

    return METHODS.get(name).defaults if isinstance(name, str) and name in METHODS else {}


def resolve_defaults(config: Config, job: Job) -> None:
    """Fill in, in place, the null defaults that follow another setting."""
    training, params = config.training, config.optimizer.params
    for decoding in [config.rollout, config.evaluation]:
        if decoding.steps is None:
            decoding.steps = decoding.max_token
    if config.rollout.denoising_steps_per_block is None:
        config.rollout.denoising_steps_per_block = config.rollout.block_size
    if config.model.dtype == "auto":
        config.model.dtype = "bfloat16" if training.mixed_precision == "bf16" else "float32"
    if training.method is None:
        training.method = "semi-ar" if job == "sft" else "TraceRL"
    if training.block_size is None:
        training.block_size = config.rollout.block_size
    if training.max_gen_length is None:
        training.max_gen_length = config.rollout.max_token
    if training.eps_high is None:
        training.eps_high = training.eps
    if training.lora.alpha is None and (training.lora.rank or 0) > 0:
        training.lora.alpha = 2.0 * training.lora.rank
    if params.learning_rate is None:
        params.learning_rate = 1e-6 if params.policy_learning_rate is None else params.policy_learning_rate
    if params.policy_learning_rate is None:
        params.policy_learning_rate = params.learning_rate
    if params.value_learning_rate is None:
        params.value_learning_rate = params.learning_rate
    if config.lr_scheduler.params.learning_rate is None:
        config.lr_scheduler.params.learning_rate = params.policy_learning_rate


def _print_and_leave(text: str) -> NoReturn:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


# What is read ---------------------------------------------------------------------------------------------------------


def _parse_arguments(job: Job, arguments: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    path, overrides = None, {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if argument == "--print-config":
            continue
        elif argument.startswith("-") and argument.partition("=")[0].strip("-") == "config":
            raise UserError(f"{argument}: unknown option: the file is given as config=FILE.yaml, without dashes")
        elif argument.startswith("-") and key.strip("-") in {*setting_types(), *ALIASES}:
            raise UserError(f"{argument}: unknown option: settings are given without dashes, as {argument.lstrip('-')}")
        elif argument.startswith("-"):
            raise UserError(f"{argument}: unknown option{did_you_mean(argument, ['--print-config', '--help'])}")
        elif not equals or not key:
            raise UserError(f"{argument}: got no value: settings are given as section.key=value, the file as config=FILE.yaml")
        elif key == "config":
            path = text
        else:
            overrides[key] = _parse_value(key, text)
    if not path:
        raise UserError(f"config=FILE.yaml is missing: choose one of configs/, such as {_examples(job)}, or --help")
    for candidate in [Path(path), ROOT / path]:
        if candidate.is_file():
            return candidate if candidate == Path(path) else Path(os.path.relpath(candidate)), flatten(overrides)
    if Path(path).is_dir():
        raise UserError(f"config={path}: is a directory, expected a file, such as {_examples(job)}")
    raise UserError(f"config={path}: no such file; in configs/ there is {_examples(job, path)}, and more")


def _examples(job: Job, name: str = "") -> str:
    """A few of the shipped files for a job: those closest to `name`, else those that run anywhere."""
    pattern, tiny = {"rl": ("*rl_*.yaml", "rl_tiny"), "eval": ("*eval.yaml", "tiny_eval"), "sft": ("*sft_*.yaml", "sft_tiny")}[job]
    shipped = sorted(path.stem for path in (ROOT / "configs").glob(pattern))
    return ", ".join(f"configs/{one}.yaml" for one in closest(Path(name).stem, shipped, 3) or closest(tiny, shipped, 3))


def _parse_value(key: str, text: str) -> Any:
    """The text behind `key=` read as YAML: 1e-6 is a number, [a, b] a list, null nothing."""
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{key}: cannot read {text!r}: {_first_line(error)}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config={path}: cannot be read: {_first_line(error)}") from None
    try:
        tree = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', None) or _first_line(error)}") from None
    except OSError:  # OmegaConf's error for a file that holds a single value
        raise UserError(f"{path}: not a config: expected sections with settings, got {_first_line(text)!r}") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_first_line(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a config: expected sections with settings, got a {type(tree).__name__}")
    return tree


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [""])[0]


# Names and types ------------------------------------------------------------------------------------------------------


@functools.cache
def setting_types() -> dict[str, Any]:
    """{"training.eps": float, ...} for every setting of the schema."""
    return {key: hint for key, hint in _walk(Config, "") if not dataclasses.is_dataclass(hint)}


@functools.cache
def _sections() -> set[str]:
    return {key for key, hint in _walk(Config, "") if dataclasses.is_dataclass(hint)}


def _walk(section: type, prefix: str) -> list[tuple[str, Any]]:
    found = []
    for name, hint in typing.get_type_hints(section).items():
        found.append((prefix + name, hint))
        if dataclasses.is_dataclass(hint):
            found += _walk(hint, f"{prefix}{name}.")
    return found


def _check_name(job: Job, key: str, value: Any, where: str) -> None:
    if key in _sections():
        raise UserError(f"{key}: got {value!r} {where}, expected a section with settings")
    if key not in setting_types():
        raise UserError(f"{key}: unknown setting {where}{suggest(job, key)}")


USUAL_NAMES = {
    "lr": "optimizer.params.learning_rate",
    "batch_size": "training.batch_size",
    "epochs": "training.num_train_epochs",
    "num_epochs": "training.num_train_epochs",
    "warmup": "lr_scheduler.params.warmup_steps",
    "gpus": "experiment.num_processes",
    "num_gpus": "experiment.num_processes",
    "output_dir": "experiment.project",
    "max_new_tokens": "rollout.max_token",
    "max_tokens": "rollout.max_token",
    "num_generations": "rollout.num_response_per_task",
    "kl_coef": "training.beta",
    "model_path": "model.pretrained_model",
    "resume": "experiment.start_from_scratch",
}
"""What settings are called elsewhere: only suggested."""
USUAL_IN = {
    "rl": {"batch_size": "rollout.num_task_per_step", "max_steps": "experiment.total_step"},
    "eval": {"batch_size": "evaluation.max_active"},
}
"""Likewise, where a job does not mean by it what others do."""


def suggest(job: Job, key: str) -> str:
    """` (did you mean training.eps?)`: the same name in another section, else what it is usually called elsewhere, else a similar
    name in this section or below it, else anywhere. Nothing that the job has no use for."""
    unused = ONLY_FINETUNING.split() if job == "rl" else []
    known = [one for one in [*setting_types(), *(alias for alias in ALIASES if "." in alias)] if one not in unused]
    for other in known:
        if other.replace("_", ".") == key.replace("_", "."):  # training.lora_rank
            return f" (did you mean {other}?)"
    section, _, name = key.rpartition(".")
    if name in USUAL_IN.get(job, {}):
        return f" (did you mean {USUAL_IN[job][name]}?)"
    same_name = [other for other in known if other.rpartition(".")[2] == name]
    if same_name:
        return did_you_mean(key, same_name) or f" (did you mean {same_name[0]}?)"
    if name in USUAL_NAMES:
        usual = USUAL_NAMES[name]
        beside = f"{section}.{usual.rpartition('.')[2]}"
        return f" (did you mean {beside if beside in known else usual}?)"
    for inside in ([o for o in known if o.rpartition(".")[0] == section], [o for o in known if o.startswith(f"{section}.")]):
        by_name = {other.rpartition(".")[2]: other for other in reversed(inside)}
        close = closest(name, list(by_name), 1)
        if close:
            return f" (did you mean {by_name[close[0]]}?)"
    return did_you_mean(key, known)


def _assign(tree: Any, key: str, value: Any, where: str) -> None:
    """Set one setting, converted to its type; UserError where it does not fit."""
    hint = setting_types()[key]
    got = f"{key}: got {'null' if value is None else repr(value)} {where}, expected {describe(hint)}"
    if value == "???":
        raise UserError(f"{key}: is still ??? {where}: it has to be given, {describe(hint)}")
    base = _without_null(hint)
    if base is int and isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)  # 1e4
    if base is bool and isinstance(value, (int, float)) and value not in (0, 1):
        raise UserError(got)
    if base is float and value is not None and isinstance(value, (int, float)) and not math.isfinite(value):
        raise UserError(f"{got} that is finite")
    if typing.get_origin(base) is Literal and True in typing.get_args(base):  # as of a bool
        value = {"true": True, "false": False, "1": True, "0": False}.get(str(value).lower(), value)
    try:
        OmegaConf.update(tree, key, value)
    except OmegaConfBaseException:
        alternatives = [str(choice) for choice in typing.get_args(base)] if typing.get_origin(base) is Literal else []
        raise UserError(got + did_you_mean(str(value), alternatives)) from None


def _resolve_interpolation(tree: Any, key: str, where: str) -> None:
    """UserError where a `${...}` leads nowhere, or to a value of another type."""
    try:
        node = OmegaConf.select(tree, key)
        if OmegaConf.is_config(node):
            OmegaConf.to_container(node, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        reason = "it refers to itself" if isinstance(error, RecursionError) else _first_line(error)
        raise UserError(f"{key}: {reason} ({where}; expected {describe(setting_types()[key])})") from None


def _without_null(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(one for one in typing.get_args(hint) if one is not type(None))
    return hint


def describe(hint: Any) -> str:
    """What a type means, in words."""
    base = _without_null(hint)
    if typing.get_origin(base) is Literal:
        words = "one of " + ", ".join(str(choice) for choice in typing.get_args(base))
        words = words.replace("True, False", "true, false")
    elif typing.get_origin(base) is list:
        items = {str: "texts", int: "whole numbers", float: "numbers"}
        words = f"a list of {items[typing.get_args(base)[0]]}"
    else:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[base]
    return words if base is hint else f"{words}, or null"


# What is written ------------------------------------------------------------------------------------------------------


def to_yaml(config: Config) -> str:
    """The resolved config as YAML; loads again to an equal Config."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))

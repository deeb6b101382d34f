"""What the machines of a job must have in common, and which of them has something else: known before anything starts."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.launch import visible_gpus
from common.plugins import find_file

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("common", "configs", "data", "models", "reward", "sample", "train")
"""Whose .py files run in a job, beside those at the root."""
PACKAGES = ("torch", "accelerate", "deepspeed", "transformers", "safetensors", "numpy", "triton")
"""Whose versions must be the same: they hold what goes between the machines, or what is computed with it."""
DATA = ("train_dataset", "eval_dataset", "optimization_data", "validation_data")


def machine_report(job: str, config: Any, num_processes: int) -> dict[str, Any]:
    """What machine 0 compares, as JSON. Raises UserError where this machine lacks a model that the job reads."""
    from configs.load import to_yaml
    from models.names import models_read

    return {
        "code": code_digests(config),
        "packages": {"Python": platform.python_version().rpartition(".")[0], **{name: version_of(name) for name in PACKAGES}},
        "config": to_yaml(config),
        "processes": num_processes,
        "gpus": visible_gpus(),
        "models": {f"model.{key}": model_digest(name, f"model.{key}") for key, name in models_read(job, config).items()},
        "data": {f"dataset.{key}": data_digest(getattr(config.dataset, key)) for key in DATA},
    }


def difference(report: dict[str, Any], own: dict[str, Any], config: Any) -> str | None:
    """What is wrong with a machine's report beside machine 0's `own`, to be read behind its name; None: nothing."""
    from configs.difference import config_difference

    for name, digest in own["code"].items():
        if report["code"].get(name) != digest:
            return f"has another version of the code: {name} {'differs' if name in report['code'] else 'is not there'}"
    for name in report["code"]:
        if name not in own["code"]:
            return f"has another version of the code: {name} is not on machine 0"
    for name, version in own["packages"].items():
        if report["packages"].get(name) != version:
            return f"has {name} {report['packages'].get(name)}, machine 0 has {version}: install the same there"
    settings = config_difference(report["config"], config)
    if settings:
        return f"reads other settings: {settings[0]}, on machine 0: give the same command on every machine"
    if report["processes"] != own["processes"]:
        return (
            f"starts {report['processes']} processes (it has {report['gpus']} GPUs), machine 0 starts {own['processes']} (it has "
            f"{own['gpus']}): set experiment.num_processes to what all of them have"
        )
    for kind in ("models", "data"):
        for key, digest in own[kind].items():
            if report[kind].get(key) != digest:
                section, _, name = key.partition(".")
                return f"has another {key}, {getattr(getattr(config, section), name)}, than machine 0: bring the same files there"
    return None


def code_digests(config: Any) -> dict[str, str]:
    """Of every source file of the repository that a job may run, and of the user's own that the config names."""
    files = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    files += (ROOT / "accelerate_configs").glob("*.yaml")
    named = {path.relative_to(ROOT).as_posix(): path for path in sorted(files)}
    own = [*config.experiment.plugins, (config.reward.function or "").rpartition(":")[0]]
    named |= {name: find_file(name, "experiment.plugins, reward.function") for name in own if name.endswith(".py")}
    return {name: digest(path.read_bytes()) for name, path in named.items()}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def model_digest(name: str, setting: str) -> str:
    """Of a directory its config.json and the sizes of its files; "" where there is nothing to compare (a name of the hub whose
    files are not here yet). Raises UserError where the model is neither here nor to be had."""
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        sizes = "".join(f"{file.name} {file.stat().st_size}\n" for file in files)
        config = path / "config.json"
        return digest(sizes.encode() + (config.read_bytes() if config.is_file() else b""))
    if name.count("/") == 1 and not name.startswith(("/", ".", "~")) and not path.exists():
        offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
        if offline and not is_cached(name):
            raise UserError(f"{setting}: {name} is not in this machine's cache of the hub, and HF_HUB_OFFLINE is set")
        return ""
    if "/" not in name and not path.exists():
        return ""  # a name of our own (tiny-random); what is none is said when it is read
    raise UserError(f"{setting}: no directory {name} on this machine: bring the model there, under the same path")


def is_cached(name: str) -> bool:
    """Whether the hub's cache has some snapshot of the model."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return any(Path(HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots").glob("*/config.json"))


def data_digest(name: str | None) -> str:
    """Of a data set's file; "" where there is none: what a job needs it has read by now."""
    from data.tasks import find_file

    if name is None:
        return ""
    try:
        return digest(find_file(name).read_bytes())
    except UserError:
        return ""

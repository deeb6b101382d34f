"""The files of accelerate_configs/, read without importing torch, accelerate or DeepSpeed.

They have the format of `accelerate launch --config_file`, so that one file serves both ways of starting a job: by accelerate's
launcher, or by `experiment.deepspeed_file` and our own (common/launch.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.registry import closest

if TYPE_CHECKING:
    from configs.schema import Config

FOLDER = Path(__file__).resolve().parents[1] / "accelerate_configs"
ZERO_STAGES = (1, 2, 3)
OFFLOAD_DEVICES = ("none", "cpu")


@dataclass(frozen=True)
class Sharding:
    """What DeepSpeed cuts up between the processes, and what it keeps on the host."""

    zero_stage: int
    """0: no DeepSpeed."""
    offload_optimizer: str
    """Where the optimizer states live: none (the GPU) or cpu."""
    offload_param: str
    """Where ZeRO-3 keeps the weights: none (the GPU) or cpu."""


@dataclass(frozen=True)
class DeepSpeedFile(Sharding):
    """What one file asks for. Precision, clipping and accumulation are the config's to say, so they are not read."""

    path: Path
    num_processes: int | None
    """Processes over all machines, as `accelerate launch` counts them; None: the file does not say."""
    num_machines: int


def sharding_asked_for(config: Config, has_bfloat16_weights: bool) -> Sharding:
    """By `experiment.deepspeed_file`, else ZeRO-1 for bfloat16 weights. Under `accelerate launch` its file wins (common.dist)."""
    if config.experiment.deepspeed_file is not None:
        return read_deepspeed_file(config.experiment.deepspeed_file)
    return Sharding(1 if has_bfloat16_weights else 0, "none", "none")


def deepspeed_file_names() -> list[str]:
    """What `experiment.deepspeed_file` may be: the DeepSpeed files of accelerate_configs/, without .yaml."""
    return sorted(path.stem for path in FOLDER.glob("*deepspeed*.yaml"))


def read_deepspeed_file(name: str) -> DeepSpeedFile:
    """The file called `name` in accelerate_configs/ (with or without .yaml), or at the path `name`.

    Raises UserError where it does not exist (with the closest that do), is not an accelerate file with a ZeRO stage of 1 to 3, or
    asks for what there is not.
    """
    import yaml

    candidates = [FOLDER / f"{name}.yaml", FOLDER / name, Path(name)]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        names = deepspeed_file_names()
        close = ", ".join(closest(name, names, 4) or closest("zero3", names, 4))
        raise UserError(
            f"experiment.deepspeed_file: no file {name!r} in accelerate_configs/, where there is {close}, and more: "
            "NUMBER_node_NUMBER_gpus_deepspeed_zeroSTAGE"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"experiment.deepspeed_file: {path} is not YAML: {' '.join(str(error).split())}") from error
    settings = content.get("deepspeed_config") if isinstance(content, dict) else None
    if not isinstance(settings, dict) or settings.get("zero_stage") not in ZERO_STAGES:
        raise UserError(
            f"experiment.deepspeed_file: {path} has no deepspeed_config with zero_stage 1, 2 or 3; "
            "see accelerate_configs/ for examples"
        )
    return DeepSpeedFile(
        path=path,
        num_processes=_count(path, content, "num_processes"),
        num_machines=_count(path, content, "num_machines") or 1,
        zero_stage=settings["zero_stage"],
        offload_optimizer=_device(path, settings, "offload_optimizer_device"),
        offload_param=_device(path, settings, "offload_param_device"),
    )


def _count(path: Path, content: dict[str, Any], key: str) -> int | None:
    value = content.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise UserError(f"experiment.deepspeed_file: {path}: {key}: got {value!r}, must be a whole number of at least 1")
    return value


def _device(path: Path, settings: dict[str, Any], key: str) -> str:
    value = settings.get(key) or "none"
    if value not in OFFLOAD_DEVICES:
        what = "is not supported: what is offloaded goes to the host's memory" if value == "nvme" else "is no place"
        raise UserError(f"experiment.deepspeed_file: {path}: {key}: got {value!r}, which {what}: set it to none or cpu")
    return value

"""How much memory of a GPU a training job will take, said before it takes any.

    python -m train.memory_estimate config=configs/rl_sdar.yaml gpus=8 gpu_gib=139 [job=sft] [model=config.json]

Every training job prints the same table at its start on a GPU, and does not start where it cannot fit (train/run.py). It shows
sampling beside the fullest moment of the update; the arithmetic is train/memory_items.py's. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any, Iterator

from common.deepspeed_files import Sharding, sharding_asked_for
from common.errors import UserError, entry_point, warn
from models.family import DecoderConfig
from models.lora_targets import LINEAR_WEIGHTS
from models.row_length import whole_tiles
from train.memory_items import (
    GIB,
    MARGIN,
    choose_offloaded,
    choose_recomputed,
    estimate,
    outside,
    total_bytes,
    update_bytes,
)
from train.memory_setup import Setup, adapted_weights, adapter_parameters

HELP = """How much memory of a GPU a training job will take, item by item; no GPU is needed.

  python -m train.memory_estimate config=configs/rl_sdar.yaml gpus=8 gpu_gib=139 [section.key=value ...]

  config=FILE        the job's settings; section.key=value overrides them, as for the job (python rl.py --help lists all)
  gpus=1             GPUs of the job, all machines together
  gpu_gib=80         memory of one of them, GiB
  job=rl             rl, or sft for finetuning
  model=PATH         the model's config.json, where model.pretrained_model is not here (of a hub model that file is fetched)

Exit code 2 where it cannot fit, with the changes that would do (docs/scaling.md)."""

TOLERANCE = 0.1
"""What is more than so much over a GPU's memory is refused: measured peaks are within it (tests/train/test_memory_estimate.py)."""


# ------------------------------------------------------------------------------------------------- what is said about it


def table(s: Setup, gpu_bytes: float) -> str:
    """A short table: GiB per GPU while sampling and in the update."""
    items = estimate(s)
    parallel = f"ZeRO-{s.zero}" if s.zero else "no DeepSpeed"
    where = f"{s.gpus} GPUs, {parallel}" if s.gpus > 1 else f"one GPU, {parallel}"
    rows = [(item.name, item.rollout, item.update) for item in items]
    rows.append(("CUDA" + (" and NCCL" if s.gpus > 1 else ""), outside(s), outside(s)))
    rows.append((f"of {gpu_bytes / GIB:.1f}", sum(r[1] for r in rows), sum(r[2] for r in rows)))
    lines = [f"{'memory estimate, GiB per GPU (' + where + ')':<58}" + (f"{'sampling':>9}" if s.samples else "") + f"{'update':>9}"]
    for name, rollout, update in rows:
        lines.append(f"  {name:<56}" + (f"{rollout / GIB:>9.1f}" if s.samples else "") + f"{update / GIB:>9.1f}")
    return "\n".join(lines)


def choice(s: Setup, gpu_bytes: float) -> str:
    """What `training.gradient_checkpointing_enable=auto` has chosen, and why."""
    fits = update_bytes(s) <= MARGIN * gpu_bytes
    why = "the fewest with which the update stays within" if fits else "and still the update takes more than"
    chosen = f"layers recomputed in the backward (auto): {s.num_recomputed} of {s.shape.num_layers}"
    return f"{chosen}, {why} {MARGIN:.0%} of the GPU's {gpu_bytes / GIB:.1f} GiB"


def alternatives(s: Setup) -> Iterator[tuple[str, Setup]]:
    """(what to set, the setup then), from the smallest change on."""
    if s.num_recomputed < s.shape.num_layers:
        yield "training.gradient_checkpointing_enable=true", dataclasses.replace(s, recomputed_layers=None)
    if not s.fused:
        yield "training.fused_kernels=true", dataclasses.replace(s, fused=True)
    for budget in (8192, 4096, 2048):
        tokens = whole_tiles(max(budget, s.longest))  # as in setup_of
        if tokens < s.tokens:
            fewer = dataclasses.replace(s, tokens=tokens, predictions=min(s.predictions, tokens // 2))
            yield f"training.max_tokens_per_microbatch={budget}", fewer
    if s.value is not None and not s.value_offloaded_in_rollout:
        yield "model.value_offload=always", dataclasses.replace(s, value_offloaded_in_rollout=True)
    if s.samples and not s.optimizer_offloaded_in_rollout:
        without = dataclasses.replace(s, optimizer_offloaded_in_rollout=True, reference_offloaded_in_rollout=s.has_reference)
        yield "training.offload_optimizer=always", without
    if s.gpus > 1:
        for stage in range(s.zero + 1, 4):
            yield f"ZeRO-{stage} (experiment.deepspeed_file)", dataclasses.replace(s, zero=stage, offload_weights=False)
    if s.has_reference:
        yield "training.beta=0, so without a reference", dataclasses.replace(s, has_reference=False)
    if not s.offload_optimizer:
        yield "ZeRO-2 with the optimizer on the host", dataclasses.replace(s, zero=2, offload_optimizer=True, offload_weights=False)
    if not s.adapter:
        c = s.shape
        # Of every linear layer, rank 32: as adapter_parameters of all-linear counts them.
        outs = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim + c.hidden_size + 2 * c.intermediate_size + c.hidden_size
        ins = 3 * c.hidden_size + c.num_heads * c.head_dim + 2 * c.hidden_size + c.intermediate_size
        yield "training.lora.rank=32", dataclasses.replace(s, adapter=32 * c.num_layers * (outs + ins), adapted=LINEAR_WEIGHTS)
    for gpus, stage in itertools.product((2, 4, 8, 16, 32, 64), (2, 3)):
        if gpus > s.gpus:
            yield f"{gpus} GPUs with ZeRO-{stage}", dataclasses.replace(s, gpus=gpus, zero=stage)


def check_fits(s: Setup, gpu_bytes: float) -> None:
    """Raises UserError where the job cannot fit; warns where it is close."""
    needed = total_bytes(s)
    if needed * (1 - TOLERANCE) <= gpu_bytes:
        if needed > gpu_bytes * 0.97:
            warn(f"memory: the estimate is {needed / GIB:.0f} of the GPU's {gpu_bytes / GIB:.0f} GiB: it may not be enough")
        return
    largest = sorted(estimate(s), key=lambda i: -max(i.rollout, i.update))[:3]
    named = ", ".join(f"{i.name} {max(i.rollout, i.update) / GIB:.0f}" for i in largest)
    fitting = [f"{what} ({total_bytes(other) / GIB:.0f} GiB)" for what, other in alternatives(s) if total_bytes(other) <= gpu_bytes]
    advice = "; ".join(fitting[:4]) or "a smaller model, or LoRA on more GPUs: no single change is enough"
    raise UserError(
        f"memory: about {needed / GIB:.0f} GiB are needed on every GPU, which has {gpu_bytes / GIB:.0f}; the largest are {named}. "
        f"What fits: {advice}. experiment.check_memory=false starts all the same"
    )


# --------------------------------------------------------------------------------------------------------- from a config


def setup_of(
    config: Any,
    job: str,
    family: Any,
    shape: DecoderConfig,
    gpus: int,
    gpu_bytes: float,
    value: DecoderConfig | None = None,
    sharding: Sharding | None = None,
) -> Setup:
    """The setup of a job ("rl" or "sft") whose model has that family and shape, on GPUs of that size.

    value: the value model's shape, if it has one. sharding: as it is (under `accelerate launch` the config does not say); None: as
    the config has it.
    """
    t, r = config.training, config.rollout
    bf16 = config.model.dtype == "bfloat16" or (config.model.dtype == "auto" and t.mixed_precision == "bf16")
    sharding = sharding_asked_for(config, bf16) if sharding is None else sharding
    # Never cut: a slice with the clean text before it, a canvas, the text of `ar`. Tiles hold the fill of a last block.
    longest = t.max_prompt_len + t.max_gen_length
    budget = max(t.max_tokens_per_microbatch, longest)
    evaluates = config.evaluation.if_eval and config.dataset.eval_dataset is not None
    sampled = [*([r] if job == "rl" else []), *(config.evaluation.variants() if evaluates else [])]
    s = Setup(
        shape=shape,
        itemsize=2 if bf16 else 4,
        gpus=gpus,
        zero=sharding.zero_stage,
        offload_optimizer=sharding.offload_optimizer != "none",
        offload_weights=sharding.offload_param != "none",
        reduces_in_float32=t.reduce_in_float32,
        adapter=adapter_parameters(family, shape, t.lora.rank, t.lora.target_modules) if t.lora.rank else 0,
        adapted=adapted_weights(family, t.lora.target_modules) if t.lora.rank else (),
        drops=bool(t.lora.dropout),
        moments=2 if config.optimizer.name == "adamw" else 0,
        tokens=whole_tiles(budget),
        longest=longest,
        predictions=budget // 2,
        head_chunk=t.head_chunk,
        recomputed_layers=None if t.gradient_checkpointing_enable else 0,
        fused=t.fused_kernels,
        value=value,
        value_offloaded_in_rollout=config.model.value_offload == "always",
        optimizer_offloaded_in_rollout=t.offload_optimizer == "always",
        reference_offloaded_in_rollout=t.offload_optimizer == "always",
        has_reference=job == "rl" and t.kl_to == "reference" and bool(t.beta),
        samples=bool(sampled),
        attention=family.attention,
        prompt=t.max_prompt_len,
        response=max((decoding.max_token for decoding in sampled), default=0),
        block_size=max((decoding.block_size for decoding in sampled), default=1),
        max_active=min(r.max_active, -(-r.num_task_per_step * r.num_response_per_task // gpus))
        if job == "rl"
        else config.evaluation.max_active,
        caches=any(decoding.cache_kind != "none" for decoding in sampled),
    )
    may_offload_value = value is not None and config.model.value_offload == "auto"
    s = choose_offloaded(s, gpu_bytes, may_offload_value, t.offload_optimizer == "auto")
    return choose_recomputed(s, gpu_bytes) if t.gradient_checkpointing_enable == "auto" else s


def read_shape(name: str, family: Any, config_json: str | None = None) -> DecoderConfig:
    """The shape that the config.json of a checkpoint says (a directory or hub name; an adapter's is its base's); of a hub model
    that file alone is fetched. Raises UserError."""
    from models.config_json import decoder_shape, read_object

    if config_json is not None:
        path = Path(config_json)
    elif Path(name).is_dir():
        adapter = Path(name) / "adapter_config.json"
        if adapter.is_file():
            base = read_object(adapter).get("base_model_name_or_path")
            if not isinstance(base, str):
                raise UserError(f"{adapter}: base_model_name_or_path is {base!r}, must name a model: add it")
            return read_shape(base, family)
        path = Path(name) / "config.json"
    else:
        path = _fetch_config_json(name)
    return decoder_shape(family, read_object(path, "give the config.json of a model"), str(path))


def _fetch_config_json(name: str) -> Path:
    """Of a hub model: from the hub, else from its cache. UserError where neither has it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"))  # asks once, where a download would try again for half a minute
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # the hub raises a dozen kinds: all mean that it is not to be had
        try:
            return Path(hf_hub_download(name, "config.json", local_files_only=True))
        except Exception:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{name}: no config.json to be had ({reason}): give one as model=path/to/config.json") from error


@entry_point
def main(argv: list[str] | None = None) -> None:
    from configs.load import load_config
    from models.family import TINY_RANDOM
    from models.registry import FAMILIES

    argv = sys.argv[1:] if argv is None else argv
    if {"--help", "-h"} & set(argv):
        print(HELP)
        return
    own = {"gpus": "1", "gpu_gib": "80", "job": "rl", "model": None}
    rest = []
    for argument in argv:
        key, equals, value = argument.partition("=")
        if key in own and equals:
            own[key] = value
        else:
            rest.append(argument)
    try:
        gpus, gpu_gib = int(own["gpus"]), float(own["gpu_gib"])
    except ValueError as error:
        raise UserError(f"gpus={own['gpus']} gpu_gib={own['gpu_gib']}: numbers are meant") from error
    if own["job"] not in ("rl", "sft") or gpus < 1 or gpu_gib <= 0:
        raise UserError("job= is rl or sft, gpus= at least 1, gpu_gib= above 0")
    config = load_config(own["job"], rest)
    family = FAMILIES.get(config.model.model_base, "model.model_base")
    if TINY_RANDOM in (config.model.pretrained_model, config.model.value_base_model) and own["model"] is None:
        raise UserError(
            f"model.pretrained_model: {TINY_RANDOM} fits anywhere: name a checkpoint, or give model=path/to/config.json"
        )
    shape = read_shape(config.model.pretrained_model, family, own["model"])
    critic = config.model.value_base_model
    value = read_shape(critic, family, own["model"]) if critic is not None else None
    s = setup_of(config, own["job"], family, shape, gpus, gpu_gib * GIB, value)
    print(table(s, gpu_gib * GIB), flush=True)
    if config.training.gradient_checkpointing_enable == "auto":
        print(choice(s, gpu_gib * GIB), flush=True)
    check_fits(s, gpu_gib * GIB)


if __name__ == "__main__":
    main()

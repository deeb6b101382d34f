"""sdar/<variant>: logits under given masks, and block-wise generation token by token, step by step.

One set per file: `forward_*.safetensors` (largest difference of a logit) and `generation.json` (cases that differ; all must be
equal: tokens, step maps, number of forwards). The reference's separate forwards that store a finished block are not counted: the
engine commits blocks along with the next one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import models.registry  # noqa: F401
from common.records import Rollout
from models.attention import masked_attention
from models.checkpoint import Pretrained, load_pretrained
from sample.engine import Request, SamplingSettings, build_engine
from sample.registry import UNMASKING
from tests.golden.result import SetResult

LOGITS = 1e-4
"""Absolute, as the golden README suggests."""
GREEDY = {"argmax": True, "multinomial_topk1": False}
"""By `token_choice`."""


def check(folder: Path, engine: str = "auto") -> list[SetResult]:
    """All sets of the golden folder's sdar/ directory, whatever variants it holds. engine: `rollout.engine`."""
    results = []
    for config in sorted(folder.rglob("config.json")):
        variant = config.parent
        path = str(variant.relative_to(folder.parent))
        model = load_pretrained(str(variant), "sdar", torch.float32, "cpu")
        for file in sorted(variant.glob("forward*.safetensors")):
            results.append(check_forward(model, load_file(file), f"{path}/{file.stem}"))
        for file in sorted(variant.glob("generation*.json")):
            results.append(check_generation(model, json.loads(file.read_text())["cases"], f"{path}/{file.stem}", engine))
    return results


@torch.no_grad()
def check_forward(model: Pretrained, tensors: dict[str, torch.Tensor], path: str) -> SetResult:
    decoder, error = model.decoder, 0.0
    rows = [tensors[name] for name in ["input_ids", "position_ids", "attention_mask", "logits"]]
    for ids, positions, mask, expected in zip(*rows):
        logits = decoder.lm_head(decoder(ids, positions, masked_attention(mask[0].bool())))
        error = max(error, float((logits - expected).abs().max()))
    return SetResult(path, "PASS" if error <= LOGITS else "FAIL", len(rows[0]), error, LOGITS)


def settings_of(case: dict[str, Any]) -> SamplingSettings:
    """The case's settings under our names. The golden runs let the model sample any id and order by filtered confidence."""
    return SamplingSettings(
        max_tokens=case["gen_length"],
        mask_id=case["mask_id"],
        stop_ids=tuple(case.get("stop_ids") or ()),
        forbidden_ids=(),
        block_size=case["block_length"],
        steps_per_block=case["denoising_steps"],
        strategy=case["strategy"],
        threshold=case["threshold"],
        confidence="filtered",
        temperature=case["temperature"],
        top_k=case["top_k"],
        top_p=case["top_p"],
        greedy=GREEDY[case["token_choice"]],
    )


def difference(case: dict[str, Any], rollout: Rollout) -> str | None:
    """What differs, or None. Blocks behind the one that stopped are all masks in the golden tokens."""
    length, prompt = len(case["tokens"]), case["prompt"]
    behind = length - len(prompt) - len(rollout.response_ids)
    ours = {
        "tokens": prompt + rollout.response_ids + [case["mask_id"]] * behind,
        "step_map": rollout.step_map + [0] * behind,
        "num_denoising_forwards": rollout.num_forwards,
        "tokens_per_forward": [rollout.step_map.count(n + 1) for n in range(rollout.num_forwards)],
    }
    for name, value in ours.items():
        if name in case and case[name] != value:
            return f"{name} {value} should be {case[name]}"
    return None


def check_generation(model: Pretrained, cases: list[dict[str, Any]], path: str, engine: str = "auto") -> SetResult:
    """Cases of equal settings go through the engine together, few at a time, so that slots are refilled."""
    unknown = {c["strategy"] for c in cases} - set(UNMASKING) | {c["token_choice"] for c in cases} - set(GREEDY)
    if unknown:
        return SetResult(path, "UNSUPPORTED", len(cases), 0.0, 0.0, [f"unknown: {', '.join(sorted(unknown))}"])
    built = build_engine(model.decoder, model.family, max_active=3, engine=engine)
    groups: dict[SamplingSettings, list[dict[str, Any]]] = {}
    for case in cases:
        groups.setdefault(settings_of(case), []).append(case)
    notes = []
    for settings, group in groups.items():
        rollouts = built.generate([Request(case["name"], case["prompt"]) for case in group], settings)
        found = [(case["name"], difference(case, rollout)) for case, rollout in zip(group, rollouts)]
        notes += [f"{name}: {what}" for name, what in found if what]
    return SetResult(path, "FAIL" if notes else "PASS", len(cases), float(len(notes)), 0.0, notes)

"""What llada/, dream/ and mmada/ have in common: forwards under full attention, and generation on a canvas.

Step maps of these sets count from 0 and have gaps (forwards that revealed nothing, or waited for another row of their batch): they
are compared after dense ranking within a row. Forwards: ours at most the reference's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import models.registry  # noqa: F401
from common.records import Rollout
from models.attention import masked_attention
from models.checkpoint import Pretrained, load_pretrained
from models.decoder import Attend
from sample.canvas_cache import Item, canvas_attention, group_items
from sample.engine import Request, SamplingSettings, build_engine
from sample.kv_cache import KVCache
from sample.registry import TARGETS
from sample.sampling import Distribution
from tests.golden.result import SetResult

LOGITS = 1e-4
"""Absolute, as the golden README suggests."""
PLUS_ENTROPY = "golden_plus_entropy"
"""The reference's neg_entropy of LLaDA: it leaves the sign out, and so reveals the most uncertain first."""


@TARGETS.register(PLUS_ENTROPY)
def plus_entropy(d: Distribution) -> Tensor:
    return d.entropy


def load(folder: Path, family: str) -> Pretrained:
    return load_pretrained(str(folder / "model"), family, torch.float32)


def full_attention(length: int) -> Attend:
    return masked_attention(torch.ones(length, length, dtype=torch.bool))


@torch.no_grad()
def logits(model: Pretrained, ids: Tensor, attend: Attend, start: int = 0) -> Tensor:
    """Raw logits [T, V] of ids [T] at positions from `start` on."""
    return model.decoder.lm_head(model.decoder(ids, torch.arange(start, start + len(ids)), attend))


def result(path: str, errors: list[float], notes: list[str] | None = None) -> SetResult:
    """Of forwards whose logits differ by `errors` at most."""
    worst = max(errors)
    return SetResult(path, "PASS" if worst <= LOGITS else "FAIL", len(errors), worst, LOGITS, notes or [])


def check_forward(model: Pretrained, tensors: dict[str, Tensor], path: str) -> SetResult:
    """`input_ids` [2, T] -> `logits`, at all positions or at `positions`."""
    errors = []
    for ids, expected in zip(tensors["input_ids"], tensors["logits"]):
        found = logits(model, ids, full_attention(len(ids)))
        found = found[tensors["positions"]] if "positions" in tensors else found
        errors.append(float((found - expected).abs().max()))
    return result(path, errors)


def stored_attention(item: Item, cache: KVCache) -> Attend:
    """Of a forward over one item."""
    entries = torch.arange(item.start, item.start + item.rows)
    read = canvas_attention(group_items([item], entries.device), cache)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.write(layer, entries, k, v)
        return read(layer, q, k, v)

    return attend


def check_prefix_cache(model: Pretrained, tensors: dict[str, Tensor], path: str) -> SetResult:
    """A refresh over `input_ids_full`, then a window of `input_ids_second` from `cut` on, to the end or to `window_end`: the
    engine's own items and cache."""
    cut, window_end = int(tensors["cut"]), int(tensors["window_end"])
    length = tensors["input_ids_full"].shape[1]
    errors = []
    for n, (full, second) in enumerate(zip(tensors["input_ids_full"], tensors["input_ids_second"])):
        for name, stop in [("logits_tail", length), ("logits_window", window_end)]:
            cache = KVCache(model.decoder.config, 1, length, torch.float32, torch.device("cpu"))
            logits(model, full, stored_attention(Item(0, 0, length, length, True), cache))
            found = logits(model, second[cut:stop], stored_attention(Item(0, cut, stop - cut, stop, False), cache), cut)
            errors.append(float((found - tensors[name][n]).abs().max()))
    return result(path, errors)


def settings_of(case: dict[str, Any], **changes: Any) -> SamplingSettings:
    """The case's settings under our names. The golden runs let the model sample any id and rank by filtered confidence."""
    threshold = case["unmask_threshold"]
    settings = dict(
        max_tokens=case["gen_length"],
        mask_id=case["mask_id"],
        block_size=case["block_length"],
        steps=case["steps"],
        strategy="low_confidence_static" if threshold is None else "low_confidence_dynamic",
        threshold=0.0 if threshold is None else threshold,
        target=case["target"],
        cache="prefix" if case["use_cache"] else "none",
        further_horizon=case["further_horizon"],
        temperature=0.0,
        confidence="filtered",
        top_p=case.get("top_p") or 1.0,
        top_k=case.get("top_k") or 0,
        pad_id=case.get("pad_id"),
        pad_target_penalty=case.get("pad_target_penalty") or 1.0,
    )
    return SamplingSettings(**{**settings, **changes})


def dense(steps: list[int]) -> list[int]:
    """Ranks of the distinct numbers."""
    order = {step: rank for rank, step in enumerate(sorted(set(steps)))}
    return [order[step] for step in steps]


def difference(case: dict[str, Any], row: int, rollout: Rollout) -> str | None:
    """What differs in a row of a case, or None."""
    length = len(case["prompt"][row])
    expected = case["tokens"][row][length:]
    if rollout.response_ids != expected:
        return f"row {row}: tokens {rollout.response_ids} should be {expected}"
    if dense(rollout.step_map) != dense(case["step_map"][row]):
        return f"row {row}: step_map {dense(rollout.step_map)} should be {dense(case['step_map'][row])}"
    if rollout.num_forwards > case["nfe"]:
        return f"row {row}: {rollout.num_forwards} forwards, the reference needs {case['nfe']}"
    return None


def check_generation(
    model: Pretrained, cases: list[dict[str, Any]], path: str, prompts: list[list[list[int]]], notes: list[str], engine: str
) -> SetResult:
    """prompts: by case and row, as the engine gets them; engine: `rollout.engine`.

    Cases of equal settings go through the engine together, few at a time, so that slots are refilled and canvases of different
    lengths stand beside one another.
    """
    built = build_engine(model.decoder, model.family, max_active=3, engine=engine)
    groups: dict[SamplingSettings, list[int]] = {}
    saved = 0
    for n, case in enumerate(cases):
        changes = {"target": PLUS_ENTROPY} if case.get("quirk") else {}
        groups.setdefault(settings_of(case, **changes), []).append(n)
    failed = []
    for settings, group in groups.items():
        rows = [(n, row) for n in group for row in range(len(prompts[n]))]
        rollouts = built.generate([Request(f"{cases[n]['name']}/{row}", prompts[n][row]) for n, row in rows], settings)
        for (n, row), rollout in zip(rows, rollouts, strict=True):
            saved += cases[n]["nfe"] - rollout.num_forwards
            if what := difference(cases[n], row, rollout):
                failed.append((n, f"{cases[n]['name']}: {what}"))
    flipped = sum(bool(case.get("quirk")) for case in cases)
    if flipped:
        notes = [*notes, f"{flipped} neg_entropy cases with the reference's wrong sign put in: ours reveals the most certain first"]
    notes = [*notes, f"{saved} forwards of rows fewer than the reference's"]
    wrong = {n for n, _ in failed}
    return SetResult(path, "FAIL" if wrong else "PASS", len(cases), float(len(wrong)), 0.0, notes + [what for _, what in failed])


def cases_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "generation.json").read_text())["cases"]


def tensors_of(folder: Path, name: str) -> dict[str, Tensor]:
    return load_file(folder / f"{name}.safetensors")

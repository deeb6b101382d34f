"""dream/: raw logits under full attention, also of left-padded rows, and generation.

Ours leaves pads out. That is what the reference's invisible pads amount to: rotary embeddings know differences of positions only.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from models.checkpoint import Pretrained
from tests.golden import canvas
from tests.golden.result import SetResult


def check(folder: Path, engine: str = "auto") -> list[SetResult]:
    """All sets of the folder; engine: `rollout.engine`."""
    model, cases = canvas.load(folder, "dream"), canvas.cases_of(folder)
    tensors = canvas.tensors_of(folder, "forward_full")
    prompts, padded = [], 0
    for case in cases:
        masks = case["attention_mask"] or [[1] * len(row) for row in case["prompt"]]
        prompts.append([[t for t, real in zip(*row, strict=True) if real] for row in zip(case["prompt"], masks, strict=True)])
        padded += any(0 in mask for mask in masks)
    return [
        canvas.check_forward(model, tensors, "dream/forward_full"),
        check_padded(model, tensors, "dream/forward_full (padded)"),
        canvas.check_generation(model, cases, "dream/generation", prompts, [f"{padded} cases with left padding: left out"], engine),
    ]


def check_padded(model: Pretrained, tensors: dict[str, Tensor], path: str) -> SetResult:
    errors = []
    for ids, mask, expected in zip(tensors["input_ids_padded"], tensors["attention_mask"].bool(), tensors["logits_padded"]):
        found = canvas.logits(model, ids[mask], canvas.full_attention(int(mask.sum())))
        errors.append(float((found - expected[mask]).abs().max()))
    return canvas.result(path, errors, ["left padding left out"])

"""llada/: logits under full attention, with and without stored keys, and generation.

The reference pads shorter prompts of a batch on the left and attends to the pads. That is its layout, not ours: the engine gets
such rows with the pads as part of the prompt, where they are ordinary tokens.
"""

from __future__ import annotations

from pathlib import Path

from tests.golden import canvas
from tests.golden.result import SetResult


def check(folder: Path, engine: str = "auto") -> list[SetResult]:
    """All sets of the folder; engine: `rollout.engine`."""
    model, cases = canvas.load(folder, "llada"), canvas.cases_of(folder)
    prompts = [case["prompt"] for case in cases]
    pad = model.config["pad_token_id"]
    padded = sum(row[0] == pad for rows in prompts for row in rows)
    note = f"{padded} rows begin with pads that the reference attends to: here they are part of the prompt"
    return [
        canvas.check_forward(model, canvas.tensors_of(folder, "forward_full"), "llada/forward_full"),
        canvas.check_prefix_cache(model, canvas.tensors_of(folder, "forward_prefix_cache"), "llada/forward_prefix_cache"),
        canvas.check_generation(model, cases, "llada/generation", prompts, [note], engine),
    ]

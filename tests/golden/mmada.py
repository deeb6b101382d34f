"""mmada/: logits of the language model at given positions, and generation of text. Its image tokenizer is not checked here."""

from __future__ import annotations

from pathlib import Path

from tests.golden import canvas
from tests.golden.result import SetResult


def check(folder: Path, engine: str = "auto") -> list[SetResult]:
    """All sets of the folder; engine: `rollout.engine`."""
    model, cases = canvas.load(folder, "mmada"), canvas.cases_of(folder)
    prompts = [case["prompt"] for case in cases]
    results = [
        canvas.check_forward(model, canvas.tensors_of(folder, "forward"), "mmada/forward"),
        canvas.check_generation(model, cases, "mmada/generation", prompts, [], engine),
    ]
    if (folder / "vq_cases.safetensors").is_file():
        results.append(SetResult("mmada/vq_cases", "UNSUPPORTED", notes=["images are not supported yet"]))
    return results

"""Kernels against their references: on the GPU where there is one, else in triton's interpreter.

The interpreter has to be chosen before triton is imported, which other tests do in this process; so without a GPU these tests
skip here, and test_in_interpreter.py runs them all in a process of its own:

    TRITON_INTERPRET=1 pytest tests/sample/kernels     what that process does
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
needs_interpreter = pytest.mark.skipif(
    INTERPRET or torch.cuda.is_available(), reason="the tests of this folder run in this very process"
)


def run_in_interpreter(folder: Path) -> None:
    """All tests of `folder` in a process whose kernels are interpreted: they pass, and there are some."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 0


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: a test of a kernel puts its tensors here."""
    if INTERPRET:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.skip("runs in the process that test_in_interpreter.py starts")


@pytest.fixture
def any_device() -> torch.device:
    """For tests that are worth running without kernels too: then on the references."""
    return torch.device("cuda" if torch.cuda.is_available() and not INTERPRET else "cpu")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    """The types that kernels run in. The interpreter cuts bf16 off instead of rounding it, and cannot multiply matrices of it."""
    if device.type == "cpu" and request.param != torch.float32:
        pytest.skip("the interpreter does not round to bf16")
    return request.param

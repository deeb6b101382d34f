"""Kernels against their references: on the GPU where there is one, else in triton's interpreter.

The interpreter has to be chosen before triton is imported, which other tests do in this process; so without a GPU these tests
skip here, and test_in_interpreter.py runs them all in a process of its own:

    TRITON_INTERPRET=1 pytest tests/sample/kernels     what that process does
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


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

"""Run this folder's tests on the CPU, in triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sample.kernels.conftest import needs_interpreter, run_in_interpreter


@pytest.mark.timeout(900)  # of one process; a minute where the machine does nothing else
@needs_interpreter
def test_kernels_in_the_interpreter() -> None:
    run_in_interpreter(Path(__file__).parent)

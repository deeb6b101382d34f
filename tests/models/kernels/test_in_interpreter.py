"""Run this folder's tests on the CPU, in triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.sample.kernels.conftest import INTERPRET


@pytest.mark.skipif(INTERPRET or torch.cuda.is_available(), reason="the tests of this folder run in this very process")
def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, cwd=folder.parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 0

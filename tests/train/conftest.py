"""What several tests of the update start from."""

from __future__ import annotations

from typing import Iterator

import pytest
from accelerate import Accelerator

from common import dist
from tests.train.steps import forget_accelerator, rl_config


@pytest.fixture(scope="module")
def accelerator() -> Iterator[Accelerator]:
    """Of configs/rl_tiny.yaml: one process, no DeepSpeed."""
    forget_accelerator()
    yield dist.make_accelerator(rl_config())
    forget_accelerator()

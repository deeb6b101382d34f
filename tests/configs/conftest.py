from __future__ import annotations

import os

import pytest

from common import deepspeed_files
from configs.load import load_config


@pytest.fixture(autouse=True)
def fresh_warnings():
    """Warnings are told once per run, through the environment."""
    told = os.environ.pop("UNMASK_TOLD", None)
    yield
    os.environ.pop("UNMASK_TOLD", None)
    if told is not None:
        os.environ["UNMASK_TOLD"] = told


@pytest.fixture
def load(tmp_path):
    """load(job, yaml text, *overrides) -> Config"""

    def load_text(job: str, text: str, *overrides: str):
        path = tmp_path / "settings.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(job, [f"config={path}", *overrides])

    return load_text


@pytest.fixture
def whole_reference(monkeypatch, tmp_path):
    """The machines that files of the reference name."""
    monkeypatch.setattr(deepspeed_files, "FOLDER", tmp_path)
    for name in ["1_node_8_gpus_deepspeed_zero3", "2_node_8_gpus_deepspeed_zero3"]:
        (tmp_path / f"{name}.yaml").write_text(f"num_machines: {name[0]}\ndeepspeed_config: {{zero_stage: 3}}\n")

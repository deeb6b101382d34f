from __future__ import annotations

import dataclasses
import os

import pytest

from common import deepspeed_files
from configs.load import load_config
from models.registry import FAMILIES
from reward.registry import REWARDS
from train.methods import METHODS


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
    """Families, rewards, methods and machines that files of the reference name, here or not yet here."""
    entries = FAMILIES._entries
    monkeypatch.setitem(entries, "llada", dataclasses.replace(FAMILIES.get("sdar"), name="llada", attention="full"))
    monkeypatch.setitem(REWARDS._entries, "code", REWARDS._entries["exact"])
    if "coupled" not in METHODS:
        monkeypatch.setitem(METHODS._entries, "coupled", METHODS.get("TraceRL"))
    monkeypatch.setattr(deepspeed_files, "FOLDER", tmp_path)
    for name in ["1_node_8_gpus_deepspeed_zero3", "2_node_8_gpus_deepspeed_zero3"]:
        (tmp_path / f"{name}.yaml").write_text("deepspeed_config: {zero_stage: 3}\n")

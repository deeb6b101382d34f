"""A state goes on under any number of processes and any ZeRO stage: every bit of weights and optimizer, the same next step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common import state
from common.errors import UserError
from tests.distributed import state_jobs
from tests.distributed.harness import run_on_ranks
from tests.train.steps import error

FILE = "1_node_{}_gpus_deepspeed_zero{}"
WRITTEN = {
    "one": (1, None, "float32"),
    "ddp": (2, None, "float32"),
    "zero1": (2, FILE.format(2, 1), "float32"),
    "zero1 bfloat16": (2, FILE.format(2, 1), "bfloat16"),
    "zero2": (2, FILE.format(2, 2), "float32"),
    "zero2 bfloat16": (2, FILE.format(2, 2), "bfloat16"),
    "zero2 offload": (2, FILE.format(2, 2) + "_offload", "float32"),
    "zero3": (2, FILE.format(2, 3), "float32"),
    "zero3 bfloat16": (2, FILE.format(2, 3), "bfloat16"),
}
FLOAT32 = [name for name, (_, _, dtype) in WRITTEN.items() if dtype == "float32"]
BFLOAT16 = [name for name in WRITTEN if name not in FLOAT32]
READ = [
    *((name, name) for name in ("ddp", "zero2 bfloat16", "zero3")),
    ("one", "zero2"),
    ("ddp", "one"),
    ("zero1", "zero2 offload"),
    ("zero2", "zero3"),
    ("zero2 offload", "ddp"),
    ("zero3", "zero1"),
    ("zero1 bfloat16", "zero3 bfloat16"),
    ("zero2 bfloat16", "zero1 bfloat16"),
    ("zero3 bfloat16", "zero2 bfloat16"),
]
"""Every mode is written and read; some into themselves, where the next step is the same to the bit."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("states")


Found = dict[Any, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def found(folder) -> tuple[Found, Found]:
    """What each rank found: in what it wrote, by mode, and in what it read, by (state, mode)."""
    alone = state_jobs.write({"one": (None, "float32")}, str(folder))
    written: Found = {"one": [alone["one"]]}
    of_two = {name: arguments for name, (ranks, *arguments) in WRITTEN.items() if ranks == 2}
    into_two = {f"{s}|{t}": (s, *WRITTEN[t][1:]) for s, t in READ if WRITTEN[t][0] == 2}
    arguments = {"written": of_two, "read_into": into_two, "folder": str(folder)}
    of_ranks = run_on_ranks("tests.distributed.state_jobs:write_and_read", 2, arguments)
    written |= {name: [by_mode[name] for by_mode, _ in of_ranks] for name in of_two}
    read: Found = {tuple(name.split("|")): [by_pair[name] for _, by_pair in of_ranks] for name in into_two}
    for source, target in READ:
        if WRITTEN[target][0] == 1:
            read[source, target] = [state_jobs.read({"it": (source, *WRITTEN[target][1:])}, str(folder))["it"]]
    return written, read


@pytest.fixture(scope="module")
def written(found) -> Found:
    return found[0]


@pytest.fixture(scope="module")
def read(found) -> Found:
    return found[1]


def assert_same_bits(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["scalars"] == second["scalars"] and first["scalars"]["step"] == 2.0
    assert first["kept"].keys() == second["kept"].keys()
    for name, tensors in first["kept"].items():
        assert tensors.keys() == {"weight", "exp_avg", "exp_avg_sq"} == second["kept"][name].keys()
        for key, value in tensors.items():
            other = second["kept"][name][key]
            assert value.dtype == other.dtype == torch.float32
            assert torch.equal(value.view(torch.int32), other.view(torch.int32)), f"{name}, {key}"


@pytest.mark.parametrize("source, target", READ, ids=lambda name: name.replace(" ", "_"))
def test_every_bit_is_there_again(written, read, source, target):
    for of_rank in read[source, target]:
        assert_same_bits(written[source][0]["before"], of_rank["before"])
    for name, value in written[source][0]["before"]["weights"].items():  # what the model computes with, rounded or not
        assert torch.equal(read[source, target][0]["before"]["weights"][name], value), name


@pytest.mark.parametrize("source, target", READ, ids=lambda name: name.replace(" ", "_"))
def test_the_next_step_is_the_same(written, read, source, target):
    right, found = written[source][0]["after"], read[source, target][0]["after"]
    assert found["scalars"] == right["scalars"] == {"step": 3.0}
    if source == target:
        for name, tensors in right["kept"].items():
            assert all(torch.equal(tensors[key], found["kept"][name][key]) for key in tensors), name
    gap = error(*({name: tensors["weight"] for name, tensors in one["kept"].items()} for one in (found, right)))
    assert gap < (1e-6 if source in FLOAT32 else 1e-2), gap  # bfloat16 gradients are summed in another order


def test_random_states_are_each_ranks_own(written, read):
    for source, target in READ:
        for rank, of_rank in enumerate(read[source, target]):
            if rank < len(written[source]):
                assert of_rank["draws"] == written[source][rank]["draws"]
    first, second = (of_rank["draws"] for of_rank in written["ddp"])
    assert first != second


def test_files_are_cut(folder, written, monkeypatch, tmp_path):
    """Several files of a rank, and weights that none of them is trained any more."""
    monkeypatch.setattr(state, "MAX_FILE_BYTES", 500)
    accelerator, model, optimizer = state_jobs.build(None, "float32")
    state_jobs.step(accelerator, model, optimizer, 0)
    state.save_state(accelerator, tmp_path)
    assert len(list(tmp_path.glob("trained_0_*.bin"))) > 3
    right = state_jobs.whole(accelerator, model)
    accelerator, model, optimizer = state_jobs.build(None, "float32")
    state.load_state(accelerator, tmp_path)
    found = state_jobs.whole(accelerator, model)
    assert all(torch.equal(found["kept"][n][k], v) for n, tensors in right["kept"].items() for k, v in tensors.items())
    model.head.requires_grad_(False)
    with pytest.raises(UserError, match=r"holds the state of other weights \(head.weight is not trained here\)"):
        state.load_state(accelerator, tmp_path)


def test_a_state_of_an_older_version(tmp_path):
    accelerator, *_ = state_jobs.build(None, "float32")
    with pytest.raises(UserError, match="written by an older version"):
        state.load_state(accelerator, tmp_path)

"""A rank that is killed, fails or finds its memory full ends the whole job with one line that says why; then the run goes on.

One of two ranks comes to an end in a phase of a step. The job has to be over within a minute of it, and what the next starts make
of the run is what an unbroken one leaves, bit for bit.
"""

from __future__ import annotations

import errno
import itertools
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError, entry_point, is_disk_full, memory_is_full
from common.metrics import read_metrics
from tests.distributed.harness import ROOT, clean_environment
from tests.jobs.conftest import content

KILLER = ROOT / "tests" / "jobs" / "killer.py"
PHASES = {"rollout": "rollout", "reward": "reward", "update": "update", "save": "state_without_counters"}
"""By phase, the place where it is broken off (tests/jobs/killer.py)."""
MOST_SECONDS = 60
SETTINGS = {
    "config": "configs/rl_tiny.yaml",
    "experiment.plugins": f"[{KILLER}]",
    "experiment.num_processes": 2,
    "experiment.total_step": 2,
    "experiment.save_state_every": 1,
    "model.pretrained_model": "tiny-random",
    "model.prepare_config": "null",
    "dataset.data_type": "remainder",
    "evaluation.if_eval": "false",
    "rollout.num_task_per_step": 4,
    "rollout.num_response_per_task": 2,
    "rollout.deterministic": "true",  # who samples what is fixed: bit for bit
}


@dataclass
class Ended:
    code: int
    err: str
    seconds: float
    """From the end of the one rank to that of the job."""

    @property
    def last_line(self) -> str:
        return self.err.strip().splitlines()[-1]


def start(project: Path, phase: str | None = None, how: str = "kill", step: int = 1, gpus: str = "") -> Ended:
    marker = Path(f"{project}.{phase}.{how}.{step}")
    fault = {"KILL_AT": f"{PHASES[phase]}:{step}", "KILL_BY": how, "KILL_RANK": "1", "KILL_MARKER": str(marker)} if phase else {}
    environment = clean_environment(CUDA_VISIBLE_DEVICES=gpus, **fault)
    line = [sys.executable, "rl.py", f"experiment.project={project}", *(f"{key}={value}" for key, value in SETTINGS.items())]
    job = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert marker.exists() == bool(phase), job.stderr
    return Ended(job.returncode, job.stderr, time.time() - marker.stat().st_mtime if phase else 0.0)


def assert_ended_with_its_cause(ended: Ended, how: str) -> None:
    assert ended.seconds < MOST_SECONDS
    causes = [line for line in ended.err.splitlines() if line.startswith("error: process")]
    assert causes == [ended.last_line], "the cause is told once, at the end"
    assert ended.last_line.startswith("error: process 1 of 2 ")
    if how == "kill":
        assert ended.code == 128 + 9 and "was killed by SIGKILL" in ended.last_line
        return
    assert ended.code == 1
    if how == "raise":
        assert ended.last_line.endswith("failed: RuntimeError: this is the end")
        assert "Traceback" in ended.err
    else:
        assert "the GPU's memory is full" in ended.last_line and ("2.50 GiB" in ended.last_line) == (how == "memory")
        assert "train.memory_estimate" in ended.last_line
        assert "[rank1]: Traceback" not in ended.err  # (rank 0 may say that it has lost its peer)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    project = tmp_path_factory.mktemp("unbroken") / "run"
    ended = start(project)
    assert ended.code == 0, ended.err
    return content(project)


def broken_off(project: Path, *faults: tuple[str, str, int]) -> dict[str, Any]:
    """What a run leaves that was started once for every (phase, how, step), and once more to its end."""
    for phase, how, step in faults:
        assert_ended_with_its_cause(start(project, phase, how, step), how)
    ended = start(project)
    assert ended.code == 0, ended.err
    return content(project)


def test_full_memory_in_an_update(unbroken, tmp_path):
    assert broken_off(tmp_path / "run", ("update", "memory", 2)) == unbroken


@pytest.mark.slow
def test_one_fault_after_the_other(unbroken, tmp_path):
    assert broken_off(tmp_path / "run", ("update", "memory", 1), ("rollout", "raise", 2), ("save", "kill", 2)) == unbroken


@pytest.mark.slow
@pytest.mark.parametrize("phase, how", itertools.product(PHASES, ["kill", "raise", "memory"]))
def test_every_fault_in_every_phase(unbroken, tmp_path, phase, how):
    assert broken_off(tmp_path / "run", (phase, how, 2)) == unbroken


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fills the memory of one GPU of two")
def test_a_gpu_that_is_really_full(tmp_path):
    """Not an error that a test made up: what fails is whatever asks for memory behind the reward, the update's first tensor."""
    project = tmp_path / "run"
    ended = start(project, "reward", "full", 2, gpus="0,1")
    print(f"{ended.seconds:.1f} s until the job was over: {ended.last_line}")
    assert_ended_with_its_cause(ended, "full")
    assert " more were wanted)" in ended.last_line
    ended = start(project, gpus="0,1")
    assert ended.code == 0, ended.err
    assert [row["step"] for row in read_metrics(project)] == [1, 2]


# ---- the line

NCCL = (
    "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nFailed to CUDA {} bytes"
)


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def test_full_memory_is_told_from_other_errors():
    for error in [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        *(torch.distributed.DistBackendError(NCCL.format(what)) for what in ("calloc async 608", "calloc 8", "malloc 4194304")),
    ]:
        line = memory_is_full(raised(error))
        assert line is not None and "GPU's memory" in line and "\n" not in line
    for what in ("host malloc 2097152", "host alloc 2097152"):
        of_nccl = torch.distributed.DistBackendError(NCCL.format(what))
        for error in (MemoryError(), of_nccl):
            host = memory_is_full(raised(error))
            assert host is not None and "machine's memory" in host and "\n" not in host
    for other in [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"),
        ValueError("out of memory"),
        ValueError("Failed to CUDA calloc async 608 bytes"),
        KeyError("x"),
    ]:
        assert memory_is_full(raised(other)) is None


def behind_full_memory(error: BaseException, **cause: bool) -> BaseException:
    """`error`, raised while full memory is handled; is_cause: it says so itself, or that it has no cause."""
    full = raised(torch.OutOfMemoryError("CUDA out of memory."))
    error.__context__ = full
    if cause:
        error.__cause__ = full if cause["is_cause"] else None  # as `raise error from` does, which suppresses the context
    return raised(error)


def test_what_full_memory_broke_off_is_told_from_other_faults():
    """The libraries' complaints of being left in the middle of something are full memory; a mistake in a handler is itself."""
    complaints = [
        RuntimeError("Backward hooks are in an unexpected state"),
        AssertionError("the engine is within no_sync"),
        torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1"),
    ]
    for error in complaints:
        assert memory_is_full(behind_full_memory(error)) is not None
    for error in [KeyError("loss"), TypeError("'NoneType' object"), UserError("training.eps: got -1"), FileNotFoundError("x")]:
        assert memory_is_full(behind_full_memory(error)) is None
        assert memory_is_full(behind_full_memory(error, is_cause=True)) is not None
    assert memory_is_full(behind_full_memory(RuntimeError("another"), is_cause=False)) is None
    full_disk = OSError(errno.ENOSPC, "No space left on device")
    behind = KeyError("x")
    behind.__context__ = full_disk
    assert is_disk_full(full_disk) and not is_disk_full(behind)
    behind = RuntimeError("cannot close the archive")
    behind.__context__ = full_disk
    assert is_disk_full(behind)


def test_the_advice_is_that_of_the_room():
    from sample.engine import Request
    from train.logprobs import chunked_logprobs

    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.16 GiB.")

    class Full(torch.Tensor):
        __torch_function__ = classmethod(lambda cls, function, types, args=(), kwargs=None: full())

    with pytest.raises(torch.OutOfMemoryError) as update:
        chunked_logprobs(torch.ones(1, 1), torch.ones(1, 1).as_subclass(Full), torch.zeros(1, dtype=torch.int64))
    line = memory_is_full(update.value)
    assert "training.max_tokens_per_microbatch" in line and "1.16 GiB" in line
    assert Request("task", [1]).num_samples == 1


def test_alone_the_line_comes_without_a_launcher(capsys, monkeypatch):
    monkeypatch.delenv("UNMASK_ERROR_FILE", raising=False)

    @entry_point
    def main() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the GPU's memory is full in tests/distributed/test_faults.py, line ")

"""Run a function in several gloo ranks of their own processes, and hand back what each returned.

    results = run_on_ranks("tests.distributed.probe:all_modes", num_processes=2, arguments={"steps": 3})

Importing torch, accelerate and DeepSpeed costs seconds in every rank: let one call do much.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "UNMASK_ERROR_FILE",
)  # fmt: skip


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment without what a launcher (or an accelerator of another test) has put there."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **extra}


def run_on_ranks(
    target: str, num_processes: int, arguments: dict[str, Any] | None = None, timeout_seconds: float = 240
) -> list[Any]:
    """What `target` ("package.module:function", called with **arguments) returned on each rank, in rank order.

    num_processes 1: no launcher at all. Arguments and results may be anything that torch.save takes. Fails with the ranks' output
    where one of them fails or the time is over; no process is left behind then.
    """
    import torch

    with tempfile.TemporaryDirectory(prefix="unmask-ranks-") as folder:
        torch.save(arguments or {}, Path(folder, "arguments.pt"))
        command = [sys.executable, "-m", "tests.distributed.harness", target, folder, str(num_processes)]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=clean_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        try:
            output, _ = process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            process.kill()  # the ranks die with their launcher
            output, _ = process.communicate()
            raise AssertionError(f"{target} on {num_processes} ranks took over {timeout_seconds} s:\n{output}") from None
        assert process.returncode == 0, f"{target} on {num_processes} ranks ended with {process.returncode}:\n{output}"
        return [torch.load(Path(folder, f"result_{rank}.pt"), weights_only=False) for rank in range(num_processes)]


def main(target: str, folder: str, num_processes: str) -> None:
    if int(num_processes) > 1 and "RANK" not in os.environ:
        from common.launch import run_ranks

        sys.exit(run_ranks([sys.executable, "-m", "tests.distributed.harness", target, folder, num_processes], int(num_processes)))
    import torch

    torch.set_num_threads(1)
    rank = os.environ.get("RANK", "0")  # before the function runs: it may set the variable
    module, _, name = target.partition(":")
    result = getattr(importlib.import_module(module), name)(**torch.load(Path(folder, "arguments.pt"), weights_only=False))
    torch.save(result, Path(folder, f"result_{rank}.pt"))
    if torch.distributed.is_initialized():  # as of jobs, common.dist.end_together
        torch.distributed.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])

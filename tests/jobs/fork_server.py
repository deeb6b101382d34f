"""Jobs as processes of their own, without the seconds that importing torch costs each: a server that has imported it forks.

    server = ForkServer()
    job = server.run("rl.py", ["config=...", ...], env={...})      # job.code, job.out, job.err

The child runs the script as `python rl.py ...` would: as __main__, with its own arguments, working directory and process group.
Nothing but imports happens in the server, no thread is started there, so a fork of it is as good as a fresh process.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.harness import ROOT, clean_environment

MODULES = [
    "torch", "numpy", "accelerate", "transformers", "tokenizers", "safetensors.torch", "huggingface_hub", "omegaconf",
    "torch.distributed", "torch.nn.parallel", "torch._dynamo", "torch.optim",
]  # fmt: skip
"""What jobs import of other people's code. Ours is imported by the child, so that plugins find it as they do in a job."""
LAZY = {"transformers": ["AutoTokenizer", "PreTrainedTokenizerFast"]}
"""Attributes that import what they are when they are first asked for."""


@dataclass(frozen=True)
class Job:
    """How a job ended."""

    code: int
    """Exit code; negative: the signal that killed it."""
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.strip()]


class ForkServer:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.jobs.fork_server"],
            cwd=ROOT,
            env=clean_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        script: str,
        arguments: list[str],
        env: dict[str, str] | None = None,
        cwd: str | Path = ROOT,
        timeout_seconds: float = 120,
    ) -> Job:
        """Run ROOT/`script` to its end."""
        with tempfile.TemporaryDirectory(prefix="unmask-job-") as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            request = [str(ROOT / script), arguments, {**(env or {})}, str(cwd), str(out), str(err), timeout_seconds]
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            code = int(self._answer())
            return Job(code, out.read_text(), err.read_text())

    def _answer(self) -> str:
        line = self.process.stdout.readline()
        assert line, "the fork server has ended"
        return line

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=10)
        self.process.stdout.close()


def serve() -> None:
    for module in MODULES:
        importlib.import_module(module)
    for module, names in LAZY.items():
        for name in names:
            getattr(sys.modules[module], name)
    for line in sys.stdin:
        script, arguments, env, cwd, out, err, timeout_seconds = json.loads(line)
        pid = os.fork()
        if pid == 0:
            become(script, arguments, env, cwd, out, err)
        code, deadline = None, time.monotonic() + timeout_seconds
        while code is None:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)
            time.sleep(0.01)
        print(code, flush=True)


def become(script: str, arguments: list[str], env: dict[str, str], cwd: str, out: str, err: str) -> None:
    """In the child: be `python script *arguments`, and never return."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal, also where the tests run in a shell's background
    for path, number in [(os.devnull, 0), (out, 1), (err, 2)]:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = open(0, closefd=False)
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    code: object = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if code is None else code if isinstance(code, int) else 1)


if __name__ == "__main__":
    serve()

"""Persistent worker processes that run one function on jobs which may hang, crash or eat memory.

Why not multiprocessing or concurrent.futures: their workers import the user's main module again, a hanging job cannot be
ended without its pool, and a worker outlives a parent that was killed. Here a worker is a fresh interpreter that reads jobs,
one JSON line each, from a pipe (reward/worker_main.py):

- the worker arms a kernel timer before each job, whose default action ends the process: no handler, so that C code which
  never returns to the interpreter (9**9**9) ends as well, with or without a living parent;
- an idle worker ends when its pipe closes or its parent is gone;
- a worker that ended is replaced; the job that timed out is not tried again, one whose worker died otherwise (out of memory,
  a crash) is tried once more in a fresh worker, because the worker's neighbour may have been the cause.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Literal, Sequence

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 300  # a loaded machine may take long to import a worker's libraries
GRACE_SECONDS = 5  # beyond a job's own timer: only a stopped or wedged process needs it
ATTEMPTS = 2
MEMORY_BYTES = 4 << 30


@dataclass(frozen=True)
class Outcome:
    status: Literal["ok", "error", "timeout", "died"]
    value: Any = None
    """What the function returned (ok), or the error's text (error)."""


class _Worker:
    """One process, at most one job in flight."""

    def __init__(self, target: str, timeout_seconds: float, memory_bytes: int) -> None:
        arguments = [target, str(timeout_seconds), str(memory_bytes), str(os.getpid())]
        # sys.path[0] is the working directory under -c: replaced, so that no user's file shadows a module.
        code = f"import sys; sys.path[0] = {str(ROOT)!r}; from reward.worker_main import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C at the terminal is for the parent, which then closes its workers
        )
        os.set_blocking(self.process.stdout.fileno(), False)
        self.ready = False
        self.job: int | None = None
        self.deadline = time.monotonic() + START_SECONDS
        self._buffer = b""

    def send(self, index: int, job: Any, seconds: float) -> None:
        self.job, self.deadline = index, time.monotonic() + seconds
        try:
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it died while idle; its closed output says so to the caller, who handles it like any death

    def receive(self) -> tuple[list[dict], bool]:
        """Messages that have arrived, and whether the pipe is still open."""
        is_open = True
        while True:
            try:
                data = os.read(self.process.stdout.fileno(), 1 << 16)
            except BlockingIOError:
                break
            if not data:
                is_open = False
                break
            self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        return [json.loads(line) for line in lines], is_open

    def end(self) -> int:
        """Kill if needed, close the pipes, and return the exit code (negative: the signal)."""
        if self.process.poll() is None:
            self.process.kill()
        code = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                pipe.close()
            except BrokenPipeError:
                pass  # an unsent job in the buffer of a dead worker
        return code


class WorkerPool:
    """`map` runs `target` ("package.module:function") on JSON-able jobs in up to `num_workers` processes, started when needed."""

    def __init__(self, target: str, num_workers: int, timeout_seconds: float, memory_bytes: int = MEMORY_BYTES) -> None:
        assert num_workers >= 1 and timeout_seconds > 0
        self.target = target
        self.num_workers = num_workers
        self.timeout_seconds = timeout_seconds
        self.memory_bytes = memory_bytes
        self.num_started = 0
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            while self._workers:
                self._workers.pop().end()

    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    def map(self, jobs: Sequence[Any], progress: Callable[[int, int], None] | None = None) -> list[Outcome]:
        """One Outcome per job, in order. A job costs at most `timeout_seconds` (twice the time to its worker's death)."""
        with self._lock:
            try:
                return self._map(jobs, progress)
            except BaseException:  # a job in flight would answer into the next call: start afresh
                while self._workers:
                    self._workers.pop().end()
                raise

    def _map(self, jobs: Sequence[Any], progress: Callable[[int, int], None] | None) -> list[Outcome]:
        outcomes: list[Outcome | None] = [None] * len(jobs)
        attempts = [0] * len(jobs)
        waiting = deque(range(len(jobs)))
        num_done = 0

        def finish(index: int, outcome: Outcome) -> None:
            nonlocal num_done
            outcomes[index] = outcome
            num_done += 1
            if progress is not None:
                progress(num_done, len(jobs))

        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            while num_done < len(jobs):
                for worker in self._workers:
                    if worker.ready and worker.job is None and waiting:
                        index = waiting.popleft()
                        attempts[index] += 1
                        worker.send(index, jobs[index], self.timeout_seconds + GRACE_SECONDS)
                num_starting = sum(not worker.ready for worker in self._workers)
                while len(self._workers) < self.num_workers and num_starting < len(waiting):
                    worker = _Worker(self.target, self.timeout_seconds, self.memory_bytes)
                    self._workers.append(worker)
                    self.num_started += 1
                    num_starting += 1
                    selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

                now = time.monotonic()
                busy = [worker for worker in self._workers if worker.job is not None or not worker.ready]
                timeout = max(0.0, min(worker.deadline for worker in busy) - now)
                events = {key.data for key, _ in selector.select(timeout)}
                for worker in list(self._workers):
                    messages, is_open = worker.receive() if worker in events else ([], True)
                    for message in messages:
                        if "failed" in message:
                            raise RuntimeError(f"worker for {self.target} did not start: {message['failed']}")
                        if "ready" in message:
                            worker.ready = True
                        else:
                            finish(worker.job, Outcome(message["status"], message["value"]))
                            worker.job = None
                    is_late = (worker.job is not None or not worker.ready) and time.monotonic() > worker.deadline
                    if is_open and not is_late:
                        continue
                    selector.unregister(worker.process.stdout)
                    self._workers.remove(worker)
                    code = worker.end()
                    if not worker.ready:
                        raise RuntimeError(f"worker for {self.target} did not start (exit code {code}); its own message is above")
                    if worker.job is None:
                        continue
                    if is_late or code == -signal.SIGALRM:
                        finish(worker.job, Outcome("timeout"))
                    elif attempts[worker.job] < ATTEMPTS:
                        waiting.appendleft(worker.job)
                    else:
                        finish(worker.job, Outcome("died", f"exit code {code}"))
        return outcomes

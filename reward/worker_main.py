"""The child's side of reward/worker_pool.py: jobs from stdin, results to stdout, one JSON line each. Never imports torch."""

from __future__ import annotations

import importlib
import json
import os
import resource
import select
import signal
import sys

IDLE_SECONDS = 1.0  # how often an idle worker looks whether its parent is still there


def limit_memory(num_bytes: int) -> None:
    """A job that wants more gets a MemoryError instead of taking the machine's memory."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        num_bytes = min(num_bytes, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, hard))
    except (ValueError, OSError):
        pass  # macOS refuses a limit on address space; the timer still bounds the job
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def run(function, job: object) -> dict:
    try:
        return {"status": "ok", "value": function(job)}
    except Exception as error:  # the answer of a model made a parser fail: reported to the parent, who counts it wrong
        return {"status": "error", "value": f"{type(error).__name__}: {error}"[:500]}


def main() -> None:
    target, timeout_seconds, memory_bytes, parent = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    # Results own the real stdout; anything that a library prints goes to stderr.
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    # The default action ends the process in the kernel, whatever code it is in.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})

    def reply(message: dict) -> None:
        try:
            results.write(json.dumps(message).encode() + b"\n")
            results.flush()
        except BrokenPipeError:
            os._exit(0)  # the parent is gone

    limit_memory(memory_bytes)
    module, _, name = target.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:
        reply({"failed": f"{type(error).__name__}: {error}"})
        return
    reply({"ready": True})

    buffer = b""
    while True:
        if not select.select([0], [], [], IDLE_SECONDS)[0]:
            # A fork of the parent may hold the pipe open after the parent's death: then there is no end of file to read.
            if os.getppid() != parent:
                return
            continue
        data = os.read(0, 1 << 16)
        if not data:
            return
        buffer += data
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            job = json.loads(line)
            signal.setitimer(signal.ITIMER_REAL, timeout_seconds)
            message = run(function, job)
            signal.setitimer(signal.ITIMER_REAL, 0)
            reply(message)

"""What the ranks of test_queue run."""

from __future__ import annotations

import time
from typing import Any

from common import dist
from sample.engine import Request, build_engine
from sample.queue import WorkQueue
from sample.rollout import sample_on_all_ranks
from tests.sample.test_queue import MAX_ACTIVE, SETTINGS, model
from tests.train.steps import rl_config


class SlowedQueue:
    """Between an engine and its queue: keeps what was taken, and waits at each taking."""

    def __init__(self, queue: WorkQueue, seconds: float) -> None:
        self.queue, self.share, self.seconds = queue, queue.share, seconds
        self.taken: list[tuple[int, int]] = []

    def take(self, most: int) -> Any:
        unit = self.queue.take(most)
        if unit is not None:
            self.taken += [(unit.request, sample) for sample in unit.samples]
            time.sleep(self.seconds * len(unit.samples))
        return unit


class Watched:
    """An engine whose queue can be slow: as if its answers took so much longer."""

    def __init__(self, engine: Any, seconds: float) -> None:
        self.engine, self.seconds = engine, seconds

    def generate(self, requests: Any, settings: Any, weights_version: int, progress: Any, queue: WorkQueue) -> Any:
        self.queue = SlowedQueue(queue, self.seconds)
        rollouts = self.engine.generate(requests, settings, weights_version, progress, self.queue)
        self.finished = time.perf_counter()
        return rollouts


def sample_everything(requests: list[Request], calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One call of `sample_on_all_ranks` after the other; a call says how slow each rank is, and whether it is deterministic."""
    accelerator = dist.make_accelerator(rl_config())
    decoder, family = model()
    results = []
    for version, call in enumerate(calls):
        engine = Watched(build_engine(decoder, family, MAX_ACTIVE), call["seconds"][accelerator.process_index])
        dist.barrier(accelerator)
        started = time.perf_counter()
        rollouts = sample_on_all_ranks(engine, requests, SETTINGS, accelerator, version, "test", call["deterministic"])
        busy = dist.gather_objects(accelerator, engine.finished - started)
        results.append({"rollouts": rollouts, "taken": engine.queue.taken, "busy": busy})
    return results


def one_rank_dies(requests: list[Request]) -> int:
    """Rank 1 takes a unit and is gone; what rank 0 can still take, without waiting."""
    from sample.queue import SharedQueue

    accelerator = dist.make_accelerator(rl_config())
    counter = dist.SharedCounter(accelerator)
    queue = SharedQueue(requests, accelerator.num_processes, counter.next)
    if not accelerator.is_main_process:
        queue.take(1000)
        return 0
    taken = 0
    while (unit := queue.take(1000)) is not None:
        taken += len(unit.samples)
    return taken

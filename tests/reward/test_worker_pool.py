import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from reward.worker_pool import Outcome, WorkerPool

ROOT = Path(__file__).parents[2]
JOBS = "tests.reward.worker_jobs:"


def wait_until_gone(pids, seconds=15):
    """Zombies of another parent count as gone: where no init process reaps them, they stay."""

    def is_there(pid):
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(map(is_there, pids)):
            return
        time.sleep(0.05)
    raise AssertionError(f"still there: {[pid for pid in pids if is_there(pid)]}")


def test_map_keeps_order_and_processes():
    with WorkerPool(JOBS + "double", 2, timeout_seconds=20) as pool:
        assert pool.pids() == []  # none before there is work
        assert pool.map([]) == []
        seen = []
        assert pool.map(list(range(20)), lambda done, total: seen.append((done, total))) == [
            Outcome("ok", 2 * n) for n in range(20)
        ]
        assert seen == [(n + 1, 20) for n in range(20)]
        pids = pool.pids()
        assert pool.map([1]) == [Outcome("ok", 2)]
        assert pool.pids() == pids and pool.num_started == 2
    wait_until_gone(pids)


def test_an_exception_is_an_outcome():
    with WorkerPool(JOBS + "double", 1, timeout_seconds=20) as pool:
        outcomes = pool.map([1, None, 2])
        assert [outcome.status for outcome in outcomes] == ["ok", "error", "ok"]
        assert "TypeError" in outcomes[1].value and pool.num_started == 1


@pytest.mark.parametrize("how", ["sleep", "c_code", "ignore_alarm_handler"])
def test_a_hanging_job_costs_its_time_limit(how):
    with WorkerPool(JOBS + "obey", 1, timeout_seconds=1) as pool:
        pool.map(["ok"])  # the start of the process is not part of the measurement
        begin = time.monotonic()
        outcomes = pool.map(["ok", how, "ok"])
        assert [outcome.status for outcome in outcomes] == ["ok", "timeout", "ok"]
        assert time.monotonic() - begin < 8
        assert pool.num_started == 2


def test_a_dying_worker_is_replaced_and_the_job_tried_once_more():
    with WorkerPool(JOBS + "obey", 1, timeout_seconds=20) as pool:
        outcomes = pool.map(["ok", "die", "ok"])
        assert [outcome.status for outcome in outcomes] == ["ok", "died", "ok"]
        assert pool.num_started == 3


def test_a_worker_killed_while_idle_is_replaced():
    with WorkerPool(JOBS + "double", 1, timeout_seconds=20) as pool:
        pool.map([1])
        os.kill(pool.pids()[0], signal.SIGKILL)
        time.sleep(0.2)
        assert pool.map([1, 2]) == [Outcome("ok", 2), Outcome("ok", 4)]


def test_memory_is_limited():
    with WorkerPool(JOBS + "fill_memory", 1, timeout_seconds=20, memory_bytes=1 << 30) as pool:
        assert pool.map([4 << 30])[0].status == "error"


def test_a_target_that_cannot_be_imported_is_an_error():
    with WorkerPool("tests.reward.no_such_module:f", 1, timeout_seconds=5) as pool:
        with pytest.raises(RuntimeError, match="did not start.*no_such_module"):
            pool.map([1])


def test_what_a_job_prints_does_not_disturb_the_results():
    with WorkerPool(JOBS + "print_and_double", 1, timeout_seconds=20) as pool:
        assert pool.map([3]) == [Outcome("ok", 6)]


def test_workers_import_neither_torch_nor_the_main_module():
    with WorkerPool(JOBS + "modules", 1, timeout_seconds=20) as pool:
        names = pool.map([None])[0].value
    assert "torch" not in names and "pytest" not in names


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_workers_end_with_a_killed_parent(state, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        f"""
import sys, time, threading, os
sys.path.insert(0, {str(ROOT)!r})
from reward.worker_pool import WorkerPool
pool = WorkerPool("{JOBS}obey", 2, timeout_seconds=3)
pool.map(["ok"] * 50)
if os.fork() == 0:  # a fork holds the pipes open after its parent's death
    time.sleep(60)
    os._exit(0)
if {state == "busy"}:
    threading.Thread(target=pool.map, args=(["c_code"] * 2,), daemon=True).start()
    time.sleep(0.5)
print(*pool.pids(), flush=True)
time.sleep(60)
"""
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    forks = []
    try:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert pids
        forks = [child.pid for child in psutil.Process(parent.pid).children() if child.pid not in pids]
        assert len(forks) == 1
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        wait_until_gone(pids)
    finally:
        parent.kill()
        for pid in forks:
            os.kill(pid, signal.SIGKILL)
        parent.stdout.close()

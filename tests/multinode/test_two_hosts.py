"""Two hosts that a network cable joins: the launchers over it, started on both or by ssh, and the cable unplugged."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Iterator

import pytest

from tests.multinode.harness import SMALL_SETTINGS, small_job
from tests.multinode.hosts import ADDRESSES, Hosts, two_hosts, why_not

SLEEP = "mark('up')\nwait_for('up')\ntime.sleep(120)\n"
REASON, SSH_REASON = why_not(), why_not(needs_ssh=True)
needs_ssh = pytest.mark.skipif(SSH_REASON is not None, reason=str(SSH_REASON))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
LAUNCHERS = ["ssh", pytest.param("pdsh", marks=pytest.mark.skipif(shutil.which("pdsh") is None, reason="needs pdsh"))]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with two_hosts(tmp_path) as hosts:
        yield hosts


def test_a_cable_is_unplugged(hosts, tmp_path):
    """Nothing comes, and nothing breaks: both launchers notice the silence, and end their own."""
    machines = hosts.start_everywhere([small_job(tmp_path, SLEEP), *SMALL_SETTINGS])
    machines[0].wait_for(lambda: all(machine.ranks() for machine in machines))
    began = time.monotonic()
    hosts.cut()
    codes = [machine.wait(30) for machine in machines]
    assert codes == [1, 1] and time.monotonic() - began < 20
    assert machines[0].lines[-1].startswith("error: machine 1 (beta) is lost: nothing heard of it for 2 s")
    assert machines[1].lines[-1].startswith(f"error: machine 0 ({ADDRESSES[0]}) is lost: nothing heard of it for 2 s")
    for machine in machines:
        machine.assert_nothing_is_left()


@needs_ssh
@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ssh_starts_the_other(hosts, tmp_path, launcher):
    body = "(folder / f'place_{rank}').write_text(os.uname().nodename + ' ' + argv[-2] + ' ' + os.environ.get('OF_MINE', '-'))\n"
    body += "print(f'hello from {rank}', flush=True)\n"
    words = "rollout.stop_token_list=['<|%n|>', \"b 'c'\"]"
    settings = [*hosts.start_sshd(), f"system.launcher={launcher}", "system.pass_environment=[OF_*]", words]
    machine = hosts.start_by_ssh([small_job(tmp_path, body), *SMALL_SETTINGS, *settings], {"OF_MINE": "a b"})
    assert machine.wait() == 0, machine.output
    assert [(tmp_path / f"place_{rank}").read_text() for rank in range(2)] == [
        f"{name} {words} a b" for name in ("alpha", "beta")
    ]
    assert "hello from 0" in machine.lines and any(line.endswith("hello from 1") for line in machine.lines)
    machine.assert_nothing_is_left()
    hosts.on_second().assert_nothing_is_left()


@needs_ssh
@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("how", ["a rank fails", "Ctrl-C", "SIGTERM", "SIGKILL", "unplugged", "its launcher is killed"])
def test_an_end_leaves_nothing_behind(hosts, tmp_path, launcher, how):
    body = "if rank == 1: mark('up'); wait_for('up'); raise RuntimeError('boom')\n" if how == "a rank fails" else ""
    settings = [*hosts.start_sshd(), f"system.launcher={launcher}"]
    machine = hosts.start_by_ssh([small_job(tmp_path, body + SLEEP), *SMALL_SETTINGS, *settings])
    second = hosts.on_second()
    if not body:
        machine.wait_for(lambda: all((tmp_path / f"up_{rank}").exists() for rank in range(2)))
    expected = {"a rank fails": 1, "Ctrl-C": 130, "SIGTERM": 143, "SIGKILL": -9, "unplugged": 1, "its launcher is killed": 1}
    if how in ("Ctrl-C", "SIGTERM", "SIGKILL"):
        os.kill(machine.process.pid, {"Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL}[how])
    elif how == "unplugged":
        hosts.cut()
    elif how == "its launcher is killed":
        os.kill(_parent(second.ranks()[1]), signal.SIGKILL)
    assert machine.wait(60) == expected[how], machine.output
    said = {
        "a rank fails": "error: process 1 of 2 (machine 1, beta) failed: RuntimeError: boom",
        "Ctrl-C": "interrupted; start the same command again to go on",
        "unplugged": "error: machine 1 (beta) is lost: nothing heard of it for 2 s",
        "its launcher is killed": "error: machine 1 (beta) is lost: its connection broke",
    }
    assert said.get(how, "") in machine.output
    assert machine.output.count("error: ") <= 1
    machine.assert_nothing_is_left()
    second.assert_nothing_is_left(30)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@needs_ssh
@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_host_that_ssh_does_not_reach(hosts, tmp_path, launcher):
    settings = [*hosts.start_sshd(), f"system.launcher={launcher}"]
    hosts.cut()
    machine = hosts.start_by_ssh([small_job(tmp_path, SLEEP), *SMALL_SETTINGS, *settings])
    assert machine.wait(60) == 2
    beginning = f"error: machine 1 ({ADDRESSES[1]}): cannot be started: ssh: connect to host {ADDRESSES[1]}"
    assert machine.lines[-1].startswith(beginning)
    machine.assert_nothing_is_left()


@needs_ssh
@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_mistake_over_there_is_one_line_here(hosts, tmp_path, launcher):
    model = tmp_path / "alpha" / "models" / "m"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    settings = [*hosts.start_sshd(hidden=model.parent), f"system.launcher={launcher}", f"model.pretrained_model={model}"]
    machine = hosts.start_by_ssh([small_job(tmp_path, SLEEP), *SMALL_SETTINGS, *settings])
    assert machine.wait(60) == 2, machine.output
    assert machine.lines[-1] == (
        f"error: machine 1 (beta): model.pretrained_model: no directory {model} on this machine: bring the model there, "
        "under the same path"
    )
    assert machine.output.count("error") == 1
    hosts.on_second().assert_nothing_is_left()


@needs_ssh
@pytest.mark.slow
def test_machine_0_is_gone_before_the_other_has_come(hosts, tmp_path):
    """Killed while the other one's launcher is still being started: that finds a closed door, and ends."""
    settings = [*hosts.start_sshd(), "system.launcher=ssh"]
    machine = hosts.start_by_ssh([small_job(tmp_path, SLEEP), *SMALL_SETTINGS, *settings])
    second = hosts.on_second()
    machine.wait_for(lambda: bool(second.processes()))
    machine.process.kill()
    machine.assert_nothing_is_left()
    second.assert_nothing_is_left(60)


@needs_ssh
def test_the_other_machines_of_the_references_job_are_idle(tmp_path, hosts):
    hosts_of_job = {f"MLP_WORKER_{index}_HOST": address for index, address in enumerate(ADDRESSES)}
    environment = {"MLP_ROLE_INDEX": "1", "MLP_WORKER_0_PORT": "29500", **hosts_of_job}
    machine = hosts.start(1, [small_job(tmp_path, SLEEP), *SMALL_SETTINGS], environment)
    machine.wait_for("machine 1 is idle")
    time.sleep(0.2)
    machine.process.terminate()
    assert machine.wait(10) == 0

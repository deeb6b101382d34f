"""Two machines on loopback with ranks that are small scripts: who starts, who is refused, who ends whom, and what is said."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Callable, Iterator

import pytest

from common.nodes_hub import LATE_SECONDS
from tests.distributed.harness import ROOT
from tests.multinode.harness import SMALL_SETTINGS, Machine, environment_of, free_port, on_loopback, small_job

Start = Callable[..., list[Machine]]
WAIT = 'mark("up"); wait_for("up")\n'
SLEEP = "time.sleep(60)\n"
RUN = "mark('ran')\n"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Machine] = []

    def start(body: str, *settings: str, **options) -> list[Machine]:
        started.extend(on_loopback(tmp_path, [small_job(tmp_path, body), *SMALL_SETTINGS, *settings], **options))
        return list(started)

    yield start
    for machine in started:
        machine.kill()


def finish(machines: list[Machine], timeout_seconds: float = 30.0) -> list[int]:
    codes = [machine.wait(timeout_seconds) for machine in machines]
    for machine in machines:
        machine.assert_nothing_is_left()
    return codes


def end(machine: Machine) -> list[str]:
    """The lines of the end: what comes behind those of the start."""
    return [line for line in machine.lines if not line.startswith(("machine ", "2 machines", "warning: machine 0", "step"))]


def test_every_rank_gets_its_place(start, tmp_path):
    body = """
names = ["WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "MASTER_ADDR", "GLOO_SOCKET_IFNAME", "NCCL_DEBUG"]
(folder / f"place_{rank}").write_text(" ".join(os.environ.get(name, "-") for name in names))
(folder / f"port_{rank}").write_text(os.environ["MASTER_PORT"])
(folder / f"arguments_{rank}").write_text(argv[-2])
"""
    environment = [{"NCCL_DEBUG": "WARN"}, {}]
    machines = start(body, "experiment.num_processes=2", "rollout.stop_token_list=['<|a|>', 'b c']", environment=environment)
    assert finish(machines) == [0, 0], machines[0].output
    for rank in range(4):
        index, local = divmod(rank, 2)
        assert (tmp_path / f"place_{rank}").read_text() == f"4 2 {local} {index} 127.0.0.1 lo WARN"
        assert (tmp_path / f"port_{rank}").read_text() == (tmp_path / "port_0").read_text()
        assert (tmp_path / f"arguments_{rank}").read_text() == "rollout.stop_token_list=['<|a|>', 'b c']"
    for index, machine in enumerate(machines):
        assert machine.lines[0].startswith(f"machine {index} of 2 (") and "[NODE_RANK, NNODES, MASTER_ADDR" in machine.lines[0]
    assert "2 machines, 2 processes on each" in machines[0].output


@pytest.mark.parametrize("who", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_fails_ends_all_and_is_named_everywhere(start, who):
    machines = start(WAIT + f"if rank == {who}: raise RuntimeError('the loss is not a number')\n" + SLEEP)
    assert finish(machines) == [1, 1]
    for machine in machines:
        assert end(machine)[-1].startswith(f"error: process {who} of 2 (machine {who}, ")
        assert end(machine)[-1].endswith(") failed: RuntimeError: the loss is not a number")


def test_of_machines_that_fail_together_the_first_is_named(start):
    """The others fail because of it, and their launcher may notice that first."""
    body = WAIT + (
        "from common.errors import leave_cause\n"
        "if rank == 1:\n    leave_cause('OSError: no such device')\n    mark('failed')\n    time.sleep(0.3)\n"
        "else:\n    wait_for('failed', ranks=[1])\n    time.sleep(0.02)\n    leave_cause('RuntimeError: closed by peer')\n"
        "sys.exit(1)\n"
    )
    machines = start(body)
    assert finish(machines) == [1, 1]
    assert end(machines[0])[-1].endswith("OSError: no such device") and "process 1 of 2" in end(machines[0])[-1]


def test_a_killed_rank_is_the_cause_of_what_it_does_to_others(start):
    body = WAIT + (
        "if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "while os.path.exists(f'/proc/{(folder / \"up_1\").read_text()}/exe'): time.sleep(0.001)\n"
        "raise RuntimeError('connection closed by peer')\n"
    )
    machines = start(body)
    assert finish(machines) == [137, 137]
    assert "process 1 of 2 (machine 1, " in end(machines[0])[-1] and "was killed by SIGKILL (out of memory?" in end(machines[0])[-1]


def test_a_users_mistake_in_the_ranks_is_one_line(start):
    machines = start(WAIT + "raise UserError('training.eps: got -1, must be positive')\n")
    assert finish(machines) == [2, 2]
    assert end(machines[0]) == end(machines[1]) == ["error: training.eps: got -1, must be positive"]


@pytest.mark.parametrize("who", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_launcher_that_is_killed_is_a_lost_machine(start, who):
    machines = start(WAIT + SLEEP)
    machines[0].wait_for(lambda: all(machine.ranks() for machine in machines))
    os.kill(machines[who].process.pid, signal.SIGKILL)
    codes = finish(machines)
    assert codes[who] == -signal.SIGKILL and codes[1 - who] == 1
    assert end(machines[1 - who])[-1].startswith(f"error: machine {who} (")
    assert "is lost: its connection broke" in end(machines[1 - who])[-1]


def test_a_machine_that_falls_silent_is_lost(start):
    """Stopped as by a power cut: the connection stays, nothing comes. Both sides end by themselves."""
    machines = start(WAIT + SLEEP)
    machines[0].wait_for(lambda: all(machine.ranks() for machine in machines))
    began = time.monotonic()
    os.kill(machines[1].process.pid, signal.SIGSTOP)
    assert machines[0].wait(20) == 1 and time.monotonic() - began < 10
    assert "error: machine 1 (" in end(machines[0])[-1] and "nothing heard of it for 2 s" in end(machines[0])[-1]
    machines[0].assert_nothing_is_left()
    os.kill(machines[1].process.pid, signal.SIGCONT)
    assert finish(machines)[1] == 1


@pytest.mark.parametrize("who", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_ctrl_c_reaches_every_rank_once_and_is_waited_for(start, who, tmp_path):
    body = """
count = []
signal.signal(signal.SIGINT, lambda *_: count.append(1))
mark("up")
while not count: time.sleep(0.01)
time.sleep(0.4)  # a checkpoint is written
(folder / f"count_{rank}").write_text(str(len(count)))
"""
    machines = start(body)
    machines[0].wait_for(lambda: all((tmp_path / f"up_{rank}").exists() for rank in range(2)))
    for machine in [machines[who], *machines[:who]]:  # Slurm sends it to every machine
        os.kill(machine.process.pid, signal.SIGINT)
        time.sleep(0.2)
    assert finish(machines) == [0, 0]
    assert [(tmp_path / f"count_{rank}").read_text() for rank in range(2)] == ["1", "1"]


def test_ctrl_c_says_how_to_go_on(start, tmp_path):
    machines = start(WAIT + "mark('waited')\n" + SLEEP)
    machines[0].wait_for(lambda: all((tmp_path / f"waited_{rank}").exists() for rank in range(2)))
    os.kill(machines[0].process.pid, signal.SIGINT)
    assert finish(machines) == [130, 130]
    assert end(machines[0])[-1] == "interrupted; start the same command again to go on"


def test_a_second_ctrl_c_kills_everywhere(start, tmp_path):
    machines = start("signal.signal(signal.SIGINT, lambda *_: mark('asked'))\nmark('up')\nwhile True: time.sleep(0.01)\n")
    machines[0].wait_for(lambda: all((tmp_path / f"up_{rank}").exists() for rank in range(2)))
    os.kill(machines[0].process.pid, signal.SIGINT)
    machines[0].wait_for(lambda: all((tmp_path / f"asked_{rank}").exists() for rank in range(2)))
    os.kill(machines[0].process.pid, signal.SIGINT)
    assert finish(machines) == [137, 137]


def test_sigterm_ends_all(start):
    machines = start(WAIT + SLEEP)
    machines[0].wait_for(lambda: all(machine.ranks() for machine in machines))
    os.kill(machines[1].process.pid, signal.SIGTERM)
    assert finish(machines) == [143, 143]


# ---- who is refused before anything starts ------------------------------------------------------------------------------------


def refused(machines: list[Machine], about: str) -> None:
    assert finish(machines) == [2, 2], machines[0].output
    assert [len(end(machine)) for machine in machines] == [1, 1]
    assert end(machines[0])[0].startswith("error: machine 1 (") and about in end(machines[0])[0]
    assert about in end(machines[1])[0]


def test_another_version_of_a_package(start, tmp_path):
    patch = tmp_path / "elsewhere"
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(
        "import importlib.metadata as m\nf = m.version\nm.version = lambda n: '0.1' if n == 'accelerate' else f(n)\n"
    )
    machines = start(RUN, environment=[{}, {"PYTHONPATH": f"{patch}:{ROOT}"}])
    refused(machines, "has accelerate 0.1, machine 0 has ")
    assert not list(tmp_path.glob("ran_*"))


def test_another_version_of_the_code(start, tmp_path):
    """A plugin of its own under the same relative path."""
    for index in range(2):
        folder = tmp_path / f"machine_{index}"
        folder.mkdir()
        (folder / "plugin.py").write_text(f"version = {index}\n")
    machines = start(RUN, "experiment.plugins=[plugin.py]")
    refused(machines, "has another version of the code: plugin.py differs")
    assert not list(tmp_path.glob("ran_*"))


@pytest.mark.parametrize("there", ["nothing", "another"])
def test_a_machine_without_the_model(start, tmp_path, there):
    for index in range(2 if there == "another" else 1):
        model = tmp_path / f"machine_{index}" / "models" / "m"
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}" + " " * index)
    machines = start(RUN, "model.pretrained_model=./models/m")
    about = "has another model.pretrained_model, ./models/m" if there == "another" else "no directory ./models/m on this machine"
    refused(machines, about)


def test_a_machine_with_other_data(start, tmp_path):
    for index in range(2):
        (tmp_path / f"machine_{index}").mkdir()
        (tmp_path / f"machine_{index}" / "tasks.json").write_text(f'[{{"question": "{index}", "ground_truth_answer": "0"}}]')
    refused(start(RUN, "dataset.train_dataset=./tasks.json"), "has another dataset.train_dataset, ./tasks.json")


def test_a_mistake_on_one_machine_is_told_on_machine_0(start, tmp_path):
    config = tmp_path / "machine_0" / "own.yaml"
    config.parent.mkdir()
    config.write_text("experiment: {project: run}\nmodel: {pretrained_model: tiny-random, model_base: sdar}\n")
    machines = start(RUN, "config=own.yaml", "dataset.train_dataset=tiny_sort_train", "dataset.eval_dataset=tiny_sort_test")
    finish(machines)
    assert "error: machine 1 (" in machines[0].lines[-1] and "config=own.yaml: no such file" in machines[0].lines[-1]


MISTAKE = "error: training.epss: unknown setting on the command line (did you mean training.eps?)"


def test_a_mistake_in_the_config_is_said_before_places_are_asked_for(start, tmp_path):
    machine = Machine(tmp_path / "alone", [small_job(tmp_path, RUN), *SMALL_SETTINGS, "training.epss=1"], {})
    assert finish([machine]) == [2] and machine.lines == [MISTAKE]


@pytest.mark.parametrize("variables", ["generic", "of the reference's platform"])
def test_a_mistake_on_machine_0_alone_is_told_to_the_others(start, tmp_path, variables):
    environment = None
    if variables != "generic":  # they name every machine, but with system.launcher=none machine 0 starts none of them
        hosts = {"MLP_WORKER_0_HOST": "127.0.0.1", "MLP_WORKER_1_HOST": "127.0.0.1", "MLP_WORKER_0_PORT": str(free_port())}
        environment = [{**hosts, "MLP_ROLE_INDEX": str(index), "NODE_RANK": None} for index in range(2)]
    config = tmp_path / "machine_1" / "own.yaml"
    config.parent.mkdir()
    config.write_text("experiment: {project: run}\nmodel: {pretrained_model: tiny-random, model_base: sdar}\n")
    began = time.monotonic()
    settings = ["dataset.train_dataset=tiny_sort_train", "dataset.eval_dataset=tiny_sort_test", "system.launcher=none"]
    machines = start(RUN, "config=own.yaml", *settings, environment=environment)
    assert finish(machines) == [2, 2] and len(machines[0].lines) == 1
    assert machines[0].lines[-1] == machines[1].lines[-1] and "config=own.yaml: no such file" in machines[1].lines[-1]
    assert time.monotonic() - began < LATE_SECONDS, "nobody waits for anything else"


def test_a_mistake_in_the_config_is_one_line_on_every_machine(start):
    machines = start(RUN, "training.epss=1")
    assert finish(machines) == [2, 2]
    assert machines[0].lines == machines[1].lines == [MISTAKE]


def test_a_machine_that_does_not_come(start):
    machines = start(SLEEP, "system.start_timeout_seconds=1", number=1, environment=[{"NNODES": "2"}])
    assert finish(machines) == [2]
    assert "error: machine 1 (not yet heard of): not there after 1 s (system.start_timeout_seconds)" in machines[0].lines[-1]


def test_a_port_scanner_is_no_machine(start, tmp_path):
    (machine,) = start(RUN, number=1, environment=[{"NNODES": "2"}])
    machine.wait_for("machine 0 is 127.0.0.1")
    place = {name: environment_of(machine.process.pid)[name] for name in ("NNODES", "MASTER_ADDR", "MASTER_PORT")}
    with socket.create_connection(("127.0.0.1", int(place["MASTER_PORT"]))) as scanner:
        scanner.sendall(b"GET / HTTP/1.0\r\n\r\n")
        other = Machine(tmp_path / "machine_1", machine.process.args[1:], {**place, "NODE_RANK": "1"})
        assert finish([machine, other]) == [0, 0]
    assert sorted(path.name for path in tmp_path.glob("ran_*")) == ["ran_0", "ran_1"]


def test_one_machine_alone_needs_no_others(start, tmp_path):
    (machine,) = start(RUN, "experiment.num_node=1", number=1)
    assert finish([machine]) == [0]
    assert (tmp_path / "ran_-1").exists(), "a process of its own was started"


def test_the_number_of_machines_must_be_the_configs(start):
    machines = start(RUN, "experiment.num_node=4", "experiment.deepspeed_file=null")
    finish(machines)
    assert "experiment.num_node: got 4, but there are 2 machines, say NODE_RANK" in machines[0].lines[-1]

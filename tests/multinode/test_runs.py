"""Whole jobs on two machines: what they leave is what two ranks on one host leave, bit for bit, whoever starts them.

Only machine 0 has a run directory. With rollout.deterministic both deal out prompts by index, so that every sum is rounded alike.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from common.metrics import read_metrics
from common.records import read_rollouts
from tests.distributed.harness import ROOT
from tests.jobs.conftest import content
from tests.multinode.harness import Machine, free_port, on_loopback
from tests.multinode.hosts import Hosts, two_hosts, why_not

PLUGIN = Path(__file__).with_name("plugin.py")
HOSTS, SSH = (pytest.mark.skipif(why_not(ssh) is not None, reason=str(why_not(ssh))) for ssh in (False, True))
TWO = ["experiment.num_node=2", "experiment.num_processes=1"]
ON_ONE_HOST = ["experiment.num_node=1", "experiment.num_processes=2"]
SCRIPTS = {"rl": "multinode_rl.py", "eval": "multinode_eval.py", "sft": "train/sft_sdar.py"}
SCRIPTS_OF_ONE = {**SCRIPTS, "rl": "rl.py", "eval": "eval.py"}
WAYS = ["loopback", pytest.param("hosts", marks=HOSTS), pytest.param("ssh", marks=SSH)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets of a few tasks: train.json, test.json."""
    folder = tmp_path_factory.mktemp("data")
    for name, number in [("train", 14), ("test", 5)]:
        records = json.loads((ROOT / "data" / f"tiny_sort_{name}.json").read_text())[:number]
        (folder / f"{name}.json").write_text(json.dumps(records))
    return folder


def settings(job: str, data: Path, **changes: Any) -> list[str]:
    common = {
        "config": {"rl": "configs/rl_tiny.yaml", "eval": "configs/tiny_eval.yaml", "sft": "configs/sft_tiny.yaml"}[job],
        "experiment.project": "run",
        "experiment.plugins": f"[{PLUGIN}]",
        "model.pretrained_model": "tiny-random",
        "dataset.eval_dataset": data / "test.json",
        "rollout.deterministic": "true",
        "evaluation.deterministic": "true",
        "system.silence_timeout_seconds": 3,
    }
    own: dict[str, dict[str, Any]] = {
        "rl": {
            "dataset.data_type": "characters",
            "dataset.train_dataset": data / "train.json",
            "model.prepare_config": "null",
            "model.value_base_model": "tiny-random",
            "optimizer.params.value_learning_rate": 1e-3,
            "optimizer.params.learning_rate": 2e-3,
            "experiment.total_step": 3,
            "experiment.save_every": 3,
            "experiment.eval_every": 2,
            "experiment.save_state_every": 1,
            "reward.keep_solve_rate": "[0,1]",
            "reward.overlong_margin": "null",
            "rollout.num_task_per_step": 4,
            "rollout.num_response_per_task": 4,
            "training.num_updates_per_step": 2,
        },
        "sft": {
            "dataset.optimization_data": data / "train.json",
            "training.max_steps": 4,
            "training.batch_size": 4,
            "training.eval_every": 2,
            "training.stop_at_solve_rate": "null",
        },
        "eval": {"evaluation.num_response_per_task": 2},
    }
    merged = {**common, **own[job], **{name.replace("__", "."): value for name, value in changes.items()}}
    return [f"{key}={value}" for key, value in merged.items()]


def left(run: Path) -> dict[str, Any]:
    """What a run has left, weights and optimizer states put together: which rank writes which file is its own affair."""
    found, state = {name: what for name, what in content(run).items() if not name.endswith("config.yaml")}, {}
    for name in [name for name in found if "/trained_" in name]:
        folder = name.rpartition("/")[0]
        state.setdefault(folder, {}).update(found.pop(name))
    return found | state


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name


Finished = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def on_one_host(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """What two ranks on one host leave, by job; each is run once."""
    done: dict[str, dict[str, Any]] = {}

    def finished(job: str) -> dict[str, Any]:
        if job not in done:
            machine = Machine(
                tmp_path_factory.mktemp(f"one_host_{job}") / "machine",
                [str(ROOT / SCRIPTS_OF_ONE[job]), *settings(job, data), *ON_ONE_HOST],
                {},
            )
            assert machine.wait() == 0, machine.output
            done[job] = left(machine.folder / "run")
        return done[job]

    return finished


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with two_hosts(tmp_path) as hosts:
        yield hosts


class Job:
    """Starts a job in one of the ways, and ends what it has started."""

    def __init__(self, folder: Path, data: Path, request: pytest.FixtureRequest) -> None:
        self.folder, self.data, self.request = folder, data, request
        self.machines: list[Machine] = []
        self.ssh_settings: list[str] | None = None

    def __call__(self, way: str, job: str, environment: dict[str, str] | None = None, **changes: Any) -> list[Machine]:
        """The launchers: of both machines, or of machine 0 that starts the other's."""
        command = [str(ROOT / SCRIPTS[job]), *settings(job, self.data, **changes), *TWO]
        if way == "loopback":
            machines = on_loopback(self.folder, command, environment=[environment or {}] * 2)
        else:
            hosts: Hosts = self.request.getfixturevalue("hosts")
            if way == "hosts":
                machines = hosts.start_everywhere(command, environment)
            else:
                if self.ssh_settings is None:
                    self.ssh_settings = hosts.start_sshd(hidden=self.hidden())
                machines = [hosts.start_by_ssh([*command, *self.ssh_settings], environment)]
        self.machines += machines
        return machines

    def hidden(self) -> Path:
        """ssh begins in the folder that the job was started in: machine 1 sees an empty one there."""
        (self.folder / "alpha").mkdir(exist_ok=True)
        return self.folder / "alpha"

    def run_directory(self, way: str) -> Path:
        return self.folder / ("machine_0" if way == "loopback" else "alpha") / "run"

    def on_other_machine(self, way: str) -> list[str]:
        """What machine 1 has written, beside what it has compiled."""
        folder = self.folder / ("machine_1" if way == "loopback" else "beta")
        files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
        return sorted(str(file) for file in files if file.parts[0] != "log" and file.parts[:2] != ("run", "cache"))


@pytest.fixture
def job(tmp_path: Path, data: Path, request: pytest.FixtureRequest) -> Iterator[Job]:
    job = Job(tmp_path, data, request)
    yield job
    for machine in job.machines:
        machine.kill()


def finish(machines: list[Machine], timeout_seconds: float = 120.0) -> None:
    for machine in machines:
        assert machine.wait(timeout_seconds) == 0, f"{machine.output}\n---\n{machines[0].output}"
        machine.assert_nothing_is_left()


@pytest.mark.parametrize("way", ["loopback", *(pytest.param(p.values[0], marks=[*p.marks, pytest.mark.slow]) for p in WAYS[1:])])
@pytest.mark.parametrize("kind", ["rl", pytest.param("eval", marks=pytest.mark.slow), pytest.param("sft", marks=pytest.mark.slow)])
def test_two_machines_do_what_two_ranks_do(job: Job, on_one_host: Finished, way: str, kind: str):
    finish(job(way, kind))
    expected = on_one_host(kind)
    assert_equal(left(job.run_directory(way)), expected)
    assert job.on_other_machine(way) == []
    if kind == "rl":
        again = job(way, kind)
        finish(again)
        assert again[0].lines[-1].startswith("finished: weights in run/ckpt/optimized") and len(again[0].lines) < 4
        assert_equal(left(job.run_directory(way)), expected)
        rows = expected["metrics.jsonl"]
        assert [row["train/skipped"] for row in rows] == [0, 0, 0] and rows[2]["value/num_updates"] == 2
        assert min(row["train/gradient_norm"] for row in rows) > 0
    if way == "ssh":
        hosts: Hosts = job.request.getfixturevalue("hosts")
        hosts.on_second().assert_nothing_is_left()


# ---- faults, and going on ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.slow
def test_a_machine_dies_and_the_run_goes_on(job: Job, on_one_host: Finished, who: int):
    """All of it at once, as a power cut: launcher and ranks."""
    machines = job("loopback", "rl")
    machines[0].wait_for("step 1/")
    machines[who].kill()
    other = machines[1 - who]
    assert other.wait(60) == 1
    assert f"error: machine {who} (" in other.lines[-1] and "is lost: its connection broke" in other.lines[-1]
    other.assert_nothing_is_left()
    finish(job("loopback", "rl"))
    assert_equal(left(job.run_directory("loopback")), on_one_host("rl"))


PLACES = ["rollout:2", "reward:2", "update:2", "evaluation:2", "state_begun:2", "checkpoint_half_written:3"]


@HOSTS
@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_the_network_breaks_and_the_run_goes_on(job: Job, hosts: Hosts, on_one_host: Finished, tmp_path: Path, place: str):
    """In every phase of a step: both ends notice, name the other, leave nothing, and the next start ends where it should."""
    environment = {"CUT_AT": place, "CUT_MARKER": str(tmp_path / "cut")}
    machines = job("hosts", "rl", environment)
    assert [machine.wait(120) for machine in machines] == [1, 1], machines[0].output
    assert (tmp_path / "cut").exists()
    assert "error: machine 1 (beta) is lost: nothing heard of it for 3 s" in machines[0].lines[-1]
    assert "error: machine 0 (10.213.7.1) is lost: nothing heard of it for 3 s" in machines[1].lines[-1]
    for machine in machines:
        machine.assert_nothing_is_left()
    hosts.connect()
    finish(job("hosts", "rl", environment))
    assert_equal(left(job.run_directory("hosts")), on_one_host("rl"))


@HOSTS
@pytest.mark.slow
def test_an_evaluation_ends_when_the_network_breaks(job: Job, hosts: Hosts, on_one_host: Finished):
    machines = job("hosts", "eval", evaluation__num_response_per_task=400)
    machines[0].wait_for(lambda: "2 machines" in machines[0].output and bool(machines[1].ranks()))
    hosts.cut()
    assert [machine.wait(60) for machine in machines] == [1, 1]
    assert "machine 1 (beta) is lost" in machines[0].lines[-1]
    for machine in machines:
        machine.assert_nothing_is_left()


@pytest.mark.slow
@pytest.mark.parametrize("zero", [None, "zero2", "zero3"])
def test_one_machine_two_machines_one_machine(job: Job, data: Path, tmp_path: Path, zero: str | None):
    """The tasks come in the order of the unbroken run, and every bit of the state is where the others left it (test_state.py)."""

    def deepspeed(machines: int) -> dict[str, Any]:
        if zero is None:
            return {}
        file = tmp_path / f"{machines}.yaml"
        file.write_text(f"distributed_type: DEEPSPEED\nnum_machines: {machines}\nnum_processes: {machines}\n")
        with open(file, "a") as out:
            out.write(f"deepspeed_config: {{zero_stage: {zero[-1]}}}\n")
        return {"experiment.deepspeed_file": file}

    def one_machine(project: str, kill_at: str | None = None) -> int:
        killing = {"KILL_AT": kill_at, "KILL_MARKER": str(tmp_path / kill_at)} if kill_at is not None else {}
        command = [str(ROOT / "rl.py"), *settings("rl", data, **six, **deepspeed(1))]
        machine = Machine(tmp_path / project, command, killing)
        job.machines.append(machine)
        return machine.wait()

    six = {"experiment.total_step": 6, "experiment.save_every": 6, "experiment.eval_every": 6}
    assert one_machine("unbroken") == 0
    assert one_machine("machine_0", "updated:3") == -signal.SIGKILL
    killing = {"KILL_AT": "updated:5", "KILL_MARKER": str(tmp_path / "updated:5")}
    machines = job("loopback", "rl", killing, **six, **deepspeed(2))
    assert [machine.wait() for machine in machines] == [137, 137], machines[0].output
    assert "going on with run behind step 2" in machines[0].output
    assert one_machine("machine_0") == 0
    runs = [tmp_path / name / "run" for name in ("unbroken", "machine_0")]
    for step in range(1, 7):
        tasks = [[r.task_id for r in read_rollouts(run / "rollouts" / f"step_{step:06d}.jsonl")] for run in runs]
        assert tasks[0] == tasks[1] and len(set(tasks[0])) == 4
    right, found = (read_metrics(run) for run in runs)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    for key in ("train/gradient_norm", "train/learning_rate", "rollout/reward", "value/mean"):
        for step in range(6):
            assert found[step][key] == pytest.approx(right[step][key], rel=2e-2, abs=2e-3), (step, key)


@pytest.mark.slow
def test_accelerate_launches_finetuning(data: Path, tmp_path: Path):
    """`accelerate launch --num_machines 2`, once on each machine: no launcher of ours, the same weights."""
    shipped = (ROOT / "accelerate_configs" / "2_node_8_gpus_deepspeed_zero2.yaml").read_text()
    file = tmp_path / "two.yaml"
    of_two = shipped.replace("num_processes: 16", "num_processes: 2")
    file.write_text(of_two.replace("mixed_precision: bf16", "mixed_precision: 'no'"))
    port, machines = free_port(), []
    for index in range(2):
        options = ["--machine_rank", str(index), "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
        script = [str(ROOT / SCRIPTS["sft"]), *settings("sft", data), "experiment.num_node=2"]
        command = ["-m", "accelerate.commands.launch", "--config_file", str(file), *options, *script]
        machines.append(Machine(tmp_path / f"machine_{index}", command, {"GLOO_SOCKET_IFNAME": "lo"}))
    try:
        finish(machines)
    finally:
        for machine in machines:
            machine.kill()
    zero2 = "experiment.deepspeed_file=1_node_2_gpus_deepspeed_zero2"
    command = [str(ROOT / SCRIPTS["sft"]), *settings("sft", data), *ON_ONE_HOST, zero2]
    one_host = Machine(tmp_path / "one_host", command, {})
    finish([one_host])
    assert_equal(left(tmp_path / "machine_0" / "run"), left(tmp_path / "one_host" / "run"))
    assert [path for path in (tmp_path / "machine_1").rglob("*.*") if path.is_file()] == []

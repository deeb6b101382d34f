"""The launcher's promises, with ranks that are small scripts: who ends, how, what is said, and that nobody is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import deepspeed_files, launch
from common.errors import UserError
from configs.schema import Config
from tests.distributed.harness import ROOT, clean_environment

HEADER = """
import os, signal, sys, time
from pathlib import Path
rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
def mark(name): (folder / f"{name}_{rank}").write_text(str(os.getpid()))
def wait_for(name, ranks=(0, 1)):
    files = [folder / f"{name}_{r}" for r in ranks]  # there is one before anything is in it
    while not all(file.exists() and file.read_text() for file in files): time.sleep(0.01)
"""


def start(tmp_path: Path, body: str, *arguments: str, num_processes: int = 2) -> subprocess.Popen:
    """The launcher, in a process of its own, running `body` as a script in every rank."""
    script = tmp_path / "job.py"
    script.write_text(HEADER + body)
    command = [sys.executable, str(script), str(tmp_path), *arguments]
    launcher = f"import sys; from common.launch import run_ranks; sys.exit(run_ranks({command!r}, {num_processes}))"
    return subprocess.Popen(
        [sys.executable, "-c", launcher],
        cwd=ROOT,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, timeout_seconds: float = 30) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout_seconds)
    finally:
        process.kill()
    return process.returncode, out, err


def wait_for_file(path: Path, timeout_seconds: float = 20) -> str:
    deadline = time.monotonic() + timeout_seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)
    return path.read_text()


def is_alive(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def assert_all_end(pids: list[str], timeout_seconds: float = 10) -> None:
    deadline = time.monotonic() + timeout_seconds
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, f"left behind: {alive}"
        time.sleep(0.02)


def test_every_rank_gets_its_place_and_all_arguments(tmp_path):
    body = """
names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
(folder / f"out_{rank}").write_text("|".join([*(os.environ[n] for n in names), *sys.argv[2:]]))
"""
    code, _, err = finish(start(tmp_path, body, "training.eps=0.3", "rollout.stop_token_list=['<|a|>', 'b c']"))
    assert (code, err) == (0, "")
    first, second = ((tmp_path / f"out_{rank}").read_text().split("|", 6) for rank in range(2))
    assert first[4] == second[4] != ""  # one port for both
    assert first[:4] == ["2", "2", "0", "127.0.0.1"] and second[:4] == ["2", "2", "1", "127.0.0.1"]
    assert first[5:] == second[5:] == ["1", "training.eps=0.3|rollout.stop_token_list=['<|a|>', 'b c']"]


def test_a_rank_that_dies_ends_the_others_and_is_named(tmp_path):
    body = """
mark("up"); wait_for("up")
from common.errors import entry_point
@entry_point
def main():
    if rank == 1: raise RuntimeError("the loss is not a number")
    time.sleep(60)
main()
"""
    began = time.monotonic()
    code, _, err = finish(start(tmp_path, body))
    assert code == 1 and time.monotonic() - began < 20
    assert "Traceback" in err  # of the rank itself
    assert err.splitlines()[-1] == "error: process 1 of 2 failed: RuntimeError: the loss is not a number"
    assert_all_end([(tmp_path / f"up_{rank}").read_text() for rank in range(2)])


def test_of_ranks_that_fail_together_the_first_is_named(tmp_path):
    body = """
mark("up"); wait_for("up")
from common.errors import leave_cause
if rank == 1:
    leave_cause("OSError: disk full")
    mark("failed")
    time.sleep(0.3)
else:
    wait_for("failed", ranks=[1])
    time.sleep(0.02)
    leave_cause("RuntimeError: connection closed by peer")
sys.exit(1)
"""
    code, _, err = finish(start(tmp_path, body))
    assert (code, err) == (1, "error: process 1 of 2 failed: OSError: disk full\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_rank_that_is_seen_to_die_late_is_still_the_cause(tmp_path, monkeypatch, number):
    """Its peers notice before the system lets go of it, and say so: here the launcher looks away from the dead one meanwhile."""
    body = f"""
from common.errors import leave_cause
if rank == 0:
    mark("up"); os.kill(os.getpid(), {int(number)})
wait_for("up", ranks=[0])
leave_cause("RuntimeError: connection closed by peer")
sys.exit(1)
"""
    script = tmp_path / "job.py"
    script.write_text(HEADER + body)
    running = launch._Ranks._running
    late = lambda self: sorted({*running(self), *([] if self.failed else [0])})  # noqa: E731
    monkeypatch.setattr(launch._Ranks, "_running", late)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert launch.run_ranks([sys.executable, str(script), str(tmp_path)], 2) == 128 + number


def test_a_killed_rank_is_reported_by_its_signal(tmp_path):
    code, _, err = finish(start(tmp_path, "\nif rank == 0: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)\n"))
    assert code == 128 + signal.SIGKILL
    assert err == "error: process 0 of 2 was killed by SIGKILL (out of memory? see dmesg)\n"


@pytest.mark.parametrize("who", ["rank >= 0", "rank == 1"])
def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path, who):
    body = f"""
from common.errors import UserError, entry_point
@entry_point
def main():
    if {who}: raise UserError("training.eps: got -1, must be positive")
    time.sleep(60)
main()
"""
    code, out, err = finish(start(tmp_path, body))
    assert (code, out, err) == (2, "", "error: training.eps: got -1, must be positive\n")


def test_a_rank_that_failed_but_does_not_end_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.3)
    body = """
import threading
from common.errors import entry_point
@entry_point
def main():
    if rank == 1:
        threading.Thread(target=time.sleep, args=(60,)).start()  # holds the interpreter
        raise RuntimeError("boom")
    time.sleep(60)
main()
"""
    script = tmp_path / "job.py"
    script.write_text(HEADER + body)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    began = time.monotonic()
    assert launch.run_ranks([sys.executable, str(script), str(tmp_path)], 2) == 1
    assert time.monotonic() - began < 20


def test_ctrl_c_reaches_each_rank_once_and_is_waited_for(tmp_path):
    body = """
count = 0
def note(*_):
    global count
    count += 1
signal.signal(signal.SIGINT, note)
mark("up")
while count == 0: time.sleep(0.01)
time.sleep(0.5)  # a checkpoint is written
(folder / f"count_{rank}").write_text(str(count))
"""
    process = start(tmp_path, body)
    for rank in range(2):
        wait_for_file(tmp_path / f"up_{rank}")
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 0
    assert err == "Ctrl-C: waiting for the processes to end; press it again to kill them\n"
    assert [(tmp_path / f"count_{rank}").read_text() for rank in range(2)] == ["1", "1"]


def test_ctrl_c_says_how_to_go_on_once(tmp_path):
    body = """
from common.errors import entry_point
@entry_point
def main():
    mark("up")
    time.sleep(60)
main()
"""
    process = start(tmp_path, body)
    for rank in range(2):
        wait_for_file(tmp_path / f"up_{rank}")
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert err.splitlines()[1:] == ["interrupted; start the same command again to go on"]


def test_ctrl_c_before_a_rank_can_say_so(tmp_path):
    """While it still imports."""
    process = start(tmp_path, "\nsignal.signal(signal.SIGINT, signal.SIG_DFL)\nmark('up')\ntime.sleep(60)\n")
    for rank in range(2):
        wait_for_file(tmp_path / f"up_{rank}")
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130 and err.splitlines()[1:] == ["interrupted; start the same command again to go on"]


def test_a_second_ctrl_c_kills(tmp_path):
    body = """
signal.signal(signal.SIGINT, lambda *_: mark("asked"))
mark("up")
while True: time.sleep(0.01)
"""
    process = start(tmp_path, body)
    pids = [wait_for_file(tmp_path / f"up_{rank}") for rank in range(2)]
    process.send_signal(signal.SIGINT)
    for rank in range(2):
        wait_for_file(tmp_path / f"asked_{rank}")
    process.send_signal(signal.SIGINT)
    code, _, _ = finish(process)
    assert code == 128 + signal.SIGKILL
    assert_all_end(pids)


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_rank_outlives_the_parent(tmp_path, number):
    process = start(tmp_path, "\nmark('up')\ntime.sleep(60)\n")
    pids = [wait_for_file(tmp_path / f"up_{rank}") for rank in range(2)]
    assert all(is_alive(pid) for pid in pids)
    process.send_signal(number)
    finish(process)
    assert_all_end(pids)


def test_what_a_rank_started_goes_with_it(tmp_path):
    body = """
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
(folder / f"child_{rank}").write_text(str(child.pid))
wait_for("child")
sys.exit(1)
"""
    code, _, _ = finish(start(tmp_path, body))
    assert code == 1
    assert_all_end([(tmp_path / f"child_{rank}").read_text() for rank in range(2)])


# ---- how many ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_launcher(monkeypatch):
    for name in (*launch._LAUNCHERS_VARIABLES, "RANK", "WORLD_SIZE", "UNMASK_TOLD"):
        monkeypatch.delenv(name, raising=False)


def config_of(num_processes: int | None = None, deepspeed_file: str | None = None) -> Config:
    config = Config()
    config.experiment.num_processes, config.experiment.deepspeed_file = num_processes, deepspeed_file
    return config


@pytest.mark.parametrize(
    "gpus, num_processes, deepspeed_file, expected",
    [
        (0, None, None, None),
        (0, None, "1_node_8_gpus_deepspeed_zero3", None),
        (0, 1, None, None),
        (0, 2, None, 2),
        (1, None, None, None),
        (4, None, None, 4),
        (4, 2, "1_node_8_gpus_deepspeed_zero3", 2),
        (4, None, "1_node_8_gpus_deepspeed_zero3", 4),
        (8, None, "1_node_2_gpus_deepspeed_zero2", 2),
        (4, 1, None, None),
    ],
)
def test_number_of_processes(monkeypatch, no_launcher, gpus, num_processes, deepspeed_file, expected):
    monkeypatch.setattr(launch, "visible_gpus", lambda: gpus)
    assert launch.needs_launch(config_of(num_processes, deepspeed_file)) == expected


def test_more_processes_than_gpus(monkeypatch, no_launcher):
    monkeypatch.setattr(launch, "visible_gpus", lambda: 4)
    with pytest.raises(UserError, match=r"experiment.num_processes: 8 processes asked for, but 4 GPUs are visible"):
        launch.needs_launch(config_of(8))


@pytest.mark.parametrize("name", launch._LAUNCHERS_VARIABLES)
def test_a_launched_process_does_not_launch_again(monkeypatch, no_launcher, name):
    monkeypatch.setenv(name, "1")
    assert launch.needs_launch(config_of(2)) is None


@pytest.mark.parametrize("size, expected", [("1", 8), ("", 8), ("4", None)])
def test_a_job_operators_environment_is_no_launcher(monkeypatch, no_launcher, size, expected):
    """It says which machine of how many this is. Of several machines one process each may have been meant."""
    monkeypatch.setattr(launch, "visible_gpus", lambda: 8)
    for name, value in {"RANK": "0", "WORLD_SIZE": size, "MASTER_ADDR": "job-0", "MASTER_PORT": "23456"}.items():
        monkeypatch.setenv(name, value)
    assert launch.needs_launch(config_of()) == expected


def test_what_torchrun_and_accelerate_set(tmp_path):
    """Both, with one process and with two, are found."""
    script = tmp_path / "job.py"
    script.write_text("from common.launch import already_launched\nprint('launched', already_launched(), flush=True)\n")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    accelerate = ["-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes"]
    for line in ([*torchrun, "1"], [*torchrun, "2"], [*accelerate, "1"]):
        command = [sys.executable, *line, str(script)]
        done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=120)
        assert done.stdout.split() == ["launched", "True"] * (2 if line[-1] == "2" else 1), done.stderr
    alone = subprocess.run([sys.executable, str(script)], cwd=ROOT, env=clean_environment(), capture_output=True, text=True)
    assert alone.stdout.split() == ["launched", "False"]


def test_gpus_that_are_left_out_are_said(monkeypatch, no_launcher, capsys):
    monkeypatch.setattr(launch, "visible_gpus", lambda: 8)
    for _ in range(2):  # once
        assert launch.processes_on_this_machine(config_of(None, "1_node_4_gpus_deepspeed_zero3")) == 4
    expected = "warning: 4 of 8 GPUs are used: experiment.deepspeed_file=1_node_4_gpus_deepspeed_zero3 names 4: name a file of 8, "
    assert capsys.readouterr().err == expected + "or set experiment.num_processes=8\n"
    assert launch.processes_on_this_machine(config_of(4, "1_node_4_gpus_deepspeed_zero3")) == 4
    assert launch.processes_on_this_machine(config_of(None, "1_node_8_gpus_deepspeed_zero3")) == 8
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "allowed, expected",
    [(None, 4), ("", 0), ("-1", 0), ("0", 1), ("2,3", 2), ("0,1,-1,2", 2), ("GPU-abc,GPU-def", 2), ("0,1,2,3,4,5", 4)],
)
def test_visible_gpus(monkeypatch, tmp_path, allowed, expected):
    fake = tmp_path / "nvidia-smi"
    fake.write_text('#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: NVIDIA H200 (UUID: GPU-$i)"; done\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(launch.importlib.metadata, "version", lambda name: "2.13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if allowed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    assert launch.visible_gpus() == expected


def test_the_cpu_build_of_torch_sees_no_gpus(monkeypatch):
    monkeypatch.setattr(launch.importlib.metadata, "version", lambda name: "2.13.0+cpu")
    assert launch.visible_gpus() == 0


def test_the_parent_does_not_import_torch():
    code = (
        "import sys, common.launch, common.deepspeed_files as files\n"
        "files.read_deepspeed_file('1_node_8_gpus_deepspeed_zero3')\n"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "False\n"


# ---- accelerate_configs/ ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", deepspeed_files.deepspeed_file_names())
def test_the_name_of_a_file_says_what_is_in_it(name):
    file = deepspeed_files.read_deepspeed_file(name)
    offload = "_offload" if file.offload_optimizer == "cpu" else ""
    per_machine = file.num_processes // file.num_machines  # accelerate counts those of all machines
    assert name == f"{file.num_machines}_node_{per_machine}_gpus_deepspeed_zero{file.zero_stage}{offload}"
    assert deepspeed_files.read_deepspeed_file(f"{name}.yaml") == deepspeed_files.read_deepspeed_file(str(file.path)) == file


@pytest.mark.parametrize("name", ["1_node_8_gpu_deepspeed_zero3", "zero3", "nothing like it"])
def test_a_missing_file_names_the_closest_that_exist(name):
    with pytest.raises(UserError) as error:
        deepspeed_files.read_deepspeed_file(name)
    line = str(error.value)
    assert f"no file {name!r} in accelerate_configs/, where there is " in line and "\n" not in line and len(line) < 300
    named = [file for file in deepspeed_files.deepspeed_file_names() if file in line.replace(",", " ").split()]
    assert 1 <= len(named) <= 4
    if name.startswith("1_node"):
        assert "where there is 1_node_8_gpus_deepspeed_zero3, " in line


@pytest.mark.parametrize("content", ["a: [", "just text", "deepspeed_config: {zero_stage: 4}", "distributed_type: MULTI_GPU"])
def test_a_file_that_is_none(tmp_path, content):
    path = tmp_path / "own.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match="own.yaml") as error:
        deepspeed_files.read_deepspeed_file(str(path))
    assert "\n" not in str(error.value)


WRONG_IN_A_FILE = {
    "num_processes: two": "num_processes: got 'two', must be a whole number of at least 1",
    "num_processes: 0": "num_processes: got 0, must be a whole number of at least 1",
    "num_machines: 1.5": "num_machines: got 1.5, must be a whole number of at least 1",
    "num_machines: true": "num_machines: got True, must be a whole number of at least 1",
    "offload_optimizer_device: gpu": "offload_optimizer_device: got 'gpu', which is no place: set it to none or cpu",
    "offload_param_device: [cpu]": "offload_param_device: got ['cpu'], which is no place: set it to none or cpu",
    "offload_optimizer_device: nvme": "offload_optimizer_device: got 'nvme', which is not supported: what is offloaded goes to the "
    "host's memory: set it to none or cpu",
}


@pytest.mark.parametrize("line", WRONG_IN_A_FILE)
def test_a_file_with_a_mistake_is_one_line(tmp_path, line):
    path = tmp_path / "own.yaml"
    path.write_text("deepspeed_config: {zero_stage: 2" + (f", {line}}}\n" if line.startswith("offload") else f"}}\n{line}\n"))
    with pytest.raises(UserError) as error:
        deepspeed_files.read_deepspeed_file(str(path))
    assert str(error.value) == f"experiment.deepspeed_file: {path}: {WRONG_IN_A_FILE[line]}"


def test_a_job_with_a_mistake_in_its_file_ends_with_2(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("num_processes: two\ndeepspeed_config: {zero_stage: 2}\n")
    line = [sys.executable, "rl.py", "config=configs/rl_tiny.yaml", f"experiment.deepspeed_file={path}"]
    project = [f"experiment.project={tmp_path / 'run'}", "model.pretrained_model=tiny-random", "model.prepare_config=null"]
    job = subprocess.run([*line, *project], cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=120)
    assert job.returncode == 2 and job.stderr.startswith("error: experiment.deepspeed_file: ") and job.stderr.count("\n") == 1

"""Which machine this is, from the variables of whoever started it; what config, DeepSpeed file and machines must agree on."""

from __future__ import annotations

import json
import socket
from types import SimpleNamespace

import pytest

from common.deepspeed_files import read_deepspeed_file
from common.errors import UserError
from common.launch import needs_launch
from common.nodes import find_place, first_host
from common.nodes_check import machine_report
from common.nodes_link import Wire
from common.nodes_remote import Remote
from common.nodes_start import interface_of, passed_environment
from configs.load import load_config

MASTER = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
MLP = {"MLP_WORKER_0_HOST": "a", "MLP_WORKER_1_HOST": "b", "MLP_WORKER_2_HOST": "c", "MLP_WORKER_0_PORT": "2222"}
SLURM = {"SLURM_NODEID": "2", "SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_NODELIST": "gpu[03-06]", "SLURM_JOB_ID": "1234567"}
TORCHRUN = {"RANK": "3", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "1"}


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"NODE_RANK": "1", "NNODES": "2", **MASTER}, (1, 2, "10.0.0.1", 29500)),
        ({"NODE_RANK": "0", "NNODES": "2", **MASTER, **SLURM}, (0, 2, "10.0.0.1", 29500)),  # set by hand: it counts
        ({"PET_NODE_RANK": "3", "PET_NNODES": "4", "RANK": "3", "WORLD_SIZE": "4", **MASTER}, (3, 4, "10.0.0.1", 29500)),
        ({"GROUP_RANK": "3", **TORCHRUN, **MASTER}, (3, 4, "10.0.0.1", 29501)),
        ({"MLP_ROLE_INDEX": "2", "MLP_WORKER_NUM": "3", **MLP}, (2, 3, "a", 2222)),
        ({"MLP_ROLE_INDEX": "0", **MLP}, (0, 3, "a", 2222)),
        (SLURM, (2, 4, "gpu03", 24567)),
        ({**SLURM, **MASTER}, (2, 4, "10.0.0.1", 29500)),
        ({"UNMASK_MACHINE_0": "10.0.0.1:77", "CROSS_RANK": "1", "CROSS_SIZE": "3", **MASTER}, (2, 4, "10.0.0.1", 77)),
    ],
)
def test_places(environment, expected):
    place = find_place(environment)
    assert (place.index, place.number, place.address, place.port) == expected
    assert f"machine {place.index} of {place.number}" in place.describe() and expected[2] in place.describe()
    assert place.hosts == (("a", "b", "c") if "MLP_ROLE_INDEX" in environment else ())
    assert place.started_by_machine_0 == ("UNMASK_MACHINE_0" in environment)


@pytest.mark.parametrize(
    "environment, message",
    [
        ({}, "no variable says which machine this is: set NODE_RANK"),
        ({"NODE_RANK": "1", "NNODES": "2"}, "MASTER_PORT: is missing"),
        ({"NODE_RANK": "1", **MASTER}, "NNODES: is missing"),
        ({"NODE_RANK": "one", "NNODES": "2", **MASTER}, "NODE_RANK: got 'one', expected a whole number"),
        ({"NODE_RANK": "2", "NNODES": "2", **MASTER}, "this is machine 2 of 2, counted from 0"),
        ({"NODE_RANK": "1", "NNODES": "2", **MASTER, "MASTER_PORT": "70000"}, "it must be from 1 to 65535"),
        ({"GROUP_RANK": "1", **TORCHRUN, **MASTER, "LOCAL_WORLD_SIZE": "8"}, "torchrun has started 8 processes on this machine"),
        ({"MLP_ROLE_INDEX": "1"}, "MLP_WORKER_0_HOST: is missing"),
        ({"MLP_ROLE_INDEX": "1", "MLP_WORKER_NUM": "4", **MLP}, "MLP_WORKER_3_HOST: is missing"),
        ({"SLURM_NNODES": "2", "SLURM_NODEID": "0"}, "start the command with srun"),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "32"}, "got 32 on 4 machines: start one task per machine"),
    ],
)
def test_variables_that_say_too_little(environment, message):
    with pytest.raises(UserError) as error:
        find_place(environment)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "nodelist, expected",
    [
        ("gpu03", "gpu03"),
        ("gpu[03-06,9],login1", "gpu03"),
        ("a,b", "a"),
        ("rack[1,3]-node", "rack1-node"),
        ("c-12,c-[13-14]", "c-12"),
    ],
)
def test_the_first_of_a_list_of_slurm(nodelist, expected):
    assert first_host(nodelist) == expected


def test_what_the_other_machines_get(monkeypatch):
    here = {"HTTP_PROXY": "p", "NCCL_DEBUG": "INFO", "HF_TOKEN": "secret", "MINE_1": "x", "NCCL_SOCKET_IFNAME": "e"}
    for name, value in here.items():
        monkeypatch.setenv(name, value)
    passed = passed_environment([])
    assert passed["HTTP_PROXY"] == "p" and passed["NCCL_DEBUG"] == "INFO"
    assert not {"HF_TOKEN", "MINE_1", "NCCL_SOCKET_IFNAME", "PATH"} & passed.keys()
    assert {"MINE_1", "HF_TOKEN"} <= passed_environment(["MINE_*", "HF_TOKEN"]).keys()


def test_the_interface_of_an_address():
    assert interface_of("127.0.0.1") == "lo" and interface_of("192.0.2.1") is None and interface_of("::1") is None


def test_lines_come_whole_however_they_are_cut():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        reader = Wire(listener.accept()[0])
    content = b"".join(json.dumps({"kind": "x", "n": n, "text": "é" * n}).encode() + b"\n" for n in range(40))
    received = []
    for start in range(0, len(content), 7):
        one.sendall(content[start : start + 7])
        received += reader.receive()
    one.close()
    while reader.is_open:
        received += reader.receive()
    assert [(m["n"], m["text"]) for m in received] == [(n, "é" * n) for n in range(40)]


def test_pdsh_goes_on_but_the_machine_that_it_does_not_reach_is_named():
    remote = Remote.__new__(Remote)
    remote.hosts, remote.of, remote._read = ("a", "b", "c"), [[1, 2]], lambda: None
    remote.processes = [SimpleNamespace(poll=lambda: None, returncode=None)]
    remote.held = [[b"b: [2026] [INFO] hello", b"c: ssh: connect to host c port 22: No route to host"]]
    assert remote.absent() == {}
    remote.held[0] += [b"pdsh@a: c: ssh exited with exit code 255"]
    assert remote.absent() == {2: "cannot be started: ssh: connect to host c port 22: No route to host"}


@pytest.mark.parametrize("machines", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("stage", [2, 3])
def test_there_is_a_file_for_every_size(machines, stage):
    file = read_deepspeed_file(f"{machines}_node_8_gpus_deepspeed_zero{stage}")
    assert (file.num_machines, file.num_processes, file.zero_stage) == (machines, 8 * machines, stage)
    of_machines = [f"experiment.num_node={machines}", f"experiment.deepspeed_file={file.path.stem}"]
    load_config("rl", ["config=configs/rl_trado.yaml", *of_machines])


def test_machines_report_the_models_that_the_job_reads(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    gone = f"{tmp_path}/gone"
    models = ["model.pretrained_model=owner/name", f"model.value_base_model={gone}", f"model.process_reward_model={gone}"]
    config = load_config("eval", ["config=configs/tiny_eval.yaml", *models])
    assert machine_report("eval", config, 1)["models"] == {"model.pretrained_model": ""}
    with pytest.raises(UserError, match=f"^model.value_base_model: no directory {gone} on this machine"):
        machine_report("rl", config, 1)


def test_a_file_for_another_number_of_machines():
    with pytest.raises(UserError, match="which is for 4 machines, but experiment.num_node is 2: name the file of 2_node"):
        load_config("rl", ["config=configs/multinode_rl_trado.yaml", "experiment.deepspeed_file=4_node_8_gpus_deepspeed_zero3"])
    with pytest.raises(UserError, match="which is for 1 machine, but experiment.num_node is 2"):
        load_config("rl", ["config=configs/rl_trado.yaml", "experiment.num_node=2"])


def test_a_command_for_one_machine_says_what_is_for_several(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    config = load_config("rl", ["config=configs/multinode_rl_trado.yaml"])
    with pytest.raises(UserError, match="experiment.num_node: got 2, but this command is for one machine: start multinode_rl.py"):
        needs_launch(config)


# ---- files of the reference -----------------------------------------------------------------------------------------------------

SYSTEM = """
system:
    HTTP_PROXY: "http://proxy:3128"
    HF_HOME: "/cache/hf"
    envs_dir: "/envs"
    env_name: "dllm"
    base_dir: "/code/dLLM-RL"
"""
RL = """
experiment:
    project: "multinode_rl_{family}"
    function: "train"
    start_from_scratch: True
    total_step: 150
    save_every: 10
    eval_every: 10
    current_epoch: 1
    deepspeed_file: "{machines}_node_8_gpus_deepspeed_zero{stage}"
    num_node: {machines}
    node_index: 0
model:
    pretrained_model: "/models/m"
    model_base: "{family}"
    optimized_name: "optimized"
    {value}
dataset:
    train_dataset: "MATH_train"
    optimization_data: "rl_data"
    eval_dataset: "MATH500"
    data_type: "math"
rollout:
    num_task_per_step: 512
    num_response_per_task: 16
    {decoding}
training:
    gradient_accumulation_steps: 1
    batch_size_lm: 2
    mixed_precision: "bf16"
    method: "TraceRL"
    block_size: 4
    shrink: 1
    post_num: 1
    max_prompt_len: 784
    eps: 0.2
    beta: 0.0
optimizer:
    name: adamw
    params:
        {rates}
        scale_lr: False
evaluation:
    if_eval: True
    num_response_per_task: 3
    temperature: 1.0
    {decoding}
"""
EVAL = """
experiment:
    project: "{family}_multinode_eval"
    num_node: 4
    node_index: 0
model: "/models/m"
model_base: "{family}"
dataset:
    eval_dataset: "MATH500"
    data_type: "math"
rollout:
    num_response_per_task: 3
    temperature: 1.0
    output_unmasking_history: True
    {decoding}
execute:
    num_chunk: 128
"""
BLOCK = "{tensor_parallel_size: 1, max_active: 256, max_token: 2000, block_size: 4, denoising_steps_per_block: 4}"
FULL = "{steps: 256, max_gen_length: 256, block_size: 32, use_cache: True, further_horizon: 128}"
FAMILIES = {"trado": BLOCK, "sdar": BLOCK, "dream": FULL, "llada": FULL, "mmada": FULL}


def inlined(settings: str) -> str:
    return "\n    ".join(settings.strip("{}").split(", "))


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.delenv("UNMASK_TOLD", raising=False)

    def write(text: str) -> str:
        (tmp_path / "file.yaml").write_text(text)
        return f"config={tmp_path / 'file.yaml'}"

    return write


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("has_value", [False, True])
def test_rl_files_of_the_reference_load(family, has_value, written):
    value = 'value_base_model: "/models/m"\n    optimized_value_name: "optimized_value"' if has_value else ""
    rates = "policy_learning_rate: 1e-6\n        value_learning_rate: 5e-6" if has_value else "learning_rate: 1e-6"
    decoding = inlined(FAMILIES[family])
    text = RL.format(family=family, machines=2, stage=3, value=value, rates=rates, decoding=decoding) + SYSTEM
    config = load_config("rl", [written(text)])
    assert config.experiment.num_node == 2 and config.system.HF_HOME == "/cache/hf" and config.system.launcher == "auto"
    assert (config.model.value_base_model is not None) == has_value


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_files_of_the_reference_load(family, written):
    config = load_config("eval", [written(EVAL.format(family=family, decoding=inlined(FAMILIES[family])) + SYSTEM)])
    assert config.experiment.num_node == 4 and config.model.model_base == family

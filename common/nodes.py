"""Which machine of a job this is, how many there are, and where machine 0 is: read from the variables of whoever started it.

    variables                                                      of
    NODE_RANK, NNODES, MASTER_ADDR, MASTER_PORT                    yourself, a script, Kubernetes
    PET_NODE_RANK, PET_NNODES, MASTER_ADDR, MASTER_PORT            Kubeflow's PyTorchJob
    GROUP_RANK, GROUP_WORLD_SIZE, MASTER_ADDR, MASTER_PORT         torchrun with one process per machine
    MLP_ROLE_INDEX, MLP_WORKER_NUM, MLP_WORKER_<i>_HOST, MLP_WORKER_0_PORT    the platform that the reference's job files are for
    SLURM_NODEID, SLURM_STEP_NUM_NODES, SLURM_STEP_NODELIST        srun with one task per machine (MASTER_ADDR, MASTER_PORT win)
    UNMASK_MACHINE_0, CROSS_RANK, CROSS_SIZE                       machine 0 of this very job, through DeepSpeed's launcher

The first row of which the first variable is there counts; the last one goes before all. One process per machine reads them; it
starts the ranks (common/launch.py).
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from typing import Mapping

from common.errors import UserError

STARTED_BY_MACHINE_0 = "UNMASK_MACHINE_0"
"""address:port of machine 0, for those that it has started (common/nodes_start.py)."""
VARIABLES = ("NODE_RANK", "PET_NODE_RANK", "GROUP_RANK", "MLP_ROLE_INDEX", "SLURM_NODEID")


@dataclass(frozen=True)
class Place:
    """One machine among those of a job."""

    index: int
    """From 0; machine 0 writes the run directory and its terminal hears of everything."""
    number: int
    """Machines."""
    address: str
    """Of machine 0, as the others reach it."""
    port: int
    """TCP port of machine 0 at which the others report."""
    source: str
    """The variables that say so, in words."""
    hosts: tuple[str, ...] = ()
    """Address of every machine, where the variables name them."""
    started_by_machine_0: bool = False
    """Whether its output is on machine 0's terminal already."""

    def describe(self) -> str:
        """The line that every machine prints at its start."""
        machine_0 = f"{self.address}, port {self.port}"
        return f"machine {self.index} of {self.number} ({socket.gethostname()}), machine 0 is {machine_0} [{self.source}]"


def find_place(environment: Mapping[str, str] = os.environ) -> Place:
    """The place of this machine. Raises UserError where no variables say it, or where they say nonsense."""
    env = environment
    if STARTED_BY_MACHINE_0 in env:
        address, _, port = env[STARTED_BY_MACHINE_0].rpartition(":")
        # Machine 0 is not among those that it starts.
        index, number = _number(env, "CROSS_RANK") + 1, _number(env, "CROSS_SIZE") + 1
        return Place(index, number, address, int(port), "started by machine 0", started_by_machine_0=True)
    if "NODE_RANK" in env:
        return _check(_named(env, "NODE_RANK", "NNODES"))
    if "PET_NODE_RANK" in env:
        return _check(_named(env, "PET_NODE_RANK", "PET_NNODES"))
    if "GROUP_RANK" in env:
        if env.get("LOCAL_WORLD_SIZE") != "1":
            raise UserError(
                f"LOCAL_WORLD_SIZE: torchrun has started {env.get('LOCAL_WORLD_SIZE')} processes on this machine: start one "
                "(--nproc-per-node 1), which starts the others, or run rl.py under torchrun"
            )
        # torchrun's agent listens at MASTER_PORT itself.
        return _check(_named(env, "GROUP_RANK", "GROUP_WORLD_SIZE", port_offset=1))
    if "MLP_ROLE_INDEX" in env:
        index = _number(env, "MLP_ROLE_INDEX")
        named = [name for name in env if re.fullmatch(r"MLP_WORKER_\d+_HOST", name)]
        number = _number(env, "MLP_WORKER_NUM") if "MLP_WORKER_NUM" in env else len(named)
        hosts = tuple(_text(env, f"MLP_WORKER_{i}_HOST") for i in range(number))
        if not hosts:
            raise UserError("MLP_WORKER_0_HOST: is missing, beside MLP_ROLE_INDEX: it is the address of machine 0")
        source = "MLP_ROLE_INDEX, MLP_WORKER_<i>_HOST, MLP_WORKER_0_PORT"
        return _check(Place(index, number, hosts[0], _number(env, "MLP_WORKER_0_PORT"), source, hosts))
    if "SLURM_STEP_NUM_NODES" in env:
        return _check(_of_slurm(env))
    if int(env.get("SLURM_NNODES", "1")) > 1:
        raise UserError(
            f"SLURM_NNODES: {env['SLURM_NNODES']} machines are allotted, but this is no step on them: "
            "start the command with srun --ntasks-per-node=1"
        )
    raise UserError(
        "no variable says which machine this is: set NODE_RANK, NNODES, MASTER_ADDR and MASTER_PORT on every machine, or start "
        "the job with srun or torchrun (docs/multinode.md)"
    )


def _named(env: Mapping[str, str], index: str, number: str, port_offset: int = 0) -> Place:
    source = f"{index}, {number}, MASTER_ADDR, MASTER_PORT"
    port = _number(env, "MASTER_PORT") + port_offset
    return Place(_number(env, index), _number(env, number), _text(env, "MASTER_ADDR"), port, source)


def _of_slurm(env: Mapping[str, str]) -> Place:
    if env.get("SLURM_STEP_NUM_TASKS", env["SLURM_STEP_NUM_NODES"]) != env["SLURM_STEP_NUM_NODES"]:
        raise UserError(
            f"SLURM_STEP_NUM_TASKS: got {env['SLURM_STEP_NUM_TASKS']} on {env['SLURM_STEP_NUM_NODES']} machines: start one task "
            "per machine (srun --ntasks-per-node=1), which starts a process per GPU"
        )
    address = env.get("MASTER_ADDR") or first_host(_text(env, "SLURM_STEP_NODELIST"))
    # Two jobs that share a machine must not meet at one port.
    port = _number(env, "MASTER_PORT") if "MASTER_PORT" in env else 20_000 + _number(env, "SLURM_JOB_ID") % 10_000
    source = "SLURM_NODEID, SLURM_STEP_NUM_NODES, SLURM_STEP_NODELIST"
    return Place(_number(env, "SLURM_NODEID"), _number(env, "SLURM_STEP_NUM_NODES"), address, port, source)


def first_host(nodelist: str) -> str:
    """The first machine of Slurm's short form: `gpu[03-06,9],login1` -> gpu03."""
    name = re.match(r"([^,\[]*)(?:\[([^\]]*)\])?([^,\[]*)", nodelist)
    assert name is not None
    prefix, ranges, suffix = name[1], name[2], name[3]
    return prefix + (re.split(r"[-,]", ranges)[0] if ranges else "") + suffix


def _text(env: Mapping[str, str], name: str) -> str:
    if not env.get(name):
        raise UserError(f"{name}: is missing among the variables that say which machine this is (docs/multinode.md)")
    return env[name]


def _number(env: Mapping[str, str], name: str) -> int:
    text = _text(env, name)
    if not re.fullmatch(r"\d+", text.strip()):
        raise UserError(f"{name}: got {text!r}, expected a whole number (docs/multinode.md)")
    return int(text)


def _check(place: Place) -> Place:
    if place.index >= place.number:
        raise UserError(f"this is machine {place.index} of {place.number}, counted from 0, say {place.source}: mend them")
    if not 0 < place.port < 65536:
        raise UserError(f"port {place.port} of machine 0, say {place.source}: it must be from 1 to 65535")
    return place

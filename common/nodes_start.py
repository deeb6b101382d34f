"""A job on several machines: its launcher on each of them, which start the ranks (common/launch.py) once all are there and alike.

    run_on_all_machines("rl", rl.main)      # multinode_rl.py

Two ways in. (a) Machine 0 starts the same command on the others (`system.launcher`: ssh, pdsh; common/nodes_remote.py).
(b) Somebody else, Slurm, Kubernetes, torchrun, your own hands, has started it on all of them. From there on they are one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import struct
import sys
import time
from typing import TYPE_CHECKING, Callable

from common.errors import ERROR_FILE, INTERRUPTED, INTERRUPTED_CODE, UserError, entry_point
from common.launch import already_launched, die_with_parent, free_port
from common.nodes import STARTED_BY_MACHINE_0, Place, find_place
from common.nodes_check import difference, machine_report
from common.nodes_hub import Hub
from common.nodes_link import Left, Link, Spoke

if TYPE_CHECKING:
    from common.nodes_remote import Remote
    from configs.schema import Config

PASSED = (
    "HTTP_PROXY HTTPS_PROXY NO_PROXY ALL_PROXY http_proxy https_proxy no_proxy all_proxy HF_HOME HF_HUB_* HF_ENDPOINT "
    "HF_DATASETS_* TRANSFORMERS_* XDG_CACHE_HOME TORCH_* TORCHINDUCTOR_* TRITON_* CUDA_CACHE_* PYTORCH_* NCCL_* GLOO_* UCX_* DS_* "
    "OMP_NUM_THREADS TOKENIZERS_PARALLELISM UNMASK_TOLD"
).split()
"""Environment variables of machine 0 that the processes of the others get too; `system.pass_environment` names more."""
RANK_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE",
    "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE",
)  # fmt: skip
"""Of those who have started one launcher per machine: the ranks get their own."""


@entry_point
def run_on_all_machines(job: str, main: Callable[..., None], argv: list[str] | None = None) -> None:
    """Be this machine's launcher of a job, `main(argv, link)` wrapped by `entry_point`; or one of its ranks, where it is started as
    one. job: "rl" or "eval", for the config."""
    run: Callable[..., None] = main.__wrapped__  # type: ignore[attr-defined]  # mistakes are told to the other machines too
    argv = sys.argv[1:] if argv is None else argv
    if _is_rank() or {"--help", "-h", "--print-config"} & set(argv):
        run(argv)
        return
    _check_config(job, argv)
    place = find_place()
    if place.started_by_machine_0:
        die_with_parent(os.getppid())
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # set by DeepSpeed's launcher, which takes us for a rank
    else:
        print(place.describe(), flush=True)
        if place.hosts and place.index and _launcher(job, argv, place) != "none":
            _stay_idle(place)
    for name in [STARTED_BY_MACHINE_0, *RANK_VARIABLES, *(name for name in os.environ if name.startswith("TORCHELASTIC_"))]:
        os.environ.pop(name, None)
    if place.number == 1:
        run(argv)
        return
    link = Hub(place) if place.index == 0 else Spoke(place)
    try:
        if isinstance(link, Hub) and place.hosts and _launcher(job, argv, place) != "none":
            link.summon = lambda: _start_others(place, job, argv)
        run(argv, link)
        code, line = link.leave()  # it was over before it began
    except Left as left:
        code, line = left.code, left.line
        link.leave(code, line)
    except UserError as error:
        code, line = 2, f"error: {error}"
        if not place.started_by_machine_0:
            print(line, file=sys.stderr, flush=True)
        link.leave(code, line)
        sys.exit(code)
    except KeyboardInterrupt:
        link.leave(INTERRUPTED_CODE, INTERRUPTED)
        raise
    except SystemExit as end:  # the ranks have ended, or a preparation has failed
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        link.leave(code, None if code == 0 else "error: has ended before the start: see its output")
        raise
    except Exception as error:
        link.leave(1, f"error: {type(error).__name__}: {error}")
        raise
    if line is not None and not place.started_by_machine_0:
        print(line, file=sys.stderr, flush=True)
    sys.exit(code)


def _check_config(job: str, argv: list[str]) -> None:
    """Before all else, so that a mistake in the config is said at once: each machine finds the same by itself. One that machine 0
    has started says its own over the link."""
    from configs.load import load_config

    if STARTED_BY_MACHINE_0 in os.environ:
        return
    try:
        load_config(job, argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        with contextlib.suppress(UserError):  # no such place, nobody there
            place = find_place()
            # The mistake may be in this machine's file alone, and the others would wait for it.
            if place.number > 1 and (place.index or _others_start_alone(job, argv, place)):
                link = Spoke(place, only_leaves=True) if place.index else Hub(place)
                link.leave(2, f"error: {error}")
        sys.exit(2)


def is_for_all_machines(config: Config, link: Link | None) -> bool:
    """Whether a job that has no script of its own for several machines is to be put through `run_on_all_machines`: its config asks
    for them, and nobody has started its ranks."""
    is_rank = already_launched() and STARTED_BY_MACHINE_0 not in os.environ
    return config.experiment.num_node > 1 and link is None and not is_rank


def agree(link: Link, job: str, config: Config, num_processes: int) -> None:
    """Wait until all machines are there and alike, and take over what machine 0 says. Raises UserError, on machine 0, or Left."""
    report = machine_report(job, config, num_processes)
    if isinstance(link, Hub):
        go = link.start(
            report,
            check=lambda other: difference(other, report, config),
            timeout_seconds=config.system.start_timeout_seconds,
            silence_seconds=config.system.silence_timeout_seconds,
            free_port=lambda: free_port(""),
            environment=passed_environment(config.system.pass_environment),
        )
        print(f"{link.place.number} machines, {num_processes} processes on each; ranks meet at {go.address}:{go.port}", flush=True)
    else:
        assert isinstance(link, Spoke)
        go = link.start(report)
        # An environment of its own is this machine's to say; a shell that ssh has opened has none to speak of.
        wins = link.place.started_by_machine_0
        os.environ.update({name: value for name, value in go.environment.items() if wins or name not in os.environ})
    interface = interface_of(link.local_address())
    if interface is not None:
        # Left alone, gloo takes the address of the host's name (127.0.1.1 on Debian), and NCCL the first interface (docker0).
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def passed_environment(more: list[str]) -> dict[str, str]:
    """Variables of this process that the other machines get: PASSED and `more`, names or beginnings that end in *."""
    wanted = [*PASSED, *more]
    own_interfaces = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # alike on all machines or not: whoever sets them knows
    names = [name for name in os.environ if name in wanted or any(w[-1] == "*" and name.startswith(w[:-1]) for w in wanted)]
    return {name: os.environ[name] for name in names if name not in own_interfaces or name in more}


def interface_of(address: str) -> str | None:
    """The network interface that has this IPv4 address (Linux); None where none has."""
    if sys.platform != "linux" or ":" in address:
        return None
    get_address = 0x8915  # SIOCGIFADDR, linux/sockios.h
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, get_address, struct.pack("256s", name.encode()))
            except OSError:  # without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _is_rank() -> bool:
    """Whether a launcher that starts a process per GPU has started this one: ours, or another's that has put several here."""
    is_alone = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")) == "1"
    return ERROR_FILE in os.environ or ("LOCAL_RANK" in os.environ and not is_alone)


def _launcher(job: str, argv: list[str], place: Place) -> str:
    """`system.launcher`; auto: how machine 0 gets to the others whose addresses the variables name."""
    from common.nodes_remote import choose
    from configs.load import read_config

    return choose(read_config(job, argv).system.launcher)


def _others_start_alone(job: str, argv: list[str], place: Place) -> bool:
    """Whether somebody else starts the other machines, as far as the config says: maybe, where it cannot even be read."""
    try:
        return not place.hosts or _launcher(job, argv, place) == "none"
    except UserError:
        return True


def _start_others(place: Place, job: str, argv: list[str]) -> Remote:
    from common.nodes_remote import Remote
    from configs.load import read_config

    return Remote(place, read_config(job, argv).system, sys.argv[0], argv)


def _stay_idle(place: Place) -> None:
    """As the other machines of the reference's job do: be there, for machine 0 comes by ssh, until somebody ends this."""
    print(
        f"machine {place.index} is idle: machine 0 starts the processes here too (system.launcher=none: they start here)",
        flush=True,
    )
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    while True:
        time.sleep(3600)

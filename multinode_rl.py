"""Reinforcement learning on several machines: rl.py, started on all of them.

    python multinode_rl.py config=configs/multinode_rl_trado.yaml [section.key=value ...]

Either on every machine (Slurm, Kubernetes, torchrun, by hand), or on machine 0, which starts it on the others over ssh. Which
machine this is is read from the environment: docs/multinode.md.
"""

from __future__ import annotations

from common.nodes_start import run_on_all_machines
from rl import main

if __name__ == "__main__":
    run_on_all_machines("rl", main)

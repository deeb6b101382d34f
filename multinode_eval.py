"""Evaluation on several machines: eval.py, started on all of them.

    python multinode_eval.py config=configs/trado_multinode_eval.yaml [section.key=value ...]

Either on every machine (Slurm, Kubernetes, torchrun, by hand), or on machine 0, which starts it on the others over ssh. Which
machine this is is read from the environment: docs/multinode.md.
"""

from __future__ import annotations

from common.nodes_start import run_on_all_machines
from eval import main

if __name__ == "__main__":
    run_on_all_machines("eval", main)

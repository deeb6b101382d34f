"""Killed in any phase and started again, a run ends where the unbroken one ends, bit for bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import pytest

from tests.distributed.harness import ROOT, clean_environment
from tests.jobs.conftest import content, listing
from tests.jobs.fork_server import ForkServer

KILLER = Path(__file__).with_name("killer.py")

COMMON = {
    "experiment.plugins": f"[{KILLER}]",
    "experiment.total_step": 6,
    "experiment.save_every": 3,
    "dataset.data_type": "digits",
    "training.num_updates_per_step": 2,
    "optimizer.params.learning_rate": 2e-3,
    "lr_scheduler.scheduler": "cosine",
    "lr_scheduler.params.warmup_steps": 3,
    "logging.gradient_norms_every": 3,
}
SELDOM = {**COMMON, "experiment.save_state_every": 3}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    # A state behind every step.
    "every": ("rl", COMMON),
    # Two steps are done again from their rollouts; groups are drawn until enough are kept.
    "third": (
        "rl",
        {
            **COMMON,
            "experiment.save_state_every": 3,
            "experiment.save_every": 2,
            "training.seed": 1,
            "rollout.resample": "true",
            "reward.keep_solve_rate": "[0.2,0.8]",
        },
    ),
    # A critic with an optimizer and checkpoints of its own.
    "value": ("rl", {**COMMON, "model.value_base_model": "tiny-random", "optimizer.params.value_learning_rate": 1e-3}),
    # Random masks come again as they were; groups that teach nothing are replaced; several updates hold to one old policy.
    "coupled": ("rl", {**SELDOM, "training.method": "coupled", "training.mask_times_per_sample": 2}),
    "random_masking": ("rl", {**SELDOM, "training.method": "random_masking"}),
    "dipo": ("rl", {**SELDOM, "training.method": "DiPO", "rollout.num_response_per_task": 2}),
    "larger_block": ("rl", {**SELDOM, "model.block_size": 8, "training.block_size": 8}),
    # Full attention: rows of a response are drawn anew for every update; the caches of sampling die with their call.
    "canvas": (
        "rl",
        {
            **SELDOM,
            "config": "configs/rl_tiny_dream.yaml",
            "model.pretrained_model": "tiny-random",
            "dataset.data_type": "remainder",
            "rollout.cache": "prefix",
            "training.max_rows_per_response": 2,
        },
    ),
    "canvas_sft": (
        "sft",
        {
            "experiment.plugins": f"[{KILLER}]",
            "config": "configs/sft_tiny_llada.yaml",
            "model.pretrained_model": "tiny-random",
            "training.max_steps": 6,
            "experiment.save_state_every": 2,
        },
    ),
    "sft": (
        "sft",
        {
            **{key: COMMON[key] for key in COMMON if key not in ("training.num_updates_per_step", "experiment.total_step")},
            "training.max_steps": 6,
            "experiment.save_state_every": 2,
            "dataset.data_type": "exact",
        },
    ),
}
SCRIPTS = {"rl": "rl.py", "sft": "train/sft.py"}

Start = Callable[..., Any]


@pytest.fixture(scope="module")
def start(server: ForkServer, settings: Callable[..., list[str]]) -> Start:
    """start(variant, project, kill_at="", kill_by="kill", **changes)"""

    def start(variant: str, project: Path, kill_at: str = "", kill_by: str = "kill", **changes: Any) -> Any:
        job, own = VARIANTS[variant]
        env = {"KILL_AT": kill_at, "KILL_BY": kill_by, "KILL_MARKER": str(project) + ".killed"} if kill_at else {}
        return server.run(SCRIPTS[job], settings(job, project, {**own, **changes}), env)

    return start


@pytest.fixture(scope="module")
def unbroken(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What the unbroken run of a variant left; run once."""
    known: dict[str, dict[str, Any]] = {}

    def run(variant: str) -> dict[str, Any]:
        if variant not in known:
            project = tmp_path_factory.mktemp("unbroken") / "run"
            job = start(variant, project)
            assert job.code == 0, job.err
            known[variant] = content(project)
        return known[variant]

    return run


QUICK = {
    "every": ["update:3", "written_rounds_left:3", "checkpoint_between_renames:6", "state_begun:4"],
    "third": ["second_reward:5", "updated:6"],
    "coupled": ["updated:5"],
    "canvas": ["updated:5"],
    "sft": ["updated:5"],
}
"""Kills (the places are in killer.py) that every test run tries."""
SLOW = {
    "every": [
        "rollout:1",  # before anything was saved
        "rollout:4",
        "round_writing:3",
        "reward:3",
        "scored_not_written:3",
        "updated:3",
        "evaluation:4",
        "metrics_half_written:3",
        "metrics_not_state:3",
        "checkpoint_half_written:3",
        "checkpoint_half_written:6",
        "checkpoint_before_exchange:6",
        "checkpoint_after_exchange:6",
        "checkpoint_renamed:6",
        "state_begun:1",
        "state_without_counters:4",
        "state_not_renamed:4",
        "state_older_left:4",
        "report:6",
    ],
    "third": ["rollout:2", "rollout:5", "scored_not_written:5", "evaluation:4", "checkpoint_half_written:4", "state_begun:6"],
    "sft": ["update:4", "evaluation:4", "checkpoint_half_written:3", "state_begun:4"],
    "value": ["rollout:4", "update:3", "updated:5", "checkpoint_half_written:6", "state_without_counters:4"],
    "canvas": ["rollout:2", "update:5", "evaluation:4"],
    **{method: ["updated:5"] for method in ("random_masking", "dipo", "larger_block", "canvas_sft")},
}
CASES = [
    *[(variant, place) for variant, places in QUICK.items() for place in places],
    *[pytest.param(variant, place, marks=pytest.mark.slow) for variant, places in SLOW.items() for place in places],
]


@pytest.mark.parametrize("variant, kill_at", CASES, ids=lambda value: value.replace(":", "-"))
def test_killed_and_started_again(variant: str, kill_at: str, start: Start, unbroken: Any, tmp_path: Path):
    project = tmp_path / "run"
    killed = start(variant, project, kill_at)
    assert killed.code == -signal.SIGKILL, f"was not killed:\n{killed.out}\n{killed.err}"
    again = start(variant, project, kill_at)
    assert again.code == 0, again.err
    expected, found = unbroken(variant), content(project)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name


def test_the_runs_learn_something(unbroken: Any):
    """Else equality would say little: steps with updates, some with dropped groups, and several rounds where they are asked for."""
    for variant in ("every", "third", "canvas"):
        rows = unbroken(variant)["metrics.jsonl"]
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
        assert sum(row["train/skipped"] for row in rows) == 0
        assert all(row["train/gradient_norm"] > 0 for row in rows)
        assert len({row["train/learning_rate"] for row in rows}) == 6
        norms = [json.loads(line) for line in unbroken(variant)["gradient_norms.jsonl"].splitlines()]
        assert [(row["step"], row["optimizer_step"]) for row in norms] == [(2, 3), (3, 6), (5, 9), (6, 12)]
    third = unbroken("third")["metrics.jsonl"]
    assert max(row["rollout/dropped_groups"] for row in third) > 0
    assert max(row["rollout/num_groups"] for row in third) > 4


@pytest.mark.slow
def test_killed_twice_in_one_step(start: Start, unbroken: Any, tmp_path: Path):
    project = tmp_path / "run"
    for kill_at in ("second_reward:6", "updated:6"):
        Path(f"{project}.killed").unlink(missing_ok=True)
        assert start("third", project, kill_at).code == -signal.SIGKILL
    assert start("third", project).code == 0
    assert content(project) == unbroken("third")


@pytest.mark.parametrize("variant", ["every", pytest.param("sft", marks=pytest.mark.slow)])
def test_a_finished_run_says_so(variant: str, start: Start, tmp_path: Path):
    project = tmp_path / "run"
    first = start(variant, project)
    before = listing(project)
    again = start(variant, project)
    assert again.code == 0 and again.err == ""
    assert (
        again.out.splitlines()
        == [f"finished: weights in {project}/ckpt/optimized, curves in {project}/report.html"]
        == first.out.splitlines()[-1:]
    )
    assert listing(project) == before


@pytest.mark.slow
def test_a_finished_run_goes_on_to_more_steps(start: Start, tmp_path: Path):
    project = tmp_path / "run"
    assert start("every", project, **{"experiment.total_step": 2}).code == 0
    refused = start("every", project, **{"experiment.total_step": 3})
    assert refused.code == 2 and "experiment.total_step: 2 there, 3 here" in refused.err
    longer = start("every", project, **{"experiment.total_step": 3, "experiment.start_from_scratch": "false"})
    assert longer.code == 0, longer.err
    assert "behind step 2" in longer.out and "step 3/3" in longer.out


def test_nothing_is_left_to_do_by_other_settings(start: Start, tmp_path: Path):
    """The run is beyond, or at, the last step that they ask for: refused, and the first command still finds its run."""
    project, two = tmp_path / "run", {"experiment.total_step": 2, "lr_scheduler.params.warmup_steps": 0}
    assert start("every", project, **two).code == 0
    before = listing(project)
    for changes, last in [({**two, "experiment.total_step": 1}, 1), ({**two, "optimizer.params.learning_rate": 3e-3}, 2)]:
        refused = start("every", project, **{**changes, "experiment.start_from_scratch": "false"})
        assert refused.code == 2 and len(refused.error_lines) == 1, refused.err
        assert f"{project}: the run is at step 2 already, and with these settings it ends with step {last}: ask" in refused.err
        assert listing(project) == before
    again = start("every", project, **two)
    assert again.code == 0 and again.out.startswith("finished: ")


def test_a_moved_directory_goes_on(start: Start, unbroken: Any, tmp_path: Path):
    """Under another name, and written otherwise than it was."""
    project = tmp_path / "run"
    assert start("every", project, "updated:5").code == -signal.SIGKILL
    moved = project.rename(tmp_path / "moved")
    again = start("every", f"{tmp_path}/./moved/")
    assert again.code == 0 and f"going on with {moved} behind step 4" in again.out, again.err
    assert content(moved) == unbroken("every")


def test_other_settings_do_not_train_on_old_rollouts(start: Start, tmp_path: Path):
    """Going on with another config: rollouts beyond the state were drawn by weights that will not come again."""
    project = tmp_path / "run"
    assert start("third", project, "updated:6").code == -signal.SIGKILL
    assert len(list((project / "rollouts").glob("step_00000[456].jsonl"))) == 3
    changes = {"optimizer.params.learning_rate": 3e-2, "experiment.start_from_scratch": "false"}
    before = (project / "rollouts" / "step_000005.jsonl").read_bytes()
    assert start("third", project, **changes).code == 0
    assert (project / "rollouts" / "step_000005.jsonl").read_bytes() != before


@pytest.mark.parametrize("where", ["rollout:3", "update:3"])
def test_ctrl_c_ends_cleanly_and_the_run_goes_on(start: Start, unbroken: Any, tmp_path: Path, where: str):
    project = tmp_path / "run"
    stopped = start("every", project, where, "interrupt")
    assert stopped.code == 130
    assert stopped.error_lines[-1] == "interrupted; start the same command again to go on"
    assert "Traceback" not in stopped.err
    again = start("every", project)
    assert again.code == 0 and "going on with" in again.out
    assert content(project) == unbroken("every")


@pytest.mark.slow
def test_a_real_process(settings: Callable[..., list[str]], unbroken: Any, tmp_path: Path):
    """Without the fork server: killed at the shell's command, started again there."""
    project = tmp_path / "run"
    command = [sys.executable, "rl.py", *settings("rl", project, VARIANTS["every"][1])]
    killing = clean_environment(KILL_AT="update:3", KILL_MARKER=f"{project}.killed")
    assert subprocess.run(command, cwd=ROOT, env=killing, capture_output=True).returncode == -signal.SIGKILL
    again = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert content(project) == unbroken("every")

"""Metrics: hand-computed numbers, the file across kills and resumes, the sinks that may be missing, the terminal line."""

from __future__ import annotations

import errno
import json
import math
import sys
from types import SimpleNamespace

import pytest

from common.errors import UserError
from common.metrics import MetricsLog, is_deterministic, read_metrics, rollout_metrics, steps_of_blocks, tokens_per_forward
from common.records import ScoredRollout
from common.step_line import Clock, duration, fit_line, line_fields


def rollout(task="a", sample=0, prompt=3, steps=(1, 2, 2, 3, 3), num=4, finish="stop", forwards=3, entropy=None, **scores):
    n = len(steps)
    return ScoredRollout(
        task_id=task,
        sample=sample,
        prompt_ids=[1] * prompt,
        response_ids=list(range(n)),
        step_map=list(steps),
        logprobs=[-0.5] * n,
        entropy=list(entropy or [0.1] * n),
        num_response=num,
        finish=finish,
        num_forwards=forwards,
        weights_version=0,
        block_size=4,
        **scores,
    )


CONFIG = SimpleNamespace(wandb=SimpleNamespace(enabled=False), logging=SimpleNamespace(tensorboard=False))


def test_blocks_are_cut_on_absolute_positions():
    # prompt of 3: position 3 closes block 0, positions 4..7 are block 1
    assert steps_of_blocks(rollout()) == [1, 2]
    assert steps_of_blocks(rollout(prompt=0)) == [3, 1]
    assert steps_of_blocks(rollout(steps=(1, 0, 0, 0, 0))) == [1]  # a block of which nothing was revealed does not count


def test_blocks_of_a_canvas_are_counted_from_the_prompts_end():
    canvas = rollout(steps=(1, 2, 2, 3, 4, 4, 4, 0))  # 3 + 8 tokens: whole blocks of 4 behind the prompt alone
    assert canvas.block_origin == 3 and rollout().block_origin == rollout(prompt=4, steps=(1, 2, 3, 4)).block_origin == 0
    assert steps_of_blocks(canvas) == [3, 1]


def test_rollout_metrics_by_hand():
    scored = [
        rollout(sample=0, entropy=[1.0, 2.0, 3.0, 4.0, 99.0], reward=1.0, correct=True),
        rollout(
            sample=1,
            steps=(1, 2, 3, 4, 5, 0, 0, 0, 0),
            num=9,
            finish="length",
            forwards=5,
            entropy=[0.0] * 9,
            reward=-1.0,
            correct=False,
        ),
        rollout("b", steps=(1,), num=1, forwards=1, entropy=[2.0], reward=0.5, dropped="too easy"),
        rollout("b", 1, steps=(1,), num=1, forwards=1, entropy=[2.0], reward=0.5, dropped="too easy"),
        rollout("c", steps=(), num=0, finish="length", forwards=0, dropped="prompt too long"),
        rollout("d", steps=(1,), num=1, forwards=1, entropy=[2.0], dropped="too hard", correct=True),
        rollout("d", 1, steps=(1,), num=1, forwards=1, entropy=[2.0]),
    ]
    expected = {
        "rollout/num_responses": 7,
        "rollout/reward": (1 - 1 + 0.5 + 0.5 + 0 + 0) / 6,
        "rollout/response_length": (4 + 9 + 1 + 1 + 1 + 1) / 6,
        "rollout/response_length_max": 9,
        "rollout/num_tokens": 4 + 9 + 1 + 1 + 1 + 1,
        "rollout/cut_off_share": 1 / 6,
        "rollout/tokens_per_forward": (5 + 5 + 4) / (3 + 5 + 4),
        "rollout/solve_rate": 2 / 3,
        "rollout/steps_per_block": (1 + 2 + 1 + 4 + 4) / 8,
        "rollout/entropy": (1 + 2 + 3 + 4 + 4 * 2) / (4 + 5 + 4),  # the 99 lies behind the stop, the last four were never revealed
        "rollout/num_groups": 4,
        "rollout/dropped_responses": 4,
        "rollout/dropped_groups": 2,  # of d one response is left
        "rollout/dropped_groups_too_easy": 1,
        "rollout/dropped_groups_prompt_too_long": 1,
    }
    assert rollout_metrics(scored) == pytest.approx(expected)


def test_rollout_metrics_of_nothing_has_no_means():
    assert rollout_metrics([]) == {
        "rollout/num_responses": 0,
        "rollout/num_groups": 0,
        "rollout/dropped_responses": 0,
        "rollout/dropped_groups": 0,
    }
    assert tokens_per_forward([]) == 0


def test_is_deterministic():
    assert all(is_deterministic(key) for key in ("train/loss", "rollout/entropy", "gap/k3", "eval/x/accuracy", "step"))
    assert not any(is_deterministic(key) for key in ("time/rollout_seconds", "rate/rollout_tokens_per_second", "memory/peak_gib"))


def test_write_reads_back_and_joins_a_step(tmp_path, capsys):
    import numpy
    import torch

    log = MetricsLog(tmp_path / "run", CONFIG)
    third = 1 / 3
    log.write(
        1,
        {
            "train/loss": torch.tensor(third, dtype=torch.float64),
            "rollout/n": numpy.int64(3),
            "train/kl": float("nan"),
            "gap/max": math.inf,
        },
    )
    log.write(1, {"eval/x/accuracy": 0.5})
    log.write(2, {"train/loss": -1.0})
    assert read_metrics(tmp_path / "run") == [
        {"step": 1, "train/loss": third, "rollout/n": 3, "train/kl": None, "gap/max": None, "eval/x/accuracy": 0.5},
        {"step": 2, "train/loss": -1.0},
    ]
    error = capsys.readouterr().err
    assert error == "warning: step 1: not a finite number, written as null: train/kl, gap/max\n"


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = MetricsLog(tmp_path / "run", CONFIG, is_main=False)
    log.write(1, {"train/loss": 1.0})
    log.line(1, 2, {"train/loss": 1.0})
    log.truncate_after(0)
    log.close()
    assert not (tmp_path / "run").exists() and capsys.readouterr() == ("", "")


def test_resume_drops_later_steps_and_torn_lines(tmp_path):
    log = MetricsLog(tmp_path, CONFIG)
    for step in (1, 2, 3):
        log.write(step, {"train/loss": step / 3})
    whole = log.path.read_bytes().splitlines(keepends=True)
    with open(log.path, "ab") as file:
        file.write(b'{"step": 4, "train/lo')  # killed while writing
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    resumed = MetricsLog(tmp_path, CONFIG)
    assert log.path.read_bytes() == b"".join(whole)
    resumed.truncate_after(2)
    assert log.path.read_bytes() == b"".join(whole[:2])  # byte for byte: floats survive the round trip
    resumed.write(3, {"train/loss": 1.0})
    assert log.path.read_bytes() == b"".join(whole)
    resumed.truncate_after(7)
    assert log.path.read_bytes() == b"".join(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_bad_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[3]\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl line 2"):
        read_metrics(tmp_path)


def test_full_disk_is_one_line(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path, CONFIG)

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="metrics.jsonl: cannot be written .No space left on device.: free the disk"):
        log.write(1, {"train/loss": 1.0})


def test_missing_wandb_warns_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import wandb raises ImportError
    log = MetricsLog(tmp_path, SimpleNamespace(wandb=SimpleNamespace(enabled=True)))
    log.write(1, {"train/loss": 1.0})
    log.write(2, {"train/loss": 1.0})
    log.close()
    assert capsys.readouterr().err.count("warning: wandb is asked for but not installed") == 1
    assert len(read_metrics(tmp_path)) == 2


def test_wandb_gets_steps_and_its_run_is_taken_up_again(tmp_path, monkeypatch, capsys):
    calls, logged = [], []

    class Run:
        def log(self, values, step):
            if step == 3:
                raise ConnectionError("the network\nis down")
            logged.append((step, values))

        def finish(self):
            calls.append("finish")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: calls.append(options) or Run()))
    config = SimpleNamespace(wandb=SimpleNamespace(enabled=True, entity="team", run_id=None, resume="auto"))
    log = MetricsLog(tmp_path / "my_run", config)
    log.write(1, {"train/loss": 1.0, "train/kl": float("nan")})
    log.close()
    again = MetricsLog(tmp_path / "my_run", config)
    again.truncate_after(1)
    again.write(2, {"train/loss": 2.0})
    again.write(3, {"train/loss": 3.0})
    again.write(4, {"train/loss": 4.0})
    again.close()
    assert logged == [(1, {"train/loss": 1.0}), (2, {"train/loss": 2.0})]
    assert calls[1] == "finish" and len(calls) == 3  # a sink that failed is dropped, not finished
    assert calls[0]["id"] == calls[2]["id"] and calls[0]["project"] == "my_run" and calls[0]["entity"] == "team"
    error = capsys.readouterr().err
    assert error.count("warning: wandb") == 1 and "ConnectionError: the network is down" in error
    assert [row["step"] for row in read_metrics(tmp_path / "my_run")] == [1, 2, 3, 4]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, SimpleNamespace(logging=SimpleNamespace(tensorboard=True)))
    log.write(1, {"train/loss": 0.25})
    log.write(2, {"train/loss": 0.5})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.25), (2, 0.5)]


METRICS = {
    "rollout/solve_rate": 0.534,
    "rollout/reward": 0.07,
    "rollout/response_length": 213.4,
    "rollout/cut_off_share": 0.02,
    "rollout/tokens_per_forward": 1.944,
    "train/loss": -0.0123,
    "train/kl": 1.2e-4,
    "train/clip_fraction": 0.004,
    "train/gradient_norm": 0.53,
    "train/learning_rate": 1e-6,
    "gap/logprob_mean": 0.0031,
    "eval/MATH500/accuracy": 0.71,
    "time/rollout_seconds": 12.04,
    "time/reward_seconds": 1.0,
    "time/update_seconds": 20.3,
    "rate/rollout_tokens_per_second": 15_840.0,
}


def test_the_whole_line():
    assert fit_line(line_fields(7, 100, METRICS, eta_seconds=3725), None) == (
        "step   7/100  solved 53.4%  reward +0.070  length 213  cut 2%  1.94 tok/fwd  loss -0.0123  kl 0.00012  clip 0.4%  "
        "grad 0.53  lr 1e-06  gap 0.0031  MATH500 71.0%  rollout 12 + reward 1 + update 20.3 s  15.8k tok/s  eta 1h02m"
    )


def test_the_line_fits_a_terminal_and_keeps_what_matters():
    fields = line_fields(7, 100, METRICS, eta_seconds=3725)
    for columns in (60, 80, 100, 132):
        line = fit_line(fields, columns)
        assert len(line) < columns and "solved 53.4%" in line and line.startswith("step   7/100")
    assert fit_line(fields, 5) == "step   7/100"
    assert fit_line(line_fields(3, None, {"train/loss": 2.0, "train/kl": None}), None) == "step 3  loss +2.0000"


def test_line_is_printed_whole_where_there_is_no_terminal(tmp_path, capsys):
    MetricsLog(tmp_path, CONFIG).line(7, 100, METRICS)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "\x1b" not in out and "gap 0.0031" in out


def test_time_left_and_durations(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = Clock()
    now[0] = 110.0
    assert clock.eta_seconds(41, 50) == 90  # a resumed run: one step done in 10 s, nine to go
    now[0] = 130.0
    assert clock.eta_seconds(42, 50) == 15 * 8
    assert clock.eta_seconds(50, 50) == 0
    assert [duration(seconds) for seconds in (41.6, 185, 3725, 187_200)] == ["42s", "3m05s", "1h02m", "2d04h"]


def test_lines_are_json_lines(tmp_path):
    log = MetricsLog(tmp_path, CONFIG)
    log.write(1, {"a/b": 1})
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == [{"step": 1, "a/b": 1}]

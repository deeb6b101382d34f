import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from common.records import Task
from configs.load import load_config
from reward.judge import JudgedReward, NoOutcome, serve_command
from reward.judge_cache import judgement_key
from reward.judge_prompts import GradingPrompt, make_mark
from reward.scoring import Scorer
from tests.reward.judge_run import Letters, make_config, rollout
from tests.reward.judge_server import MODEL, JudgeServer, prompt_of, verdict_of

ROOT = Path(__file__).resolve().parents[2]
TASKS = {"a": Task("a", "which?", "12"), "b": Task("b", "who?", "7")}


# ---- the reward --------------------------------------------------------------------------------------------------------


def part_of(body):
    return re.search(r"===== (?:PART TO GRADE|RESPONSE) \w+ =====\n(.*)\n===== END", prompt_of(body), re.S)[1]


def by_letter(server, number, body):
    """a: excellent, b: bad; anything else is met with nonsense."""
    return {"a": "Verdict: 10", "b": "Verdict: 0"}.get(part_of(body)[0], "Who knows?")


def test_token_rewards_by_hand(tmp_path):
    tasks = {"a": Task("a", "which?", "aaaabbbbab"), "b": Task("b", "who?", "bbbb")}
    rollouts = [
        rollout("a", 0, "aaaabbbbab", behind="z", steps=[1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]),  # right; chunks + - +
        rollout("a", 1, "bbbb", steps=[1, 2, 3, 4, 4]),  # wrong; one chunk, its stop token joins it
    ]
    with JudgeServer(by_letter) as server:
        config = make_config(str(tmp_path), server.url, weight=0.5, outcome_weight=2.0)
        with Scorer(config, tasks, Letters()) as scorer:
            scored = scorer.score(rollouts)
            assert [s.correct for s in scored] == [True, False]
            judged = [(4 - 4 + 3) / 11, -1.0]
            assert [s.reward for s in scored] == pytest.approx([2.0 + 0.5 * judged[0], -0.5])
            assert [s.outcome for s in scored] == [2.0, 0.0]
            assert scored[0].token_rewards == pytest.approx([0.5 / 3] * 4 + [-0.5 / 3] * 4 + [0.5 / 3] * 3 + [0.0])
            assert scored[1].token_rewards == pytest.approx([-0.5 / 4] * 5)
            assert [s.advantage for s in scored] == pytest.approx([1.0, -1.0])
            assert len(server.requests) == 4 * 2
            metrics = scorer.metrics()
            assert metrics["judge/num_judgements"] == 8 and metrics["judge/cache_hit_share"] == 0
            assert metrics["judge/score"] == 0 and metrics["judge/unparsable_share"] == 0 and metrics["judge/seconds"] > 0
            assert scorer.metrics() == {}
            # Sums over two processes.
            counts = {"wanted": 12, "asked": 8, "graded": 6, "score": 1.0, "replies": 8, "seconds": 3.0, "processes": 2}
            both = scorer.reward.metrics(counts)
            assert both["judge/score"] == 1 / 6 and both["judge/cache_hit_share"] == pytest.approx(1 / 3)
            assert both["judge/seconds"] == 1.5

            assert scorer.score(rollouts) == scored and len(server.requests) == 8
            assert scorer.metrics()["judge/cache_hit_share"] == 1
        config.reward.judge.per_step = False
        with Scorer(config, tasks, Letters()) as scorer:  # another process: from disk
            assert scorer.score(rollouts)[0].token_rewards == [0.5] * 4 + [-0.5] * 4 + [0.5] * 3 + [0.0]
            assert len(server.requests) == 8
        # The solution so far is what precedes the part.
        second = next(prompt_of(body) for body in server.requests if part_of(body) == "bbbb" and "SO FAR" in prompt_of(body))
        assert re.search(r"SOLUTION SO FAR \w+ =====\naaaa\n|SOLUTION SO FAR \w+ =====\n\(nothing yet\)\n", second)


def test_one_grade_for_the_response(tmp_path):
    with JudgeServer(by_letter) as server:
        config = make_config(str(tmp_path), server.url, k_sample=1, granularity="response")
        config.dataset.data_type = "judge"
        tasks = {"a": Task("a", "write!", None)}
        texts = ["aaaabbbb", "bbbbbbb", "  \n", ""]
        responses = [rollout("a", n, text, "stop" if text else "length") for n, text in enumerate(texts)]
        with Scorer(config, tasks, Letters()) as scorer:
            scored = scorer.score(responses)
            assert [s.reward for s in scored] == [1.0, -1.0, 0.0, 0.0]
            assert all(s.correct is None and s.token_rewards is None and s.dropped is None for s in scored)
        assert sorted(part_of(body) for body in server.requests) == ["aaaabbbb", "bbbbbbb"]
        # In an evaluation the judge is asked where nothing else scores, and only there.
        with Scorer(config, tasks, Letters(), config.evaluation) as scorer:
            assert isinstance(scorer.reward, JudgedReward) and isinstance(scorer.reward.outcome, NoOutcome)
        config.dataset.data_type = "exact"
        with Scorer(config, tasks, Letters(), config.evaluation) as scorer:
            assert not isinstance(scorer.reward, JudgedReward)


def test_responses_that_are_not_shown_to_the_judge(tmp_path):
    """Those of groups that the solve rate drops anyway, and over-long ones, which get the worst score."""
    with JudgeServer(by_letter) as server:
        config = make_config(str(tmp_path), server.url, k_sample=1, weight=0.25)
        config.reward.keep_solve_rate, config.reward.overlong_margin, config.rollout.max_token = [0.2, 0.8], 0, 9
        tasks = {"a": Task("a", "?", "a"), "b": Task("b", "?", "b")}
        rollouts = [rollout("a", 0, "a"), rollout("a", 1, "a" + " " * 8), rollout("b", 0, "b"), rollout("b", 1, "b")]
        with Scorer(config, tasks, Letters()) as scorer:
            scored = scorer.score(rollouts)
        assert [s.dropped for s in scored] == [None, None, "solve rate above 0.8", "solve rate above 0.8"]
        assert [s.reward for s in scored] == [1.25, -0.25, 1.0, 1.0]
        assert [s.correct for s in scored] == [True, False, True, True]
        assert scored[1].token_rewards is None
        assert len(server.requests) == 1


def test_nonsense_is_asked_again_then_neutral(tmp_path, capsys):
    def behave(server, number, body):
        first_time = sum(part_of(one) == part_of(body) for one in server.requests) == 1
        return "Who knows?" if part_of(body).startswith("c") or (part_of(body)[0] == "d" and first_time) else "Verdict: 10"

    rollouts = [rollout("a", 0, "aaaaccccdddd")]
    with JudgeServer(behave) as server:
        config = make_config(str(tmp_path), server.url, k_sample=1, per_step=False, outcome_weight=0.0)
        with Scorer(config, TASKS, Letters()) as scorer:
            scored = scorer.score(rollouts)[0]
            assert scored.token_rewards == [1.0] * 4 + [0.0] * 4 + [1.0] * 5
            metrics = scorer.metrics()
            assert metrics["judge/unparsable_share"] == 4 / 6 and metrics["judge/num_without_verdict"] == 1
            assert "no verdict in 1 of 3 judgements, asked 3 times each" in capsys.readouterr().err
        assert len(server.requests) == 1 + 3 + 2
        seeds = [body["seed"] for body in server.requests if part_of(body) == "cccc"]
        assert len(set(seeds)) == 3
        with Scorer(config, TASKS, Letters()) as scorer:  # no judgement is one too
            assert scorer.score(rollouts)[0].token_rewards == scored.token_rewards
        assert len(server.requests) == 6


def test_long_solutions_are_cut_at_the_beginning(tmp_path):
    with JudgeServer() as server:
        config = make_config(str(tmp_path), server.url, k_sample=1, chunk=100)
        # Room for (1510 - 10 - 500) / 1.25 - 1 = 799 tokens: the part and seven chunks before it.
        config.rollout.reward_model.max_model_len, config.rollout.reward_model.max_generation_token = 1510, 10
        text = "".join(f"{n:04d}" for n in range(300))
        config.rollout.max_token = 10_000
        with Scorer(config, TASKS, Letters()) as scorer:
            scorer.score([rollout("a", 0, text)])
    shown = {}
    for body in server.requests:
        so_far = re.search(r"SO FAR \w+ =====\n(.*)\n===== PART", prompt_of(body), re.S)[1]
        shown[part_of(body)] = so_far
    parts = [text[n : n + 100] for n in range(0, 1200, 100)]
    assert shown[parts[0]] == "(nothing yet)" and shown[parts[3]] == "".join(parts[:3])
    assert shown[parts[11]] == "[the beginning is left out]\n" + "".join(parts[5:11])


# ---- kills -------------------------------------------------------------------------------------------------------------


def start_server(log, port=0, seconds=0.02):
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.reward.judge_server", str(port), str(log), str(seconds)], cwd=ROOT, stdout=subprocess.PIPE
    )
    return process, int(process.stdout.readline())


def start_run(port, project, number, **settings):
    arguments = [f"http://127.0.0.1:{port}/v1", str(project), str(number), json.dumps(settings)]
    command = [sys.executable, "-m", "tests.reward.judge_run", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


NUM_RESPONSES, NUM_JUDGEMENTS, CONCURRENCY = 12, 12 * 3 * 2, 4


@pytest.fixture(scope="module")
def expected():
    """What the server of these tests makes of the responses of judge_run."""
    result = []
    for n in range(NUM_RESPONSES):
        text = f"{n:04d}abcdefgh"
        rewards = []
        for start in range(0, 12, 4):
            prompt = GradingPrompt("which?", text[start : start + 4], make_mark(text), so_far=text[:start]).text()
            scores = []
            for sample in range(2):
                key = judgement_key(MODEL, prompt, {"temperature": 0.6, "max_tokens": 10000}, sample)
                scores.append((verdict_of(prompt, int(key[:8], 16) & 0x7FFFFFFF) - 5) / 5)
            rewards += [sum(scores) / 2] * (4 if start < 8 else 5)
        result.append(rewards)
    return result


def test_judge_killed_and_started_again_while_the_run_waits(tmp_path, expected):
    log = tmp_path / "log"
    server, port = start_server(log)
    run = start_run(port, tmp_path / "run", NUM_RESPONSES)
    try:
        wait_for(lambda: len(lines(log)) >= 20)
        kill(server)
        time.sleep(0.3)
        server, _ = start_server(log, port)
        out, err = run.communicate(timeout=60)
    finally:
        kill(server)
    assert run.returncode == 0, err
    assert np.allclose(json.loads(out), expected)
    answered = lines(log)
    # Written down by the server: at most the replies that were on their way when it died were asked for again.
    assert len(set(answered)) == NUM_JUDGEMENTS and len(answered) <= NUM_JUDGEMENTS + CONCURRENCY


def test_judge_that_stays_away_ends_the_run_and_nothing_is_lost(tmp_path, expected):
    log, file = tmp_path / "log", tmp_path / "run" / "judge" / "judgements.0.jsonl"
    server, port = start_server(log)
    run = start_run(port, tmp_path / "run", NUM_RESPONSES, retry_seconds=0.5)
    try:
        wait_for(lambda: len(lines(log)) >= 20)
    finally:
        kill(server)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 2
    kept = len(lines(file))
    assert kept >= 15 and f"Nothing is lost: {kept} judgements are kept in" in err.splitlines()[-1]
    second_log = tmp_path / "second"
    server, port = start_server(second_log)
    try:
        out, err = start_run(port, tmp_path / "run", NUM_RESPONSES).communicate(timeout=60)
    finally:
        kill(server)
    assert np.allclose(json.loads(out), expected)
    assert len(lines(second_log)) == NUM_JUDGEMENTS - kept


def test_run_killed_in_the_middle(tmp_path, expected):
    file = tmp_path / "run" / "judge" / "judgements.0.jsonl"
    server, port = start_server(tmp_path / "first")
    try:
        for target in (10, 30):
            run = start_run(port, tmp_path / "run", NUM_RESPONSES)
            wait_for(lambda target=target: len(lines(file)) >= target)
            kill(run)
    finally:
        kill(server)
    kept = file.read_bytes().count(b"\n")
    log = tmp_path / "second"
    server, port = start_server(log)
    try:
        out, err = start_run(port, tmp_path / "run", NUM_RESPONSES).communicate(timeout=60)
    finally:
        kill(server)
    assert np.allclose(json.loads(out), expected)
    assert 30 <= kept < NUM_JUDGEMENTS and len(lines(log)) == NUM_JUDGEMENTS - kept


# ---- settings and the command ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["reward.judge.base_url=localhost:8000"], "reward.judge.base_url"),
        (["dataset.data_type=judge"], "data_type.*reward.judge.base_url"),
        (["reward.judge.base_url=http://h/v1", "rollout.reward_model.max_generation_token=15000"], "max_generation_token.*below"),
        (["reward.judge.base_url=http://h/v1", "reward.judge.weight=0"], "reward.judge.weight"),
        (["reward.judge.granularity=token"], "granularity.*chunk, response"),
        (["reward.judge.concurrency=0"], "reward.judge.concurrency"),
    ],
)
def test_settings_are_checked(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config("rl", ["config=configs/rl_tiny.yaml", *overrides])


def test_serve_command(capsys):
    command = "vllm serve 'a b' --port 8001 --max-model-len 9000 --tensor-parallel-size 2"
    assert serve_command("vllm", "a b", 8001, 9000, 2) == command
    run = subprocess.run(
        [sys.executable, "-m", "reward.judge", "serve-command", "--model", "org/judge", "--engine", "sglang"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert run.stdout == (
        "python -m sglang.launch_server --model-path org/judge --port 8000 --context-length 15000 --tp-size 1\n"
    )
    assert run.returncode == 0 and "reward.judge.base_url=http://" in run.stderr

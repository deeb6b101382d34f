import json
import time

import pytest

from common.errors import UserError
from common.records import Rollout, Task
from configs.schema import Config
from data.tasks import load_tasks
from reward.code_reward import CodeReward, cores_of_process
from reward.code_text import last_program, same_output, with_prefix
from reward.registry import REWARDS, ResponseToScore, make_reward
from reward.scoring import Scorer


def fenced(code, label="python"):
    return f"```{label}\n{code}\n```"


@pytest.mark.parametrize(
    "text, program",
    [
        (f"First {fenced('a = 1')} then\n{fenced('b = 2')}\nDone.", "b = 2\n"),
        (f"{fenced('a = 1')}\n{fenced('output 3', '')}\n{fenced('ls', 'bash')}", "a = 1\n"),  # only python blocks count
        (fenced("a = 1", "Python3 title=x"), "a = 1\n"),
        (fenced("a = 1", " py"), "a = 1\n"),
        ("```python\r\na = 1\r\n```\r\n", "a = 1\n"),
        ("1. so\n   ```python\n   a = 1\n   if a: pass\n   ```\n", "a = 1\nif a: pass\n"),  # within a list
        ("```python\ns = '''\nuse `x` and ```y```\n'''\n```", "s = '''\nuse `x` and ```y```\n'''\n"),
        ("see ```python\nprint(1)``` there", "print(1)"),
        (f"{fenced('a = 1')}\n```python\nb = 2", "a = 1\n"),  # a closed block before one that was cut off
        ("```python\nb = 2\nprint(b)", "b = 2\nprint(b)"),  # cut off: the only one
        (f"{fenced('a = 1', '')}", "a = 1\n"),  # no label anywhere
        (f"{fenced('a = 1', 'java')}", None),
        ("def f(): pass", None),
        ("", None),
        ("```python\nfirst\n\n```python\nsecond\n```", "second\n"),
    ],
)
def test_last_program(text, program):
    assert last_program(text) == program


def test_prefix():
    head = "from typing import List\n\ndef f(x: List[int]) -> int:\n    '''Text.'''\n"
    assert with_prefix("def f(x: List[int]): return 1\n", head) == "from typing import List\ndef f(x: List[int]): return 1\n"
    for body in ("return len(x)", "    return len(x)\n"):  # a continuation, indented or not
        space = {}
        exec(with_prefix(body, head), space)
        assert space["f"]([1, 2]) == 2
    assert with_prefix("def f(x): return 1", "def f(x):") == "def f(x): return 1"
    assert with_prefix("def f(x): return 1", "") == "def f(x): return 1"
    future = "from __future__ import annotations\ndef f(x: List[int]): return 1"
    assert with_prefix(future, head) == future  # nothing may come before it
    assert with_prefix("def f(x:", head) == "def f(x:"  # broken stays broken
    assert with_prefix("x = 1", "class A:\n    def f(self):\n").startswith("class A")


@pytest.mark.parametrize(
    "output, expected, equal",
    [
        ("1 2 3 \n\n", "1 2 3\n", True),
        ("1  2\t3\r\n4", "1 2 3\n4\n", True),
        ("\n\n1\n", "1", True),
        ("1 2 3", "1\n2\n3\n", False),
        ("1\n\n2", "1\n2", False),
        ("", "\n", True),
        ("0.30000000000000004\n", "0.3\n", False),
        ("a\x0cb", "a b", True),
        ("Yes", "yes", False),
    ],
)
def test_same_output(output, expected, equal):
    assert same_output(output, expected) == equal


FUNCTION = {"question": "?", "test_method": "function", "test_list": ["assert f(1) == 1"], "prefix": "def f(x):"}
STDIO = {"question": "?", "test_method": "stdio", "test_input": ["1\n"], "test_output": ["1\n"], "test_time_limit": 2}


@pytest.mark.parametrize(
    "record, problem",
    [
        (FUNCTION, None),
        (STDIO, None),
        ({k: v for k, v in FUNCTION.items() if k != "prefix"}, None),
        ({**FUNCTION, "test_method": "both"}, "field 'test_method' is 'both', wanted function or stdio"),
        ({"question": "?"}, "field 'test_method' is missing"),
        ({**FUNCTION, "test_list": []}, "field 'test_list' is empty"),
        ({**FUNCTION, "test_list": "assert f(1)"}, "field 'test_list' is str, wanted a list"),
        ({**FUNCTION, "test_list": ["assert f(1)", 5]}, "field 'test_list', entry 2, is int, wanted text"),
        ({**FUNCTION, "prefix": 5}, "field 'prefix' is int, wanted text"),
        ({**FUNCTION, "test_time_limit": 0}, "field 'test_time_limit' is 0, wanted seconds above 0"),
        ({**FUNCTION, "test_time_limit": "4"}, "field 'test_time_limit' is '4', wanted seconds above 0"),
        ({**STDIO, "test_output": ["1", "2"]}, "field 'test_input' has 1 entries and 'test_output' 2, wanted as many"),
        ({k: v for k, v in STDIO.items() if k != "test_output"}, "field 'test_output' is missing"),
    ],
)
def test_records(record, problem, tmp_path):
    assert REWARDS.get("code").record_problem(record) == problem
    file = tmp_path / "tasks.json"
    file.write_text(json.dumps([record]))
    if problem is None:
        (task,) = load_tasks(file, "code")
        assert task.fields["test_method"] == record["test_method"] and task.answer is None
    else:
        with pytest.raises(UserError, match="record 1: field"):
            load_tasks(file, "code")


def config(code_score="share", num_chunk=128):
    config = Config()
    config.dataset.data_type, config.reward.code_score = "code", code_score
    config.execute.num_chunk, config.execute.memory_mb = num_chunk, 512
    return config


def rollout(task_id="a", sample=0, length=3):
    return Rollout(task_id, sample, [1], [1] * length, [1] * length, [0.0] * length, [0.0] * length, length, "stop", length, 0, 4)


ADD = Task("a", "Add.", fields={"test_method": "function", "test_list": [f"assert add({n}, 1) == {n + 1}" for n in range(4)]})
DOUBLE = Task(
    "b",
    "Double.",
    fields={"test_method": "stdio", "test_input": ["1\n", "-2\n"], "test_output": ["2\n", "-4\n"], "test_time_limit": 2},
)


def score(reward, pairs):
    return reward.score([ResponseToScore(task, text, rollout()) for task, text in pairs])


def test_scores_share_and_all():
    answers = [
        (ADD, fenced("def add(a, b): return a + b")),
        (ADD, fenced("def add(a, b): return 2 if a == 1 else 1")),
        (ADD, "I do not know."),
        (ADD, fenced("def add(a, b): return None")),
        (DOUBLE, fenced("print(int(input()) * 2)")),
        (DOUBLE, fenced("print(abs(int(input())) * 2)")),
        (DOUBLE, fenced("print(" + "1" * 300_000 + ")")),
        (ADD, fenced("def add(a, b): return a + b")),
    ]
    reward = make_reward("code", config().reward, config(num_chunk=1))
    assert reward.checker.pool.num_workers == 1 and reward.checker.common["memory_bytes"] == 512 << 20
    scores = score(reward, answers)
    reward.close()
    assert [s.reward for s in scores] == [1, 0.5, 0, 0, 1, 0.5, 0, 1]
    assert [s.correct for s in scores] == [True, False, False, False, True, False, False, True]
    assert scores[0].note is None and scores[2].note == "no python block" and scores[6].note == "program too long"
    assert scores[1].note == "2 of 4 tests passed; AssertionError" and scores[5].note == "1 of 2 tests passed; wrong output"
    reward = CodeReward.from_config(config("all"))
    assert [s.reward for s in score(reward, answers[:2])] == [1, 0] and reward.filter_by_solve_rate
    reward.close()
    assert score(CodeReward(), [(ADD, "nothing")])[0].reward == 0  # no process is started where there is no program


def test_equal_programs_run_once_and_progress_is_told():
    reward = CodeReward.from_config(config())
    seen = []
    text = fenced("print(int(input()) * 2)")
    responses = [ResponseToScore(DOUBLE, text, rollout(sample=n)) for n in range(5)]
    assert [s.reward for s in reward.score(responses, lambda *p: seen.append(p))] == [1] * 5
    assert seen == [(0, 2), (1, 2), (2, 2)]  # two tests, once
    reward.close()


def test_groups_of_a_step():
    """All tests passed by one of four, by hand: shares 1, 1/2, 1/2, 0; kept though no solve rate is asked for."""

    class Words:
        def decode(self, ids, **_):
            return TEXTS[ids[0]]

    TEXTS = [fenced(f"def add(a, b): return {body}") for body in ("a + b", "a + b if a < 2 else 0", "a + b if a > 1 else 0", "0")]
    rollouts = [Rollout("a", n, [1], [n, 9], [1] * 2, [0.0] * 2, [0.0] * 2, 2, "stop", 2, 0, 4) for n in range(4)]
    for kind, rewards in (("share", [1, 0.5, 0.5, 0]), ("all", [1, 0, 0, 0])):
        with Scorer(config(kind), {"a": ADD}, Words()) as scorer:
            scored = scorer.score(rollouts)
        assert [s.reward for s in scored] == rewards and [s.dropped for s in scored] == [None] * 4
    assert scored[0].advantage == pytest.approx(3**0.5)


def test_prompts():
    text = REWARDS.get("code").instruction(Task("a", "Add.", fields=FUNCTION))
    assert "def f(x):" in text and "```python" in text
    assert "stdin" in REWARDS.get("code").instruction(DOUBLE)


def test_cores(monkeypatch):
    cores = cores_of_process()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(cores))
    assert cores_of_process() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(10 * cores))
    assert cores_of_process() == 1
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert CodeReward.from_config(config(num_chunk=10_000)).checker.pool.num_workers == cores


@pytest.mark.slow
def test_1000_short_programs_take_less_than_a_minute():
    reward = CodeReward.from_config(config())
    tasks = [(ADD, fenced(f"import math\ndef add(a, b):\n    return a + b  # {n}")) for n in range(500)]
    tasks += [(DOUBLE, fenced(f"import sys\nprint(int(sys.stdin.read()) * 2)  # {n}")) for n in range(500)]
    begin = time.monotonic()
    assert {s.reward for s in score(reward, tasks)} == {1.0}
    assert time.monotonic() - begin < 60
    reward.close()

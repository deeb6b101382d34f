from types import SimpleNamespace

import pytest

from common.errors import UserError
from common.records import Rollout, Task
from reward.functions import load_function
from reward.registry import REWARD_FUNCTIONS, REWARDS, TEXT, Reward, Score, make_reward
from reward.scoring import Scorer, apply_penalty, overlong_penalty


class Letters:
    """Ids are code points; 0 is special."""

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert skip_special_tokens and not clean_up_tokenization_spaces
        return "".join(chr(i) for i in ids if i)


def config(data_type="exact", function=None, margin=5, keep=(0.2, 0.8), advantage="zscore", max_token=100, penalty=0):
    return SimpleNamespace(
        dataset=SimpleNamespace(data_type=data_type),
        reward=SimpleNamespace(
            function=function,
            overlong_margin=margin,
            overlong_penalty_tokens=penalty,
            keep_solve_rate=list(keep),
            num_workers=1,
            timeout_seconds=5.0,
        ),
        training=SimpleNamespace(advantage=advantage),
        model=SimpleNamespace(value_base_model=None, value_shared=False),
        rollout=SimpleNamespace(max_response_length=max_token),
    )


def rollout(task_id, sample, text, finish="stop", behind=""):
    """`text` with a stop token ("." here: an ordinary one) and what follows in its block."""
    ids = [ord(c) for c in text + ("." if finish == "stop" else "")]
    all_ids = ids + [ord(c) for c in behind]
    size = len(all_ids)
    return Rollout(task_id, sample, [1], all_ids, [1] * size, [0.0] * size, [0.0] * size, len(ids), finish, size, 0, 4)


TASKS = {"a": Task("a", "?", "12"), "b": Task("b", "?", "7")}


def test_score_by_hand():
    rollouts = [
        rollout("a", 0, "12", behind="99"),
        rollout("b", 0, "7"),
        rollout("a", 1, "13"),
        rollout("b", 1, " 7 "),
        rollout("a", 2, "12", finish="length"),
        rollout("a", 3, "1\0" + "2x"),
    ]
    with Scorer(config(), TASKS, Letters()) as scorer:
        scored = scorer.score(rollouts)
    assert [s.correct for s in scored] == [True, True, False, True, True, False]
    assert [s.reward for s in scored] == [1, 1, 0, 1, 1, 0]
    assert [s.advantage for s in scored] == [1, 0, -1, 0, 1, -1]
    assert [s.dropped for s in scored] == [None, "solve rate above 0.8", None, "solve rate above 0.8", None, None]
    assert scored[0].response_ids == rollouts[0].response_ids and scored[0].sample == 0
    assert [s.advantage for s in scorer.score(scored)] == [s.advantage for s in scored]  # scored ones can be scored again
    assert scorer.score([]) == []


def test_overlong_responses_count_as_wrong():
    rollouts = [rollout("a", 0, "12"), rollout("a", 1, "12" + " " * 10), rollout("a", 2, "1")]
    tight = Scorer(config(margin=5, max_token=13 + 5), TASKS, Letters()).score(rollouts)
    assert [(s.correct, s.reward) for s in tight] == [(True, 1), (False, 0), (False, 0)]
    assert [s.correct for s in Scorer(config(margin=5, max_token=13 + 6), TASKS, Letters()).score(rollouts)] == [True, True, False]
    assert [s.correct for s in Scorer(config(margin=-1, max_token=13), TASKS, Letters()).score(rollouts)] == [True, True, False]
    evaluation = SimpleNamespace(max_response_length=1000)
    assert Scorer(config(max_token=13), TASKS, Letters(), decoding=evaluation).score(rollouts)[1].correct


@pytest.mark.parametrize(
    "num_response, penalty", [(1, 0), (15, 0), (16, 0), (17, 0.25), (18, 0.5), (19, 0.75), (20, 1), (21, 1), (24, 1)]
)
def test_overlong_penalty_by_hand(num_response, penalty):
    """max_token 20, the last 4 tokens; a block may end behind max_token. Without a zone there is no penalty, however long."""
    assert overlong_penalty(num_response, 20, 4) == penalty
    assert overlong_penalty(num_response, 20, 0) == 0


def test_overlong_penalty_of_process_rewards():
    """It falls on the last step, and what is right stays right."""
    process = apply_penalty(Score(0.5, True, token_rewards=[0.1, 0.2], outcome=0.2), 0.75)
    assert (process.reward, process.correct, process.token_rewards) == (-0.25, True, [0.1, 0.2])
    assert process.outcome == pytest.approx(-0.55)
    assert apply_penalty(Score(1.0, True), 0.5) == Score(0.5, True)


def test_overlong_responses_are_punished_in_rl_only():
    """Lengths with the stop 3, 5, 7, 9 and 13; max_token 13, margin 3 (so 10 and more are wrong), penalty over the last 8."""
    rollouts = [rollout("a", n, "12" + " " * spaces) for n, spaces in enumerate([0, 2, 4, 6, 10])]
    settings = dict(margin=3, max_token=13, keep=(0, 1), penalty=8)
    scored = Scorer(config(**settings), TASKS, Letters()).score(rollouts)
    assert [s.reward for s in scored] == [1, 1, 0.75, 0.5, -1]
    assert [s.correct for s in scored] == [True, True, True, True, False]
    rewards = [1, 1, 0.75, 0.5, -1]  # mean 0.45, variance (0.55**2 * 2 + 0.3**2 + 0.05**2 + 1.45**2) / 5 = 0.56
    assert [s.advantage for s in scored] == pytest.approx([(r - 0.45) / 0.56**0.5 for r in rewards])
    evaluation = SimpleNamespace(max_response_length=13)
    assert [s.reward for s in Scorer(config(**settings), TASKS, Letters(), evaluation).score(rollouts)] == [1, 1, 1, 1, 0]


def test_bounds_are_checked():
    with pytest.raises(UserError, match="keep_solve_rate"):
        Scorer(config(keep=(0.8, 0.2)), TASKS, Letters())
    with pytest.raises(UserError, match="data_type.*exact"):
        Scorer(config(data_type="exakt"), TASKS, Letters())


USER_FILE = """
from reward.registry import Score
def short(task, response_text, rollout): return 1.0 / len(response_text)
def right(task, response_text, rollout): return response_text == task.answer
def full(task, response_text, rollout): return Score(0.5, True, [0.1] * len(rollout.response_ids))
def nothing(task, response_text, rollout): return None
def infinite(task, response_text, rollout): return float("inf")
def broken(task, response_text, rollout): return response_text.no_such_attribute
number = 5
"""


@pytest.fixture
def user_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(USER_FILE)
    return path


def test_a_users_function(user_file):
    rollouts = [rollout("a", 0, "12"), rollout("a", 1, "1234")]

    def score(name, **changes):
        return Scorer(config(function=f"{user_file}:{name}", **changes), TASKS, Letters()).score(rollouts)

    assert [(s.reward, s.correct, s.dropped, s.advantage) for s in score("short")] == [(0.5, None, None, 1), (0.25, None, None, -1)]
    assert [(s.reward, s.correct) for s in score("right")] == [(1, True), (0, False)]
    assert score("full")[0].token_rewards == [0.1] * 3 and score("full")[0].dropped == "solve rate above 0.8"
    assert [s.reward for s in score("short", max_token=9)] == [0.5, 0]  # 5 tokens, with the stop: over-long
    for name in ("nothing", "infinite"):
        with pytest.raises(UserError, match=f"{name}.*task 'a'"):
            score(name)
    with pytest.raises(RuntimeError, match="broken failed on task 'a'"):
        score("broken")


@pytest.mark.parametrize(
    "spec, message",
    [
        ("{file}:shrt", "did you mean short"),
        ("{file}:number", "not a function"),
        ("no/such.py:f", "no such file"),
        ("short", "path/to/file.py:name"),
    ],
)
def test_a_function_that_is_not_there(user_file, spec, message):
    with pytest.raises(UserError, match=message):
        load_function(spec.format(file=user_file))


def test_registered_functions_and_rewards(monkeypatch):
    monkeypatch.setattr(REWARDS, "_entries", dict(REWARDS._entries))
    monkeypatch.setattr(REWARD_FUNCTIONS, "_entries", dict(REWARD_FUNCTIONS._entries))
    REWARD_FUNCTIONS.register("length", lambda task, text, rollout: float(len(text)))

    @REWARDS.register("shout")
    class Shout(Reward):
        required_fields = {"question": TEXT}
        filter_by_solve_rate = False

        def score(self, responses, progress=None):
            return [Score(float(r.text.isupper()), r.text.isupper()) for r in responses]

    rollouts = [rollout("a", n, text) for n, text in enumerate(["AB", "CDE", "F", "G", "H", "i"])]
    assert [s.reward for s in Scorer(config(function="length"), TASKS, Letters()).score(rollouts)] == [2, 3, 1, 1, 1, 1]
    scored = Scorer(config(data_type="shout"), TASKS, Letters()).score(rollouts)
    assert [s.correct for s in scored] == [True] * 5 + [False]
    assert all(s.dropped is None for s in scored)  # 5 of 6, but this reward is not filtered by its solve rate
    assert isinstance(make_reward("exact", config(function="shout").reward), Shout)


def test_rewards_are_known_without_torch():
    import subprocess
    import sys

    code = "import reward.registry, reward.scoring, data.tasks, data.prompts, data.sft, data.tiny_tasks, data.download_data, sys\n"
    code += "from reward.registry import REWARDS\n[REWARDS.get(n) for n in ('math', 'exact')]\n"
    code += "print([m for m in ('torch', 'datasets', 'transformers', 'sympy', 'huggingface_hub') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_an_evaluation_drops_nothing():
    rollouts = [rollout("a", n, "12") for n in range(3)]
    evaluation = SimpleNamespace(max_response_length=100)
    with Scorer(config(), TASKS, Letters(), evaluation) as scorer:
        assert [r.dropped for r in scorer.score(rollouts)] == [None] * 3
    with Scorer(config(), TASKS, Letters()) as scorer:
        assert {r.dropped for r in scorer.score(rollouts)} == {"solve rate above 0.8"}

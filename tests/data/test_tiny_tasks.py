import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from data.tasks import DATA_DIR, load_tasks
from data.tiny_tasks import ALPHABET, TINY_TASKS, generate, shipped_sets

BRUTE = {
    "s": lambda d: "".join(sorted(d)),
    "d": lambda d: "".join(sorted(d))[::-1],
    "r": lambda d: "".join(d[len(d) - 1 - n] for n in range(len(d))),
    "x": lambda d: str(max(int(c) for c in d)),
    "n": lambda d: str(min(int(c) for c in d)),
    "u": lambda d: "".join(c for n, c in enumerate(d) if c not in d[:n]),
    "c": lambda d: str(sum(1 for _ in d)),
    "a": lambda d: "".join(c for n, c in enumerate(d) if n % 2 == 0),
}


@pytest.mark.parametrize("name, train, test", [("sort", 2000, 256), ("mixed", 1000, 128)])
def test_shipped_sets(name, train, test):
    train_set, test_set = (load_tasks(f"tiny_{name}_{part}", "exact") for part in ("train", "test"))
    assert (len(train_set), len(test_set)) == (train, test)
    held_out = {t.question for part in ("sort", "mixed") for t in load_tasks(f"tiny_{part}_test", "exact")}
    questions = [task.question for task in train_set]
    assert not held_out & set(questions) and len(set(questions)) == train
    for task in train_set + test_set:
        assert set(task.question + task.answer) <= set(ALPHABET)
        assert task.question.endswith("=") and 4 <= len(task.question) - 2 <= 6
        assert task.answer == BRUTE[task.question[0]](task.question[1:-1])


def test_shipped_sets_are_what_the_generator_writes():
    for name, records in shipped_sets().items():
        assert json.loads((DATA_DIR / name).read_text()) == records
    assert sum((DATA_DIR / name).stat().st_size for name in shipped_sets()) < 300_000


def test_generate():
    first = generate("sort", 50, seed=1)
    assert first == generate("sort", 50, seed=1) != generate("sort", 50, seed=2)
    assert generate("sort", 20, seed=1) == first[:20]
    exclude = {record["question"] for record in first}
    assert not exclude & {record["question"] for record in generate("sort", 50, seed=1, exclude=exclude)}
    assert {len(r["question"]) - 2 for r in generate("max", 100, seed=0, min_digits=2, max_digits=3)} == {2, 3}
    assert {r["question"][0] for r in generate("mixed", 8, seed=0)} == {TINY_TASKS.get(n).letter for n in TINY_TASKS}
    with pytest.raises(UserError, match="only 10 of 11"):
        generate("sort", 11, seed=0, min_digits=1, max_digits=1)
    with pytest.raises(UserError, match="did you mean sort"):
        generate("sorts", 1, seed=0)


def test_command_line(tmp_path):
    root = Path(__file__).parents[2]

    def run(*arguments):
        return subprocess.run([sys.executable, "-m", "data.tiny_tasks", *arguments], cwd=root, capture_output=True, text=True)

    test, train = tmp_path / "test.json", tmp_path / "train.json"
    assert run("--task", "reverse", "--count", "20", "--seed", "1", "--out", str(test)).returncode == 0
    assert json.loads(test.read_text()) == generate("reverse", 20, 1)
    result = run("--task", "reverse", "--count", "20", "--seed", "1", "--sft", "--exclude", str(test), "--out", str(train))
    assert result.returncode == 0, result.stderr
    prompts = [record["prompt"] for record in json.loads(train.read_text())]
    assert len(prompts) == 20 and not set(prompts) & {r["question"] for r in generate("reverse", 20, 1)}
    assert run("--task", "sort").returncode == 2

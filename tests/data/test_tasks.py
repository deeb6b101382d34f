import dataclasses
import datetime
import hashlib
import json
from collections import Counter

import pytest

from common.errors import UserError
from common.records import Task
from data.sft import SFTRecord, load_sft
from data.tasks import TaskCursor, load_tasks


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows))
    return path


ROWS = [
    {"question": "1+1?", "ground_truth_answer": "2", "level": 3},
    {"question": "when?", "ground_truth_answer": "2024-01-01", "level": None},
    {"question": "how many?", "ground_truth_answer": "5.0"},
]
FIELDS = '"question": "q", "ground_truth_answer": "1"'


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_load_tasks(tmp_path, suffix, capfd):
    path = write(tmp_path / f"mine{suffix}", ROWS)
    tasks = load_tasks(path, "math")
    assert tasks == load_tasks("mine", "math", folder=tmp_path)
    assert tasks[0] == Task("mine:0", "1+1?", "2", {"level": 3})
    assert tasks[1] == Task("mine:1", "when?", "2024-01-01", {})
    assert [task.answer for task in tasks] == ["2", "2024-01-01", "5.0"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_text_as_windows_writes_it(tmp_path, suffix):
    path = write(tmp_path / f"mine{suffix}", ROWS[:1])
    plain = load_tasks(path, "math")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_tasks(path, "math") == plain


def test_whole_characters_may_be_escaped(tmp_path):
    (tmp_path / "a.json").write_text('[{"question": "\\ud83d\\ude00 \\u00e9", "ground_truth_answer": "1"}]')
    assert load_tasks(tmp_path / "a.json", "math")[0].question == "\U0001f600 \u00e9"


def test_ids_and_numbers(tmp_path):
    rows = [{"id": 7, "question": "q", "ground_truth_answer": 5}, {"task_id": "x", "question": "q", "ground_truth_answer": 2.5}]
    tasks = load_tasks(write(tmp_path / "a.json", rows), "math")
    assert [(task.id, task.answer, task.fields) for task in tasks] == [("7", "5", {}), ("x", "2.5", {})]
    del rows[0]
    assert load_tasks(write(tmp_path / "a.parquet", rows), "math")[0].answer == "2.5"


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "q"}, "record 3: field 'ground_truth_answer' is missing"),
        ({"question": None, "ground_truth_answer": "1"}, "record 3: field 'question' is missing"),
        ({"question": " ", "ground_truth_answer": "1"}, "record 3: field 'question' is blank"),
        ({"question": "q", "ground_truth_answer": ""}, "record 3: field 'ground_truth_answer' is empty"),
    ],
)
def test_a_wrong_record_is_named(tmp_path, suffix, row, message):
    path = write(tmp_path / f"bad{suffix}", [*ROWS[:2], row])
    with pytest.raises(UserError, match=message) as caught:
        load_tasks(path, "math")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("empty.json", "", "the file is empty"),
        ("empty2.json", "[]", "no record"),
        ("blank.jsonl", "\n\n", "no record"),
        ("broken.json", '[{"question": "q",', r"not JSON \(.*line 1\)"),
        ("broken.jsonl", '{"question": "q", "ground_truth_answer": "1"}\n{"question', "line 2 is not JSON"),
        ("object.json", '{"question": "q"}', "wanted a list"),
        ("strings.json", '[{"question": "q", "ground_truth_answer": "1"}, "q"]', "record 2 is str"),
        ("number.json", '[{"question": 5, "ground_truth_answer": "1"}]', "field 'question' is a number, wanted text"),
        ("list.json", '[{"question": "q", "ground_truth_answer": ["1"]}]', "is a list, wanted text or a number"),
        ("bool.json", '[{"question": "q", "ground_truth_answer": true}]', "is true or false, wanted"),
        ("twice.json", f'[{{"id": 1, {FIELDS}}}, {{"id": "1", {FIELDS}}}]', "record 2: id '1' is that of record 1 too"),
        ("digits.json", f'[{{"question": "q", "ground_truth_answer": {"9" * 5000}}}]', "holds what cannot be read .*digits"),
        ("digits.jsonl", f'{{{FIELDS}}}\n{{"question": "q", "x": {"9" * 5000}}}', "line 2 cannot be read .*digits"),
        ("deep.json", "[" * 200_000, "holds what cannot be read .*recursion"),
        ("half.json", '[{"question": "s\\ud800=", "ground_truth_answer": "1"}]', "record 1: field 'question' holds half a char"),
        ("half.jsonl", f'{{{FIELDS}}}\n{{{FIELDS}, "tests": [{{"x": "\\udc00"}}]}}', "record 2: field 'tests' holds half a char"),
        ("broken.parquet", "PAR0nonsense", "not a readable parquet file"),
        ("table.csv", "question\n", "cannot read .csv"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tasks(path, "math")
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_records_are_checked_for_the_reward_that_scores(tmp_path):
    """By reward.function too: the answers are those that it compares with."""
    path = write(tmp_path / "a.json", ROWS[:1])
    with pytest.raises(UserError, match=r"record 1: field 'test_method' is missing \(reward.function=code\)$"):
        load_tasks(path, "math", "code")
    program = {"question": "q", "test_method": "function", "test_list": ["assert f(1)"]}
    with pytest.raises(UserError, match=r"record 1: field 'ground_truth_answer' is missing \(reward.function=math\)$"):
        load_tasks(write(tmp_path / "b.json", [program]), "code", "math")
    path = write(tmp_path / "c.json", [{**program, "ground_truth_answer": "1"}])
    assert [load_tasks(path, *scoring)[0].answer for scoring in [("code",), ("code", "math"), ("math", "code")]] == [None, "1", "1"]
    assert load_tasks(path, "math", "mine.py:reward") == load_tasks(path, "math")


def test_a_missing_data_set_lists_what_is_there(tmp_path):
    write(tmp_path / "mine.json", ROWS)
    with pytest.raises(UserError, match=r"download_data.py --dataset MATH500`; .* has mine$"):
        load_tasks("MATH500", "math", folder=tmp_path)
    with pytest.raises(UserError, match="no data set 'other/x.json'.*--list"):
        load_tasks("other/x.json", "math", folder=tmp_path)
    with pytest.raises(UserError, match="unknown reward.*math"):
        load_tasks("mine", "maths", folder=tmp_path)


# ---- SFT ---------------------------------------------------------------------------------------------------------------


def test_load_sft(tmp_path):
    rows = [{"prompt": "p", "response": "r"}, {"id": "x", "prompt": "p", "response": "r", "step_map": [1, 0, 2]}]
    assert load_sft(write(tmp_path / "s.json", rows)) == [SFTRecord("s:0", "p", "r"), SFTRecord("x", "p", "r", [1, 0, 2])]
    tasks = write(tmp_path / "t.json", [{"question": "s21=", "ground_truth_answer": 12}])
    assert load_sft(tasks, "exact") == [SFTRecord("t:0", "s21=", "12")]
    with pytest.raises(UserError, match="record 1: field 'prompt' is missing"):
        load_sft(tasks)
    for row, message in [
        ({"prompt": "p"}, "'response' is missing"),
        ({"prompt": "p", "response": 1}, "wanted text"),
        ({"prompt": "p", "response": "r", "step_map": [1, -1]}, "'step_map'"),
        ({"prompt": "p", "response": "r", "step_map": "1"}, "'step_map'"),
    ]:
        with pytest.raises(UserError, match=f"record 2: .*{message}"):
            load_sft(write(tmp_path / "bad.json", [rows[0], row]))


# ---- the cursor --------------------------------------------------------------------------------------------------------


def tasks_of(count):
    return [Task(f"t{n}", "q") for n in range(count)]


def ids(tasks):
    return [task.id for task in tasks]


def test_every_task_is_seen_before_any_comes_again():
    for count, step in [(10, 3), (7, 7), (5, 4), (1, 1), (12, 5)]:
        cursor, seen = TaskCursor(tasks_of(count), seed=3), Counter()
        for _ in range(50):
            taken = ids(cursor.take(step))
            assert len(set(taken)) == step  # no task twice in a step
            seen.update(taken)
            # Put-off tasks are late by less than a step: nobody is more than two visits ahead, and whole epochs are even.
            assert max(seen.values()) - min(seen[f"t{n}"] for n in range(count)) <= 1 + (count % step != 0)


def test_order_depends_on_seed_and_epoch_only():
    one, other = TaskCursor(tasks_of(12), seed=1), TaskCursor(tasks_of(12), seed=1)
    in_steps = [ids(one.take(4)) for _ in range(6)]
    at_once = [ids(other.take(12)) for _ in range(2)]
    assert sum(in_steps[:3], []) == at_once[0] and sum(in_steps[3:], []) == at_once[1]
    assert at_once[0] != at_once[1] and sorted(at_once[0]) == sorted(at_once[1])
    assert ids(TaskCursor(tasks_of(12), seed=2).take(12)) != at_once[0]


def test_restore_goes_on_exactly():
    for num_before in range(12):
        unbroken = TaskCursor(tasks_of(10), seed=5)
        for _ in range(num_before):
            unbroken.take(4)
        state = json.loads(json.dumps(unbroken.state()))
        again = TaskCursor(tasks_of(10), seed=99)
        again.restore(state)
        assert [ids(again.take(4)) for _ in range(8)] == [ids(unbroken.take(4)) for _ in range(8)]
        assert again.state() == unbroken.state()


def test_another_data_set_is_refused():
    state = TaskCursor(tasks_of(10), seed=5).state()
    last = tasks_of(10)[9]
    with pytest.raises(UserError, match="the data set has changed .*10 tasks then, 11 now"):
        TaskCursor(tasks_of(11), seed=5).restore(state)
    for change in ({"id": "other"}, {"question": "r"}, {"answer": "1"}, {"fields": {"level": 3}}):
        tasks = [*tasks_of(9), dataclasses.replace(last, **change)]
        with pytest.raises(UserError, match="the data set has changed .*still 10 tasks, but other contents"):
            TaskCursor(tasks, seed=5).restore(state)
    with pytest.raises(UserError, match="the data set has changed"):
        TaskCursor(tasks_of(10)[::-1], seed=5).restore(state)


def test_fields_of_any_kind_and_order_are_known_again():
    def tasks(*fields):
        return [Task("a", "q", fields=dict(fields)), Task("b", "q")]

    day, picture = ("day", datetime.date(2024, 1, 1)), ("picture", b"png")
    state = json.loads(json.dumps(TaskCursor(tasks(day, picture), seed=5).state()))
    TaskCursor(tasks(picture, day), seed=5).restore(state)
    with pytest.raises(UserError, match="has changed"):
        TaskCursor(tasks(day, ("picture", b"jpg")), seed=5).restore(state)


def test_a_state_of_ids_alone_is_still_read():
    """As written by the version before: sha256 of t0\\0t1\\0t2."""
    state = TaskCursor(tasks_of(3), seed=5).state()
    del state["tasks_hash"]
    state["ids_hash"] = hashlib.sha256(b"t0\0t1\0t2").hexdigest()[:16]
    TaskCursor([Task(f"t{n}", "another question") for n in range(3)], seed=5).restore(state)
    with pytest.raises(UserError, match="still 3 tasks, but other ids"):
        TaskCursor([Task(f"u{n}", "q") for n in range(3)], seed=5).restore(state)


def test_take_more_than_there_is():
    cursor = TaskCursor(tasks_of(5), seed=0)
    with pytest.raises(UserError, match="num_task_per_step.*has 5"):
        cursor.take(6)
    first = ids(cursor.take(3))
    further = ids(cursor.take(3, exclude=first))  # resampling within a step
    assert len(further) == 2 and not set(first) & set(further)
    assert cursor.take(3, exclude=first + further) == []
    assert sorted(first + further) == [f"t{n}" for n in range(5)]

"""python -m data.prepare_sft: every form of input, what is dropped and counted, and what is written."""

from __future__ import annotations

import json

import pytest

from common.errors import UserError
from data import prepare_sft
from data.prepare_sft import Dropped, convert, main, prepare
from data.sft import load_sft


def chat(*turns):
    return [{"role": role, "content": text} for role, text in turns]


FORMS = [
    ({"messages": chat(("user", "a"), ("assistant", "b"))}, {"prompt": "a", "response": "b"}),
    (
        {"messages": chat(("system", "s"), ("user", "a"), ("assistant", "b"))},
        {"messages": chat(("system", "s"), ("user", "a")), "response": "b"},
    ),
    (
        {"messages": chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "thanks")), "id": 7},
        {"id": "7", "messages": chat(("user", "a"), ("assistant", "b"), ("user", "c")), "response": "d"},
    ),
    (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": "a", "response": "b"},
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, *chat(("assistant", "b"))]},
        {"prompt": "a", "response": "b"},
    ),
    ({"messages": json.dumps(chat(("user", "a"), ("assistant", "b")))}, {"prompt": "a", "response": "b"}),
    ({"prompt": "a", "response": "b", "step_map": [1]}, {"prompt": "a", "response": "b", "step_map": [1]}),
    ({"prompt": "a", "prompt_is_rendered": True, "response": "b"}, {"prompt": "a", "prompt_is_rendered": True, "response": "b"}),
    ({"prompt": chat(("user", "a")), "completion": chat(("assistant", "b"))}, {"prompt": "a", "response": "b"}),
    ({"instruction": "a", "input": "x", "output": "b"}, {"prompt": "a\nx", "response": "b"}),
    ({"instruction": "a", "input": "", "output": "b"}, {"prompt": "a", "response": "b"}),
    ({"question": "a", "answer": "b", "system": "s"}, {"messages": chat(("system", "s"), ("user", "a")), "response": "b"}),
    ({"problem": "a", "solution": "b", "level": 5}, {"prompt": "a", "response": "b"}),
    (
        {"messages": chat(("system", "s"), ("user", "a")), "response": "b"},
        {"messages": chat(("system", "s"), ("user", "a")), "response": "b"},
    ),
    (
        {"task_id": "t", "sample": 3, "prompt_ids": [1], "response_ids": [2, 3], "num_response": 1, "step_map": [1, 2]},
        {"id": "t/3", "prompt_ids": [1], "response_ids": [2, 3], "num_response": 1, "step_map": [1, 2]},
    ),
]


@pytest.mark.parametrize("row, record", FORMS)
def test_forms(row, record):
    assert convert(row) == record
    assert convert(record) == record, "what is written can be read again"


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"messages": chat(("user", "a"))}, "no assistant turn"),
        ({"messages": chat(("user", "a"), ("assistant", " \n"))}, "empty response"),
        ({"messages": chat(("assistant", "b"))}, "empty prompt"),
        ({"messages": chat(("system", "s"), ("assistant", "b"))}, "empty prompt"),
        ({"messages": chat(("user", "a"), ("narrator", "x"), ("assistant", "b"))}, "unknown role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, *chat(("assistant", "b"))]}, "a turn is not text"),
        ({"messages": "hello"}, "conversation is not a list of turns"),
        ({"prompt": "a", "response": ""}, "empty response"),
        ({"prompt": "a", "response": 5}, "response is not text"),
        ({"prompt": " ", "response": "b"}, "empty prompt"),
        ({"prompt": 1, "response": "b"}, "prompt is not text"),
        ({"text": "a"}, "no prompt and response found"),
        ({"prompt_ids": [1], "response_ids": [], "num_response": 0}, "empty response"),
    ],
)
def test_what_is_dropped(row, reason):
    with pytest.raises(Dropped, match=f"^{reason}$"):
        convert(row)


def test_fields_of_ones_own():
    assert convert({"q": "a", "r": "b", "response": "c"}, "q", "r") == {"prompt": "a", "response": "b"}
    with pytest.raises(Dropped, match="no prompt and response found"):
        convert({"prompt": "a", "response": "b"}, "q", None)


def test_everything_is_counted():
    rows = [
        {"prompt": "a", "response": "b", "id": 1},
        {"prompt": "a", "response": "b", "id": 2},
        {"prompt": "a", "response": "c"},
        {"prompt": "long prompt", "response": "b"},
        {"prompt": "a", "response": "long response"},
        {"prompt": "a", "response": ""},
        {"prompt": "a", "response": "d", "step_map": "x"},
    ]
    prepared = prepare(rows, encode=lambda r: ([*r.prompt], [*r.response, "."]), max_prompt=5, max_response=5)
    assert [r["response"] for r in prepared.records] == ["b", "c"] and prepared.lengths == [(1, 2), (1, 2)]
    assert prepared.dropped == {
        "duplicate": 1,
        "prompt over 5 tokens": 1,
        "response over 5 tokens": 1,
        "empty response": 1,
        "field 'step_map' is not a list of whole numbers from 0": 1,
    }
    assert prepared.num_read == len(prepared.records) + sum(prepared.dropped.values())
    text = prepare_sft.table(prepared, held_out=1).splitlines()
    assert text[0].split() == ["read", "7"] and "dropped: duplicate" in text[1]
    assert "kept" in text[6] and text[7].split() == ["of", "them", "held", "out", "1"]
    assert text[-1] == "response tokens: mean 2.0, median 2, 95% 2, longest 2"


def test_only_right_rollouts():
    row = {"task_id": "t", "prompt_ids": [1], "response_ids": [2]}
    prepared = prepare([{**row, "correct": True}, {**row, "sample": 1, "correct": False}], only_correct=True)
    assert len(prepared.records) == 1 and prepared.dropped == {"not correct": 1}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if path.suffix == ".jsonl" else json.dumps(rows))
    return path


def test_from_file_to_file(tmp_path, capsys):
    rows = [{"messages": chat(("user", f"q{n}"), ("assistant", f"a{n}"))} for n in range(20)] + [{"messages": []}]
    out = tmp_path / "new" / "out.json"
    arguments = [str(write(tmp_path / "in.jsonl", rows)), "--out", str(out), "--held-out", "0.25"]
    main(arguments)
    kept, held_out = load_sft(out), load_sft(tmp_path / "new" / "out_held_out.json")
    assert (len(kept), len(held_out)) == (15, 5) and {r.prompt for r in kept + held_out} == {f"q{n}" for n in range(20)}
    said = capsys.readouterr().out
    assert "dropped: no assistant turn" in said and said.endswith("out_held_out.json: 5 records\n")
    first = out.read_bytes()
    with pytest.raises(SystemExit):
        main(arguments)
    assert "is there already: choose another name, or --force" in capsys.readouterr().err
    main([*arguments, "--force"])
    assert out.read_bytes() == first, "the same input gives the same files"


def test_parquet(tmp_path):
    import datasets

    path = tmp_path / "in.parquet"
    rows = [{"messages": chat(("user", "a"), ("assistant", "b"))}, {"messages": chat(("user", "a"))}]
    datasets.Dataset.from_list(rows).to_parquet(path)
    main([str(path), "--out", str(tmp_path / "out.json")])
    assert [(r.prompt, r.response) for r in load_sft(tmp_path / "out.json")] == [("a", "b")]


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory):
    from models.checkpoint import save_pretrained
    from tests.train.steps import tiny_model

    model = tiny_model(3, vocab_size=28)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_pretrained(model, model.decoder.state_dict(), folder)
    return folder


def test_tokens_are_counted_and_prompts_rendered(tmp_path, tiny_checkpoint, capsys):
    rows = [{"prompt": "12", "response": "21"}, {"prompt": "1234", "response": "4"}, {"prompt": "1", "response": "1234"}]
    source = str(write(tmp_path / "in.json", rows))
    options = ["--tokenizer", str(tiny_checkpoint), "--plain", "--max-prompt", "3", "--max-response", "4"]
    main([source, "--out", str(tmp_path / "out.json"), *options])
    assert [r.prompt for r in load_sft(tmp_path / "out.json")] == ["12"]
    assert "response tokens: mean 3.0" in capsys.readouterr().out  # with the end token
    main([source, "--out", str(tmp_path / "rendered.json"), "--tokenizer", str(tiny_checkpoint), "--render"])
    record = load_sft(tmp_path / "rendered.json")[0]
    assert record.is_rendered and record.prompt == "<|im_start|>user\n12<|im_end|>\n<|im_start|>assistant\n"


def test_step_maps_are_sampled(tmp_path, tiny_checkpoint):
    rows = [{"prompt": "s123=", "response": "123"}, {"prompt": "s98765432=", "response": "23456789"}]
    source, out = str(write(tmp_path / "in.json", rows)), tmp_path / "out.json"
    main([source, "--out", str(out), "--plain", "--sample-steps", str(tiny_checkpoint), "--strategy", "sequential"])
    # Behind the prompt of 5 block 1 has room for three tokens, the end begins block 2. Prompt of 10: two, four, then the rest.
    assert [r.step_map for r in load_sft(out)] == [[1, 2, 3, 4, 5, 6, 7], list(range(1, 11))]
    main([source, "--out", str(out), "--force", "--plain", "--sample-steps", str(tiny_checkpoint), "--steps-per-block", "1"])
    assert [r.step_map for r in load_sft(out)] == [[1, 1, 1, 2, 2, 2, 2], [1, 1, 2, 2, 2, 2, 3, 3, 3, 3]]


def test_step_maps_of_canvases_have_the_steps_of_each_block(tmp_path):
    """Whatever the length of the text: what is behind the canvas is cut in training, and ids are filled up to it."""
    from models.checkpoint import save_pretrained
    from tests.train.steps import tiny_model
    from tests.train.test_sft import sft_config
    from train.sft_data import build_responses

    model = tiny_model(3, "llada", vocab_size=28)
    save_pretrained(model, model.decoder.state_dict(), tmp_path / "tiny")
    rows = [{"prompt": "s12=", "response": "1234567890123456"}, {"prompt": "s12=", "response": "12"}]
    rows.append({"prompt_ids": [1, 2, 3], "response_ids": [4, 5, 26]})
    source, out = str(write(tmp_path / "in.json", rows)), tmp_path / "out.json"
    options = ["--plain", "--sample-steps", str(tmp_path / "tiny"), "--model-base", "llada", "--strategy", "low_confidence_static"]
    main([source, "--out", str(out), *options, "--canvas", "8", "--block-size", "4", "--steps-per-block", "4"])
    long, short, ids = (record.step_map for record in load_sft(out))
    assert [sorted(long[:4]), sorted(long[4:8]), long[8:]] == [[1, 2, 3, 4], [5, 6, 7, 8], [9] * 9]
    assert [sorted(short[:4]), sorted(short[4:])] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert len(set(ids)) == 3 and set(ids) < {1, 2, 3, 4}
    config = sft_config("model.model_base=llada", "training.max_gen_length=8", "training.method=trace")
    responses = build_responses(config, model, load_sft(out), "out.json", tell=False)
    assert [r.step_map.tolist() for r in responses] == [long[:8], short, [*ids, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    "options, message",
    [
        (["nowhere.json", "--out", "x.json"], "no data set 'nowhere.json'"),
        (["in.json", "--out", "x.jsonl"], "--out: got x.jsonl, must end in .json"),
        (["in.json", "--out", "x.json", "--held-out", "1"], "--held-out: got 1.0"),
        (["in.json", "--out", "x.json", "--max-prompt", "5"], "--max-prompt: needs a tokenizer"),
        (["in.json", "--out", "x.json", "--tokenizer", "nowhere"], "--tokenizer: "),
        (["in.json", "--out", "x.json", "--sample-steps", "nowhere", "--model-base", "sadr"], "--model-base: unknown model family"),
        (["in.json", "--out", "x.json", "--prompt-field", "q"], "in.json: no record is left, nothing was written"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.json", [{"prompt": "a", "response": "b"}])
    with pytest.raises(SystemExit) as end:
        main(options)
    err = capsys.readouterr().err
    assert end.value.code == 2 and message in err and len(err.splitlines()) == 1
    assert not (tmp_path / "x.json").exists()


def test_the_hub_cannot_be_reached(monkeypatch):
    monkeypatch.setattr("data.download_data._host_is_known", lambda endpoint: False)
    with pytest.raises(UserError, match="^open/chats: .* cannot be reached: download the data by hand and name the file") as error:
        prepare_sft.read_input("open/chats")
    assert "\n" not in str(error.value)


def test_data_of_the_hub(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"prompt": "a", "response": "b", "system": None}])

    monkeypatch.setattr("data.download_data._host_is_known", lambda endpoint: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert prepare_sft.read_input("open/chats", "test", "main") == [{"prompt": "a", "response": "b"}]
    assert asked == [("open/chats", "main", "test")]

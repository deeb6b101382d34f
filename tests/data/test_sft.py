"""Records of supervised finetuning: what is accepted, how it becomes token ids, and what is held out."""

from __future__ import annotations

import json

import pytest

from common.errors import UserError
from data.prompts import CHAT_STYLES
from data.sft import SFTRecord, encode_sft, load_sft, split


class Letters:
    """One id per character; <|im_end|> is one token too."""

    chat_template = None
    eos_token_id = 1
    special = {"<|im_end|>": 2}

    def __call__(self, text, add_special_tokens):
        assert add_special_tokens is False
        ids = []
        for number, part in enumerate(text.split("<|im_end|>")):
            ids += [2] * bool(number) + [ord(c) for c in part]
        return {"input_ids": ids}

    def get_vocab(self):
        return {**self.special, "<eos>": 1}


def ids(text: str) -> list[int]:
    return Letters()(text, add_special_tokens=False)["input_ids"]


def load_one(tmp_path, record):
    (tmp_path / "data.json").write_text(json.dumps([record]))
    return load_sft(tmp_path / "data.json")[0]


def test_forms(tmp_path):
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert load_one(tmp_path, {"messages": turns, "response": "r"}) == SFTRecord("data:0", "", "r", messages=turns)
    assert load_one(tmp_path, {"prompt": "p", "prompt_is_rendered": True, "response": "r"}).is_rendered
    rollout = {"task_id": "t", "prompt_ids": [1, 2], "response_ids": [3, 4], "step_map": [2, 1], "logprobs": [0.0, 0.0]}
    assert load_one(tmp_path, rollout) == SFTRecord("t", "", "", [2, 1], None, False, [1, 2], [3, 4], 2)


@pytest.mark.parametrize(
    "record, problem",
    [
        ({"messages": [{"role": "user", "content": "u"}]}, "'response' is missing: `python -m data.prepare_sft`"),
        ({"messages": [{"role": "human", "content": "u"}], "response": "r"}, "a turn that is not {role: system"),
        ({"messages": [], "response": "r"}, "'messages' is empty"),
        ({"messages": "u", "response": "r"}, "'messages' is str, wanted a list of turns"),
        ({"prompt": "p", "prompt_is_rendered": "yes", "response": "r"}, "'prompt_is_rendered' is not true or false"),
        ({"prompt_ids": [1], "response_ids": []}, "'response_ids' is empty"),
        ({"prompt_ids": [1], "response_ids": [2, -1]}, "'response_ids' is not a list of whole numbers"),
        ({"prompt_ids": [1], "response_ids": [2], "num_response": 2}, "'num_response' is 2, wanted a number of tokens up to 1"),
        ({"prompt_ids": [1], "response_ids": [2], "step_map": [1, 1]}, "'step_map' has 2 entries, response_ids 1"),
    ],
)
def test_mistakes(tmp_path, record, problem):
    with pytest.raises(UserError, match="data.json: record 1: ") as error:
        load_one(tmp_path, record)
    assert problem in str(error.value) and "\n" not in str(error.value)


def test_texts_become_ids():
    record = SFTRecord("x", "Hi", "Yes")
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert encode_sft(record, Letters(), "chatml", is_chat=True) == (ids(prompt), [*ids("Yes"), 2])
    assert encode_sft(record, Letters(), "chatml", is_chat=False) == (ids("Hi"), [*ids("Yes"), 1])
    rendered = SFTRecord("x", prompt, "Yes<|im_end|>", is_rendered=True)
    assert encode_sft(rendered, Letters(), "chatml", is_chat=True) == (ids(prompt), [*ids("Yes"), 2]), "one end is enough"
    rollout = SFTRecord("x", "", "", prompt_ids=[5], response_ids=[6, 7], num_response=1)
    assert encode_sft(rollout, Letters(), "chatml", is_chat=True) == ([5], [6, 7])


def test_the_end_of_a_turn_is_the_chat_styles_where_the_tokenizer_has_it():
    tokenizer = Letters()
    tokenizer.special = {}
    assert encode_sft(SFTRecord("x", "Hi", "Yes"), tokenizer, "llama3", is_chat=True)[1] == [*ids("Yes"), 1]


def test_conversations():
    turns = [("user", "a"), ("assistant", "b"), ("user", "c{role}")]
    messages = [{"role": role, "content": text} for role, text in turns]
    record = SFTRecord("x", "", "d", messages=messages)
    text = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"
    assert encode_sft(record, Letters(), "chatml", is_chat=True)[0] == ids(text)
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert encode_sft(record, Letters(), "chatml-system", is_chat=True)[0] == ids(system + text)
    own_system = [{"role": "system", "content": "z"}, *messages]
    own = SFTRecord("x", "", "d", messages=own_system)
    assert encode_sft(own, Letters(), "chatml-system", is_chat=True)[0] == ids("<|im_start|>system\nz<|im_end|>\n" + text)


def test_conversations_by_the_tokenizers_template():
    from models.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ m.role[0] }}{{ m.content }}+{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    messages = [{"role": "user", "content": "12"}, {"role": "assistant", "content": "3"}, {"role": "user", "content": "4"}]
    prompt_ids, _ = encode_sft(SFTRecord("x", "", "5", messages=messages), tokenizer, "chatml", is_chat=True)
    assert tokenizer.decode(prompt_ids) == "u12+a3+u4+a"
    fixed, _ = encode_sft(SFTRecord("x", "", "5", messages=messages), tokenizer, "chatml", is_chat=True, use_template=False)
    assert fixed != prompt_ids and len(fixed) > 60
    with pytest.raises(UserError, match="refuses a conversation of the turns system: no system here"):
        encode_sft(SFTRecord("x", "", "5", messages=[{"role": "system", "content": "1"}]), tokenizer, "chatml", is_chat=True)


def test_a_style_of_one_turn_refuses_a_conversation(monkeypatch):
    monkeypatch.setitem(CHAT_STYLES._entries, "own", lambda turn: f"Q: {turn}\nA: ")
    assert encode_sft(SFTRecord("x", "Hi", "Yes"), Letters(), "own", is_chat=True)[0] == ids("Q: Hi\nA: ")
    record = SFTRecord("x", "", "d", messages=[{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])
    with pytest.raises(UserError, match="renders one user's turn only"):
        encode_sft(record, Letters(), "own", is_chat=True)


def test_whole_prompts_are_held_out():
    records = [SFTRecord(f"{n}", f"prompt {n % 20}", f"response {n}") for n in range(60)]
    kept, held_out = split(records, 0.1, seed=3)
    assert {r.prompt for r in held_out}.isdisjoint(r.prompt for r in kept) and len(held_out) == 6 and len(kept) == 54
    assert [int(r.id) for r in kept] == sorted(int(r.id) for r in kept)
    assert split(records, 0.1, seed=3) == (kept, held_out) != split(records, 0.1, seed=4)
    assert split(records, 0.0, seed=3) == (records, [])
    assert len(split(records, 0.001, seed=3)[1]) == 3, "one prompt at least"
    with pytest.raises(UserError, match="1 prompts are too few"):
        split(records[:1], 0.5, seed=3)

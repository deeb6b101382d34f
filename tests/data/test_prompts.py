import pytest

from common.errors import UserError
from common.records import Task
from data.instructions import code_turn
from data.prompts import build_prompt, prompt_text, render_chat, render_messages
from reward.registry import REWARDS

TASK = Task("t", "What is 1+1?", "2")
TURN = "What is 1+1?\nPlease reason step by step, and put your final answer within \\boxed{}."


class Letters:
    chat_template = None

    def __call__(self, text, add_special_tokens):
        assert add_special_tokens is False
        return {"input_ids": [ord(c) for c in text]}


class WithTemplate(Letters):
    chat_template = "{{ messages }}"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return f"<{messages[0]['role']}>{messages[0]['content']}<assistant>"


@pytest.mark.parametrize(
    "style, text",
    [
        ("chatml", f"<|im_start|>user\n{TURN}<|im_end|>\n<|im_start|>assistant\n"),
        (
            "chatml-system",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n{TURN}<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "llama3",
            f"<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n{TURN}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "llama3-mmada",
            f"<|startoftext|><|start_header_id|>user<|end_header_id|>\n{TURN}<|eot_id|>"
            "<|startoftext|><|start_header_id|>assistant<|end_header_id|>\n",
        ),
    ],
)
def test_fixed_forms(style, text):
    math = REWARDS.get("math")
    assert prompt_text(TASK, math, style, Letters()) == text
    assert prompt_text(TASK, math, style, WithTemplate(), use_tokenizer_template=False) == text
    assert prompt_text(TASK, math, style, Letters(), start_with_think=True) == text + "<think>\n"
    assert build_prompt(TASK, math, style, Letters()) == [ord(c) for c in text]


@pytest.mark.parametrize(
    "family, text",
    [
        ("sdar", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        (
            "dream",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "llada",
            "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "mmada",
            "<|startoftext|><|start_header_id|>user<|end_header_id|>\nHi<|eot_id|>"
            "<|startoftext|><|start_header_id|>assistant<|end_header_id|>\n",
        ),
    ],
)
def test_the_form_of_a_family(family, text):
    from models.registry import FAMILIES

    assert render_chat("Hi", FAMILIES.get(family).chat_style, Letters()) == text


def test_code_prompts_of_a_family_with_a_system_turn():
    """What DiffuCoder, of the family dream, is asked: the head of the function, or a program that reads and prints."""
    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nAdd two numbers.\n"
    tail = "<|im_end|>\n<|im_start|>assistant\n"
    code = REWARDS.get("code")
    function = Task("t", "Add two numbers.", None, {"test_method": "function", "prefix": "def add(a, b):", "test_list": []})
    assert prompt_text(function, code, "chatml-system", Letters()) == (
        f"{head}Write the solution as one Python code block, between ```python and ```. It must begin with this:\n"
        f"```python\ndef add(a, b):\n```{tail}"
    )
    stdio = Task("t", "Add two numbers.", None, {"test_method": "stdio"})
    assert prompt_text(stdio, code, "chatml-system", Letters()) == (
        f"{head}Write the solution as one Python code block, between ```python and ```. "
        f"The program must read its input from stdin and print its output to stdout.{tail}"
    )


def test_several_turns():
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}]
    assert render_messages(turns, "llama3-mmada", Letters()) == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n1<|eot_id|>"
        "<|startoftext|><|start_header_id|>assistant<|end_header_id|>\n2<|eot_id|>"
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n3<|eot_id|>"
        "<|startoftext|><|start_header_id|>assistant<|end_header_id|>\n"
    )
    own = [{"role": "system", "content": "B."}, *turns]
    chatml = "<|im_start|>system\nB.<|im_end|>\n<|im_start|>user\n1<|im_end|>\n"
    assert render_messages(own, "chatml-system", Letters()).startswith(chatml)
    llama3 = "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nB.<|eot_id|><|start_header_id|>user<|end_header_id|>"
    assert render_messages(own, "llama3", Letters()).startswith(llama3 + "\n\n1<|eot_id|>")


def test_the_tokenizers_own_template_comes_first():
    assert prompt_text(TASK, REWARDS.get("math"), "chatml", WithTemplate()) == f"<user>{TURN}<assistant>"


def test_a_template_that_thinks_already():
    tokenizer = WithTemplate()
    tokenizer.apply_chat_template = lambda *_, **__: "...<think>\n"
    assert prompt_text(TASK, REWARDS.get("math"), "chatml", tokenizer, start_with_think=True) == "...<think>\n"


def test_exact_takes_the_question_verbatim():
    task = Task("t", "s52910=", "01259")
    assert build_prompt(task, REWARDS.get("exact"), "chatml", WithTemplate(), start_with_think=True) == [ord(c) for c in "s52910="]


def test_unknown_style():
    with pytest.raises(UserError, match="chatml-system"):
        prompt_text(TASK, REWARDS.get("math"), "chatmll", Letters())


def test_code_turns():
    function = code_turn("Add.", {"test_method": "function", "prefix": "def add(a, b):\n"})
    assert function.startswith("Add.\n") and function.endswith("```python\ndef add(a, b):\n```")
    stdio = code_turn("Add.", {"test_method": "stdio"})
    assert "stdin" in stdio and "stdout" in stdio and "```python" in stdio


def test_the_tiny_tokenizer():
    from data.tiny_tasks import ALPHABET, TINY_SPECIAL_TOKENS, generate

    tiny = pytest.importorskip("models.tiny")
    tokenizer = tiny.tiny_tokenizer()
    assert len(tokenizer) == len(ALPHABET) + len(TINY_SPECIAL_TOKENS) == 28
    for record in generate("mixed", 64, seed=0):
        task = Task("t", record["question"], record["ground_truth_answer"])
        ids = build_prompt(task, REWARDS.get("exact"), "chatml", tokenizer)
        assert ids == [ALPHABET.index(c) for c in record["question"]]
        assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == record["question"]

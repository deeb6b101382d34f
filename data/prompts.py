"""Tasks -> prompt token ids: what a reward asks for, in the model's chat format.

The checkpoint's own chat template is used where its tokenizer has one; the fixed forms below are the fallback, and the way to
reproduce numbers that were made with them.
"""

from __future__ import annotations

from typing import Any, Callable

from common.records import Task
from common.registry import Registry
from reward.registry import Reward

CHAT_STYLES: Registry[Callable[[str], str]] = Registry("chat style")
"""Name (Family.chat_style) -> the text of a prompt from that of the user's turn, up to where the answer begins."""

THINK_TAG = "<think>\n"
SYSTEM_LINE = "You are a helpful assistant."


@CHAT_STYLES.register("chatml")
def chatml(turn: str) -> str:
    return f"<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n"


@CHAT_STYLES.register("chatml-system")
def chatml_system(turn: str) -> str:
    return f"<|im_start|>system\n{SYSTEM_LINE}<|im_end|>\n{chatml(turn)}"


@CHAT_STYLES.register("llama3")
def llama3(turn: str) -> str:
    start, end = "<|start_header_id|>", "<|end_header_id|>"
    return f"<|startoftext|>{start}user{end}\n\n{turn}<|eot_id|>{start}assistant{end}\n\n"


def render_chat(
    turn: str, chat_style: str, tokenizer: Any, use_tokenizer_template: bool = True, start_with_think: bool = False
) -> str:
    """The text of a prompt whose user says `turn`: the tokenizer's chat template where it has one (and may be used), else the
    fixed form. `start_with_think` begins the answer with a think tag, unless the template has done so."""
    if use_tokenizer_template and getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template([{"role": "user", "content": turn}], tokenize=False, add_generation_prompt=True)
    else:
        text = CHAT_STYLES.get(chat_style)(turn)
    if start_with_think and not text.rstrip().endswith(THINK_TAG.strip()):
        text += THINK_TAG
    return text


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a rendered prompt: special tokens are those that its text spells out, none are added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt_text(
    task: Task,
    reward: type[Reward] | Reward,
    chat_style: str,
    tokenizer: Any,
    use_tokenizer_template: bool = True,
    start_with_think: bool = False,
) -> str:
    """The text of a task's prompt. `reward` (REWARDS.get(data_type)) says what to ask for, and whether it is a chat at all."""
    turn = reward.instruction(task)
    if not reward.chat:
        return turn
    return render_chat(turn, chat_style, tokenizer, use_tokenizer_template, start_with_think)


def build_prompt(
    task: Task,
    reward: type[Reward] | Reward,
    chat_style: str,
    tokenizer: Any,
    use_tokenizer_template: bool = True,
    start_with_think: bool = False,
) -> list[int]:
    """Prompt token ids of a task: `prompt_text`, encoded."""
    return encode(tokenizer, prompt_text(task, reward, chat_style, tokenizer, use_tokenizer_template, start_with_think))

"""Tasks -> prompt token ids: what a reward asks for, in the model's chat format.

The checkpoint's own chat template is used where its tokenizer has one; the fixed forms below are the fallback, and the way to
reproduce numbers that were made with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable

from common.errors import UserError
from common.records import Task
from common.registry import Registry
from reward.registry import Reward

Message = dict[str, str]
"""One turn: {"role": "system" | "user" | "assistant", "content": text}."""

CHAT_STYLES: Registry[Callable[[str], str]] = Registry("chat style")
"""Name (Family.chat_style) -> the text of a prompt from that of the user's turn, up to where the answer begins. A `ChatStyle` can
do longer conversations too, which finetuning data may hold."""

THINK_TAG = "<think>\n"
SYSTEM_LINE = "You are a helpful assistant."


@dataclass(frozen=True)
class ChatStyle:
    """A fixed chat format, as pieces of text."""

    turn: str
    """One turn, with {role} and {text}."""
    answer: str
    """Where the answer begins."""
    end: str
    """The token that ends a turn."""
    start: str = ""
    """Before the first turn."""
    system: str | None = None
    """What the system says where the conversation does not begin with it."""

    def __call__(self, turn: str) -> str:
        return self.render([{"role": "user", "content": turn}])

    def render(self, messages: list[Message]) -> str:
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        turns = [self.turn.replace("{role}", m["role"]).replace("{text}", m["content"]) for m in messages]
        return self.start + "".join(turns) + self.answer


CHATML = dict(turn="<|im_start|>{role}\n{text}<|im_end|>\n", answer="<|im_start|>assistant\n", end="<|im_end|>")
CHAT_STYLES.register("chatml", ChatStyle(**CHATML))
CHAT_STYLES.register("chatml-system", ChatStyle(**CHATML, system=SYSTEM_LINE))
CHAT_STYLES.register(
    "llama3",  # what the template of LLaDA's published tokenizer renders
    ChatStyle(
        start="<|startoftext|>",
        turn="<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>",
        answer="<|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
    ),
)
CHAT_STYLES.register(
    "llama3-mmada",  # one newline behind a header, and every turn begins as the first does
    ChatStyle(
        turn="<|startoftext|><|start_header_id|>{role}<|end_header_id|>\n{text}<|eot_id|>",
        answer="<|startoftext|><|start_header_id|>assistant<|end_header_id|>\n",
        end="<|eot_id|>",
    ),
)


def render_chat(
    turn: str, chat_style: str, tokenizer: Any, use_tokenizer_template: bool = True, start_with_think: bool = False
) -> str:
    """The text of a prompt whose user says `turn`: the tokenizer's chat template where it has one (and may be used), else the
    fixed form. `start_with_think` begins the answer with a think tag, unless the template has done so."""
    text = render_messages([{"role": "user", "content": turn}], chat_style, tokenizer, use_tokenizer_template)
    if start_with_think and not text.rstrip().endswith(THINK_TAG.strip()):
        text += THINK_TAG
    return text


def render_messages(messages: list[Message], chat_style: str, tokenizer: Any, use_tokenizer_template: bool = True) -> str:
    """The text of a conversation up to where the next answer begins: the tokenizer's chat template where it has one (and may be
    used), else the fixed form. Raises UserError where either of them cannot render it."""
    if use_tokenizer_template and getattr(tokenizer, "chat_template", None):
        from jinja2 import TemplateError  # what transformers renders with

        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            roles = ", ".join(m["role"] for m in messages)
            raise UserError(f"the tokenizer's chat template refuses a conversation of the turns {roles}: {error}") from error
    style = CHAT_STYLES.get(chat_style)
    if isinstance(style, ChatStyle):
        return style.render(messages)
    if [m["role"] for m in messages] != ["user"]:
        raise UserError(f"chat style {chat_style!r} renders one user's turn only: make it a data.prompts.ChatStyle")
    return style(messages[0]["content"])


def end_token(chat_style: str, tokenizer: Any) -> int | None:
    """Id of the token that ends an answer: the chat style's where the tokenizer knows it, else the tokenizer's own end."""
    end = getattr(CHAT_STYLES.get(chat_style), "end", None)
    vocabulary = tokenizer.get_vocab()
    return vocabulary[end] if end in vocabulary else tokenizer.eos_token_id


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

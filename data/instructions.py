"""What a prompt asks for, by kind of task: the text of the user's turn. Rewards name theirs in `Reward.instruction`."""

from __future__ import annotations

from typing import Any, Mapping

BOXED_LINE = "Please reason step by step, and put your final answer within \\boxed{}."
FUNCTION_LINE = "Write the solution as one Python code block, between ```python and ```. It must begin with this:"
STDIO_LINE = (
    "Write the solution as one Python code block, between ```python and ```. "
    "The program must read its input from stdin and print its output to stdout."
)


def math_turn(question: str) -> str:
    return f"{question.rstrip()}\n{BOXED_LINE}"


def code_turn(question: str, fields: Mapping[str, Any]) -> str:
    """`fields` of the record: test_method `function` (with `prefix`, the head of the function) or `stdio`."""
    if fields.get("test_method") == "function":
        return f"{question.rstrip()}\n{FUNCTION_LINE}\n```python\n{str(fields.get('prefix', '')).rstrip()}\n```"
    return f"{question.rstrip()}\n{STDIO_LINE}"

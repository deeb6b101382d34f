"""The program in a response, and the comparison of outputs: pure string functions."""

from __future__ import annotations

import ast
import re
import textwrap

from reward.function_names import definitions_of, parse, parse_head

_OPEN = re.compile(r"```[ \t]*([A-Za-z0-9_+.-]*)[^\n`]*\r?\n")
_CLOSE = re.compile(r"^[ \t]*```[ \t]*\r?$", re.MULTILINE)
PYTHON = ("python", "python3", "py")


def code_blocks(text: str) -> list[tuple[str, str, bool]]:
    """(label in lower case, content, whether it is closed) of every fenced block, in order.

    A block ends at the next line that is a fence, else at the next fence anywhere (`print(1)```), else with the text.
    """
    blocks, position = [], 0
    while opening := _OPEN.search(text, position):
        start = opening.end()
        closing = _CLOSE.search(text, start)
        following = _OPEN.search(text, start)
        if closing is None or (following is not None and following.group(1) and following.start() < closing.start()):
            end = text.find("```", start)
            stop, position = (len(text), len(text)) if end < 0 else (end, end + 3)
        else:
            end, stop, position = closing.start(), closing.start(), closing.end()
        blocks.append((opening.group(1).lower(), text[start:stop], end >= 0))
        if following is not None and following.start() == end and following.group(1):
            position = end  # the fence that ended this block opens the next
    return blocks


def last_program(text: str) -> str | None:
    """The last closed block labelled python; else an unclosed one at the end; else the last block without a label; else None."""
    blocks = code_blocks(text)
    for chosen in (
        [content for label, content, closed in blocks if label in PYTHON and closed],
        [content for label, content, closed in blocks if label in PYTHON],
        [content for label, content, closed in blocks if not label and closed],
    ):
        if chosen:
            return textwrap.dedent(chosen[-1]).replace("\r\n", "\n")
    return None


def with_prefix(code: str, prefix: str) -> str:
    """The program of a function task whose prompt gives its head.

    The prefix's imports come first: many answers leave them out. A block that defines nothing of what the prefix begins, but
    completes it, is taken as its continuation. Everything else is left as it is.
    """
    if not prefix.strip():
        return code
    head = parse_head(prefix)
    if head is None:
        return code
    program = parse(code)
    if definitions_of(head) and (program is None or not definitions_of(head) & definitions_of(program)):
        last = prefix.rstrip().rpartition("\n")[2]
        indent = last[: len(last) - len(last.lstrip())] + "    " * last.endswith(":")
        whole = prefix.rstrip() + "\n" + (code if code[:1] in (" ", "\t") else textwrap.indent(code, indent))
        if (joined := parse(whole)) is not None and definitions_of(head) & definitions_of(joined):
            return whole
    imports = [n for n in head.body if isinstance(n, (ast.Import, ast.ImportFrom)) and getattr(n, "module", "") != "__future__"]
    if program is None or not imports:
        return code
    lines = "\n".join(ast.unparse(node) for node in imports)
    future = [n for n in program.body if isinstance(n, ast.ImportFrom) and n.module == "__future__"]
    return lines + "\n" + code if not future else code


def same_output(output: str, expected: str) -> bool:
    """Equal line by line, each with its whitespace collapsed; empty lines at both ends do not count."""
    return _lines(output) == _lines(expected)


def _lines(text: str) -> list[str]:
    lines = [" ".join(line.split()) for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    while lines and not lines[0]:
        lines.pop(0)
    return lines

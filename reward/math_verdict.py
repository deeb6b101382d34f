"""The slow part of comparing two answers: math-verify (LaTeX -> sympy -> equal). Runs in worker processes only."""

from __future__ import annotations

import logging

import sympy
from math_verify import parse, verify

from reward.math_text import for_parser

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its own time limits are off: the pool has one

FLOAT_DIGITS = 12  # math-verify rounds to 6 by default, and then 3.1415926 is 3.1415927


def _with_imaginary_unit(parsed: list) -> list:
    """The parser reads i as a variable, which is right for an index; tried as the imaginary unit too."""
    return [
        one.subs({symbol: sympy.I for symbol in one.free_symbols if symbol.name == "i"}) if isinstance(one, sympy.Expr) else one
        for one in parsed
    ]


def is_equal(pair: list[str]) -> bool:
    """[prediction, answer] -> whether they are mathematically equal."""
    # Each parse is [expression, its text] ([text] where parsing failed); verify compares like with like.
    target, gold = (parse(f"${for_parser(text)}$", parsing_timeout=None) for text in pair)
    if not gold or not target:
        return False

    def equal(gold: list, target: list) -> bool:
        return verify(gold, target, float_rounding=FLOAT_DIGITS, allow_set_relation_comp=True, timeout_seconds=None)

    return equal(gold, target) or equal(_with_imaginary_unit(gold), _with_imaginary_unit(target))

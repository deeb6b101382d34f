import json
import time
from fractions import Fraction
from pathlib import Path

import pytest

from reward.math_text import last_boxed, normalise, number, quick_verdict, split_unit

GOLDEN = Path(__file__).parents[1] / "golden" / "data" / "rewards"


@pytest.mark.parametrize("case", json.loads((GOLDEN / "boxed.json").read_text()), ids=lambda case: case["text"])
def test_last_boxed_golden(case):
    assert last_boxed(case["text"]) == case["human"]


@pytest.mark.parametrize(
    "text, content",
    [
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{1} and cut off in \boxed{2", "1"),
        (r"\fbox{3}", "3"),
        (r"\boxed{\{1}", r"\{1"),
        (r"\boxed{\sqrt{\frac{1}{2}}} }", r"\sqrt{\frac{1}{2}}"),
        (r"$\boxed 42.$", "42"),
        (r"\boxedtext{5}", None),
        (r"} \boxed{a}", "a"),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    "text, value",
    [
        ("007", Fraction(7)),
        ("-.5", Fraction(-1, 2)),
        (r"\frac{3}{-4}", Fraction(-3, 4)),
        (r"2\frac{1}{3}", Fraction(7, 3)),
        ("2 1/3", Fraction(7, 3)),
        (r"-1\frac{1}{2}", Fraction(-3, 2)),
        ("1.5e-3", Fraction(3, 2000)),
        (r"1.5 \times 10^{3}", Fraction(1500)),
        (r"0.\overline{3}", Fraction(1, 3)),
        (r"1.2\overline{45}", Fraction(137, 110)),
        (r"\frac{1}{0}", None),
        ("1/0", None),
        ("1e999999999", None),
        ("--5", None),
        ("x", None),
        ("", None),
    ],
)
def test_number(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    "text, parts",
    [
        (r"10\mathrm{cm}", ("10", "cm")),
        ("12 square feet", ("12", "square ft")),
        (r"5\sqrt{2}\text{ cm}", (r"5\sqrt{2}", "cm")),
        (r"8 \text{ units}^2", ("8", "unit ^")),
        ("2x", ("2x", "")),
        ("5m", ("5m", "")),
        ("5 m", ("5", "m")),
        (r"7\text{ and }9", (r"7\text{ and }9", "")),
        ("3 and 4", ("3 and 4", "")),
    ],
)
def test_split_unit(text, parts):
    assert split_unit(text) == parts


@pytest.mark.parametrize(
    "prediction, answer, verdict",
    [
        ("1,000", "1000", True),
        ("(1,000)", "1000", None),  # a point of two coordinates
        ("listen", "silent", False),  # products of the same variables, but words
        ("EVEN", r"\text{even}", True),
        ("10 cm", "10 m", False),
        ("10 cm", r"10\text{ centimeters}", True),
        ("x=5", "5", True),
        ("x=5", "y=5", False),
        (r"5\%", "0.05", True),
        (r"5\%", r"6\%", False),
        ("(A)", "A", True),
        ("B", r"\text{(A)}", False),
        ("101_2", "101_{2}", True),
        ("101_2", "101", False),
        ("0.3333333333", r"\frac13", False),
        (r"\{1,2\}", "(1,2)", False),
        ("[1,2]", "(1,2]", False),
        ("", "5", False),
        ("x+1", "1+x", None),
    ],
)
def test_quick_verdict(prediction, answer, verdict):
    assert quick_verdict(prediction, answer) is verdict


def test_normalise_keeps_rows_of_a_matrix():
    assert normalise(r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}") == r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"


@pytest.mark.parametrize("piece", ["{", r"\boxed{", "1,000~", "12 ", r"\text{a}", "cm-", r"\frac", "$", "-", r"\\", "1{,}"])
def test_hostile_text_takes_no_time(piece):
    """These functions run in the training process, without a time limit."""
    begin = time.perf_counter()
    last_boxed(piece * (200_000 // len(piece)))
    quick_verdict("1" + piece * (2000 // len(piece)), "5 cm")
    assert time.perf_counter() - begin < 2

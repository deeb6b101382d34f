"""Mathematical answers as text: the last box, one form for many ways of writing, and the verdicts that need no algebra.

Pure string functions, quick and safe on anything a model may write. What they leave open goes to math-verify in worker
processes (reward/math_verdict.py).
"""

from __future__ import annotations

import re
from fractions import Fraction

# ---- the last box ------------------------------------------------------------------------------------------------------

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BARE = re.compile(r"[^\s{}$]+")


def matching_braces(text: str) -> dict[int, int]:
    """Position of each `{` that is closed -> position of its `}`, in one pass. A backslash escapes what follows, as in TeX."""
    pairs: dict[int, int] = {}
    is_open: list[int] = []
    for match in _BRACE.finditer(text):
        if match.group() == "{":
            is_open.append(match.start())
        elif match.group() == "}" and is_open:
            pairs[is_open.pop()] = match.start()
    return pairs


def last_boxed(text: str) -> str | None:
    """Content of the last complete `\\boxed{...}` (or `\\fbox{...}`, or `\\boxed 5`), untouched; None where there is none.

    Of nested boxes the inner one counts; a box that is never closed (a response cut off inside it) does not.
    """
    boxes = list(_BOX.finditer(text))
    pairs = matching_braces(text) if boxes else {}
    for match in reversed(boxes):
        start = match.end()
        if start in pairs:
            return text[start + 1 : pairs[start]]
        if bare := _BARE.match(text, start):
            return bare.group().rstrip(".,;:!?)")
    return None


# ---- one form for many ways of writing ---------------------------------------------------------------------------------

_CHARACTERS = str.maketrans({
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\leq ",
    "≥": r"\geq ", "≠": r"\neq ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "°": r"^{\circ}", "±": r"\pm ", "²": "^{2}",
    "³": "^{3}", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "’": "'", "\u00a0": " ", "\u2009": " ", "，": ",",
    "（": "(", "）": ")",
})  # fmt: skip
_TEXT_COMMANDS = r"text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|mbox|operatorname|rm"
_TEXT = re.compile(rf"\\(?:{_TEXT_COMMANDS})\s*\{{([^{{}}]*)\}}")
_NEW_ROW = "\x01"
_GROUP = r"(\{[^{}]*\}|\d|[a-zA-Z])"
_GROUPED_DIGITS = re.compile(r"(?<![\d.,\w])\d{1,3}(?:,\d{3})+(?!\d)(?!,\d)")


def _strip_delimiters(text: str) -> str:
    """Without surrounding $...$, \\(...\\), \\[...\\] and \\boxed{...}."""
    while True:
        before = text = text.strip()
        for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
            if text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right):
                inside = text[len(left) : -len(right)]
                if left not in inside:
                    text = inside.strip()
        if match := _BOX.match(text):
            if matching_braces(text).get(match.end()) == len(text) - 1:
                text = text[match.end() + 1 : -1]
        if text == before:
            return text


def _join_thousands(text: str) -> str:
    """1,000 -> 1000, but not within brackets, where the comma separates: (1,200) is a point."""
    depth, pieces, last = 0, [], 0
    for n, character in enumerate(text + "("):
        if character in "([{" or n == len(text):
            if depth == 0:
                pieces.append(_GROUPED_DIGITS.sub(lambda m: m.group().replace(",", ""), text[last:n]))
                last = n
            depth += 1
        elif character in ")]}" and depth > 0:
            depth -= 1
            if depth == 0:
                pieces.append(text[last : n + 1])
                last = n + 1
    return "".join(pieces) + text[last:]


def normalise(text: str) -> str:
    """One LaTeX form: delimiters, spacing, fraction variants, unicode, currency and digit groups ironed out; \\text is kept."""
    text = _strip_delimiters(text.translate(_CHARACTERS))
    if (match := _TEXT.fullmatch(text)) and match[1].strip()[:1].isdigit():
        text = match[1]  # \\text{5 apples}
    text = text.replace("\\\\", _NEW_ROW)  # so that no pattern takes its second backslash for the start of a command
    text = re.sub(r"\\(?:left|right|[bB]ig[glr]?|[bB]igg[lr]?)(?![a-zA-Z])\s*\.?(?=[()\[\]{}|\\.]|$)", "", text)
    text = re.sub(r"\\(?:displaystyle|textstyle|limits|nolimits)(?![a-zA-Z])", " ", text)
    text = re.sub(r"(?<=\d)(?:\\,|\\!|\\;|\\ |\{,\}|,\\!|~)\s*(?=\d{3}(?!\d))", "", text)  # 1\,000
    text = re.sub(r"\\[!]", "", text)
    text = re.sub(r"\\(?:[,;:> ]|quad|qquad|thinspace)(?![a-zA-Z])|~", " ", text)
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(rf"\\frac\s*{_GROUP}\s*{_GROUP}", lambda m: rf"\frac{{{m[1].strip('{}')}}}{{{m[2].strip('{}')}}}", text)
    text = re.sub(r"\\sqrt\s*(\d|[a-zA-Z])", r"\\sqrt{\1}", text)
    text = re.sub(r"√\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[a-zA-Z]))", lambda m: rf"\sqrt{{{m[1] or m[2]}}}", text)
    text = re.sub(r"\^\s*(\d)(?=\d)", r"^{\1}", text)  # LaTeX raises one digit: 2^10 is 2^{1}0, and not 1024
    text = re.sub(r"\\?\$", "", text).replace(r"\%", "%")
    text = re.sub(r"\\(le|ge|ne)(?![a-zA-Z])", r"\\\1q", text).replace(r"\varnothing", r"\emptyset")
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z])", r"^{\\circ}", text)
    text = _join_thousands(text)
    text = re.sub(r"(?<=[^.])\.\s*$", "", text.strip())  # a full stop
    return re.sub(r"\s+", " ", text).strip().replace(_NEW_ROW, "\\\\")


def plain(text: str) -> str:
    """A normalised form with \\text and its kin unwrapped and their spacing kept: the reading of words."""
    while (unwrapped := _TEXT.sub(r"\1", text)) != text:
        text = unwrapped
    return re.sub(r"\s+", " ", text).strip().rstrip(".")


def squeeze(text: str) -> str:
    """Without any space, except where one ends a command before a letter (\\pi r)."""
    return re.sub(r"(?<!\\)\s+", "", re.sub(r"(\\[a-zA-Z]+)\s+(?=[a-zA-Z])", "\\1\0", text)).replace("\0", " ")


# ---- units -------------------------------------------------------------------------------------------------------------

_UNIT_GROUPS = (
    "cm centimeter centimeters centimetre centimetres", "m meter meters metre metres", "mm millimeter millimeters",
    "km kilometer kilometers kilometre kilometres", "in inch inches", "ft foot feet", "yd yard yards", "mi mile miles",
    "g gram grams", "kg kilogram kilograms", "lb lbs pound pounds", "oz ounce ounces",
    "l liter liters litre litres", "ml milliliter milliliters",
    "s sec second seconds", "min minute minutes", "h hr hrs hour hours", "day days", "week weeks", "month months", "year years",
    "mph", "dollar dollars usd", "cent cents", "percent", "degree degrees deg ^{\\circ}", "rad radian radians",
    "unit units", "way ways",
)  # fmt: skip
_UNITS = {name: names.split()[0] for names in _UNIT_GROUPS for name in names.split()}
_NOT_UNITS = set("and or to mod sin cos tan log ln exp pi base if for is not times over".split())
_UNIT_POWER = r"(?:\s*\^\s*\{?\d\}?)?"
_UNIT_TAIL = re.compile(
    rf"^(?P<value>.*[\d}})%])\s*(?P<unit>(?:\\(?:{_TEXT_COMMANDS})\s*\{{[^{{}}]*\}}{_UNIT_POWER}|\^\{{\\circ\}}\s*[CF]?)\s*(?:/\s*.*)?)$"
)
_UNIT_WORD = rf"[A-Za-z]+{_UNIT_POWER}"
_UNIT_WORDS = re.compile(rf"^(?P<value>.*[\d}})%])\s*(?P<unit>{_UNIT_WORD}(?:(?:\s+|\s*/\s*|\s*-\s*){_UNIT_WORD})*)$")


def split_unit(text: str) -> tuple[str, str]:
    """A normalised answer -> (value, unit), e.g. `10\\mathrm{cm}` -> ("10", "cm"); the unit is "" where there is none.

    Words without \\text count as a unit behind a plain number only (`10 square feet`, but `2x` has none).
    """
    if (match := _UNIT_TAIL.match(text)) is None:
        match = _UNIT_WORDS.match(text)
        if match is None or number(match["value"].strip()) is None:
            return text, ""
        if len(match["unit"]) == 1 and not text[match.end("value")].isspace():
            return text, ""  # 5m may be a product
    words = re.findall(r"[A-Za-z]+|\^\{\\circ\}|\^", plain(match["unit"]))
    if not words or any(word.lower() in _NOT_UNITS for word in words):
        return text, ""
    if len(words) == 1 and len(words[0]) == 1 and words[0] not in _UNITS:
        return text, ""
    return match["value"].strip(), " ".join(_UNITS.get(word, _UNITS.get(word.lower(), word.lower())) for word in words)


# ---- numbers -----------------------------------------------------------------------------------------------------------

_DECIMAL = r"(?:\d+\.?\d*|\.\d+)"
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{?(\d+)\}?")
_SCIENTIFIC = re.compile(rf"({_DECIMAL})(?:[eE]([+-]?\d+)|(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{{([+-]?\d+)\}}|([+-]?\d)))")
_LARGEST_EXPONENT = 400  # 1e999999999 would fill the memory
_LONGEST_NUMBER = 2000


def number(text: str) -> Fraction | None:
    """A literal number (integer, decimal, repeating decimal, fraction, mixed, scientific) as an exact value, else None."""
    text = text.strip()
    if len(text) > _LONGEST_NUMBER:
        return None
    if match := re.fullmatch(r"([+-])\s*(.+)", text):
        value = None if match[2][0] in "+-" else number(match[2])
        return value if value is None or match[1] == "+" else -value
    if re.fullmatch(_DECIMAL, text):
        return Fraction(text)
    if match := _REPEATING.fullmatch(text):
        whole, fixed, repeated = match[1] or "0", match[2], match[3]
        return Fraction(int(whole + fixed + repeated) - int(whole + fixed), (10 ** len(repeated) - 1) * 10 ** len(fixed))
    if match := _SCIENTIFIC.fullmatch(text.replace(" ", "")):
        exponent = int(match[2] or match[3] or match[4])
        return Fraction(match[1]) * Fraction(10) ** exponent if abs(exponent) <= _LARGEST_EXPONENT else None
    if match := re.fullmatch(r"(?:(\d+)\s*)?\\frac\{([^{}]+)\}\{([^{}]+)\}", text):
        whole, over, under = Fraction(match[1] or 0), number(match[2]), number(match[3])
        if match[1] and not (match[2].strip().isdigit() and match[3].strip().isdigit()):
            return None  # 2\frac{-1}{2} is no mixed number
        return whole + over / under if over is not None and under else None
    if match := re.fullmatch(rf"(?:(\d+)\s+)?([+-]?{_DECIMAL})\s*/\s*([+-]?{_DECIMAL})", text):
        whole, over, under = Fraction(match[1] or 0), Fraction(match[2]), Fraction(match[3])
        return whole + over / under if under else None
    return None


def percentage(text: str) -> tuple[Fraction, bool] | None:
    """A literal number and whether a percent sign (or the word) stands behind it."""
    match = re.fullmatch(r"(.+?)\s*(?:%|percent)", text)
    value = number(match[1] if match else text)
    return None if value is None else (value, match is not None)


# ---- verdicts without algebra ------------------------------------------------------------------------------------------

_BASED = re.compile(r"([0-9A-Za-z]+)_(?:\{(\d+)\}|(\d+))")
_CHOICE = re.compile(r"\(?([A-Z])\)?[.:]?")
_FUNCTIONS = ("arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "sqrt", "frac", "infty")


def based(text: str) -> tuple[str, int] | None:
    """Digits and base of 12_{8}; a plain integer has base 10."""
    if match := _BASED.fullmatch(text):
        return match[1].lower().lstrip("0"), int(match[2] or match[3])
    return (text.lstrip("0"), 10) if text.isdigit() else None


def is_words(text: str) -> bool:
    """Whether a plain text reads as words rather than as a product of variables: `increasing`, `June 3`, but not `ab` or `2x`."""
    if re.search(r"[\\^_=+*<>{}]", text):
        return False
    words = [word for word in re.findall(r"[A-Za-z]+", text) if word.lower() not in _FUNCTIONS]
    return any(len(word) >= 4 for word in words)


def quick_verdict(prediction: str, answer: str) -> bool | None:
    """Whether two answers are equal where that can be told from their text; None where it takes algebra."""
    p, a = normalise(prediction), normalise(answer)
    if not p or not a:
        return False
    if squeeze(p) == squeeze(a):
        return True
    p_plain, a_plain = plain(p), plain(a)
    if squeeze(p_plain) == squeeze(a_plain):
        return True

    if "_" in p or "_" in a:
        p_based, a_based = based(squeeze(p)), based(squeeze(a))
        if p_based and a_based:
            return p_based == a_based
    p_choice, a_choice = _CHOICE.fullmatch(p_plain), _CHOICE.fullmatch(a_plain)
    if p_choice and a_choice:
        return p_choice[1] == a_choice[1]

    (p_value, p_unit), (a_value, a_unit) = split_unit(p), split_unit(a)
    (p_left, p_right), (a_left, a_right) = split_equation(p_value), split_equation(a_value)
    p_number, a_number = percentage(p_right), percentage(a_right)
    if p_number and a_number:
        if p_unit and a_unit and p_unit != a_unit or p_left and a_left and p_left != a_left:
            return False
        (x, x_percent), (y, y_percent) = p_number, a_number
        if x == y:
            return True
        return (x / 100 if x_percent else x) == (y / 100 if y_percent else y)  # 50% is a half, or fifty

    if is_words(a_plain) and not a_unit:
        return squeeze(p_plain).casefold() == squeeze(a_plain).casefold()
    p_brackets, a_brackets = brackets(p), brackets(a)
    if p_brackets and a_brackets and p_brackets != a_brackets:
        return False  # a point is no closed interval and no set
    return None


def brackets(text: str) -> str | None:
    """`(]` of `(1, 2]`: the brackets around a list that is one whole; None for any other text."""
    text = text.replace(r"\{", "<").replace(r"\}", ">")
    match = re.fullmatch(r"([(\[<])([^()\[\]<>]*,[^()\[\]<>]*)([)\]>])", text)
    return match[1] + match[3] if match else None


def split_equation(text: str) -> tuple[str, str]:
    """`x = 5` -> ("x", "5"), what an answer says about one variable; without such a left side, ("", text)."""
    match = re.fullmatch(r"([a-zA-Z]+)\s*=\s*([^=]+)", text)
    return (match[1], match[2].strip()) if match else ("", text)


def for_parser(text: str) -> str:
    """A normalised answer as math-verify is to read it: without its unit, degrees inside functions as radians."""
    text = normalise(text)
    if re.search(r"(?:sin|cos|tan|cot|sec|csc)(?![a-z])", text):
        text = re.sub(r"(\d+(?:\.\d+)?)\s*\^\{\\circ\}", r"(\\frac{\1\\pi}{180})", text)
    text = split_unit(text)[0].replace(r"^{\circ}", "")

    def as_fraction(match: re.Match) -> str:
        value = number(match.group())
        return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"

    return _REPEATING.sub(as_fraction, text)

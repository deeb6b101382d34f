"""What tests of functions may ask of a right program, and which names in them are whose."""

import ast

import pytest

from reward.code_text import with_prefix
from reward.function_names import split_names
from reward.sandbox import Limits, Sandbox


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as sandbox:
        yield sandbox


def run(sandbox, code, *tests, prefix="", seconds=5.0):
    verdicts = sandbox.run_functions(with_prefix(code, prefix), list(tests), prefix, Limits(seconds))
    return [v.passed for v in verdicts], [v.note for v in verdicts]


CASES = {
    "values": (
        r"""
import collections, decimal, fractions, datetime
P = collections.namedtuple('P', 'x y')
def same(x): return x
def kinds():
    return [None, True, 1, 2**200, -1.5, 'a\ud800', b'\xff', (1, [2]), {1, 2}, frozenset({3}), {(1, 2): {'a': []}}, 2j, ...,
            range(3)]
def more():
    return [P(1, 2), collections.Counter('aab'), collections.deque([1]),
    collections.OrderedDict(a=1), collections.defaultdict(list, a=[1]),
    decimal.Decimal('1.10'), fractions.Fraction(1, 3), datetime.date(2024, 1, 2), datetime.timedelta(1)]
""",
        [
            r"""
assert kinds() == [None, True, 1, 2**200, -1.5,
    'a\ud800', b'\xff', (1, [2]), {1, 2}, frozenset({3}), {(1, 2): {'a': []}}, 2j, ..., range(3)]
""",
            'assert [type(v) for v in kinds()][:4] == [type(None), bool, int, int]',
            "assert same({1: (2, {3}), 'x': [b'y', 2**70]}) == {1: (2, {3}), 'x': [b'y', 2**70]}",
            r"""
v = more()
assert v[0] == (1, 2) and v[1] == {'a': 2, 'b': 1}
assert list(v[2]) == [1] and v[3] == {'a': 1} and v[4] == {'a': [1]}
""",
            r"""
import datetime, decimal, fractions
assert more()[5:] == [
    decimal.Decimal('1.1'), fractions.Fraction(1, 3), datetime.date(2024, 1, 2), datetime.timedelta(1)]
""",
            r"""
assert same(list(range(100000))) == list(range(100000)) and same(float('inf')) > 1e308 and same(int) is int
""",
            "assert str(same(1e22)) == '1e+22' and same(0.1) + 0.2 != 0.3",
        ],
    ),
    "arguments changed in place": (
        r"""
def move(nums, d):
    nums.sort()
    d['n'] = len(nums)
""",
        [
            "a = [3, 1, 2]; d = {}; move(a, d); assert a == [1, 2, 3] and d == {'n': 3}",
            'assert move(a, d=d) is None and a == [1, 2, 3]',
        ],
    ),
    "objects": (
        r"""
class Stack:
    size = 0
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x); self.size += 1; return self
    def __len__(self): return self.size
    def __iter__(self): return iter(self.items)
    def __getitem__(self, n): return self.items[n]
    def __enter__(self): return self
    def __exit__(self, *a): self.items.clear()
class V:
    def __init__(self, x, y): self.x, self.y = x, y
    def __eq__(self, o): return (self.x, self.y) == (o.x, o.y)
    def __add__(self, o): return V(self.x + o.x, self.y + o.y)
    def __mul__(self, k): return V(self.x * k, self.y * k)
    def __repr__(self): return f'V({self.x}, {self.y})'
    def __lt__(self, o): return self.x < o.x
    def __hash__(self): return 1
""",
        [
            r"""
s = Stack(); s.push(1).push(2)
assert len(s) == 2 and list(s) == [1, 2] and s[1] == 2 and 2 in s and 3 not in s
""",
            'assert s.items == [1, 2] and s.size == 2 and isinstance(s, Stack) and not isinstance(s, V) and s',
            's.size = 7; assert s.size == 7',
            r"""
with Stack() as t:
    t.push(1)
    assert t[0] == 1
assert list(t) == []
""",
            r"""
assert V(1, 2) == V(1, 2) and V(1, 2) != V(1, 3) and V(1, 2) + V(1, 1) == V(2, 3) and V(1, 2) * 2 == V(2, 4)
""",
            r"""
assert repr(V(1, 2)) == 'V(1, 2)' and f'{V(1, 2)}' == 'V(1, 2)' and sorted([V(3, 0), V(1, 0)])[0].x == 1
""",
            "assert {V(1, 2): 5} and callable(V) and hasattr(s, 'push') and not hasattr(s, 'pull')",
        ],
    ),
    "functions as arguments and results": (
        r"""
def apply(f, xs): return [f(x) for x in xs]
def adder(n): return lambda x: x + n
def gen(n):
    for i in range(n): yield i * i
def fold(f, xs, start=0):
    for x in xs: start = f(start, x)
    return start
""",
        [
            r"""
assert apply(lambda x: x * 2, [1, 2]) == [2, 4] and apply(str, [1]) == ['1'] and apply(len, ['ab']) == [2]
""",
            'assert adder(2)(3) == 5 and list(map(adder(1), [1, 2])) == [2, 3] and apply(adder(5), [1]) == [6]',
            'assert list(gen(4)) == [0, 1, 4, 9] and sum(gen(3)) == 5 and next(iter(gen(2))) == 0',
            'assert fold(lambda a, x: a * x, [2, 3], start=1) == 6',
            r"""
def check(candidate):
    assert candidate(2)(1) == 3
    for n in range(3):
        assert candidate(n)(0) == n
check(adder)
""",
        ],
    ),
    "exceptions": (
        r"""
class MyError(ValueError): pass
def f(x):
    if x < 0: raise MyError('negative')
    if x == 0: raise ZeroDivisionError
    return {}[x]
""",
        [
            r"""
try:
    f(-1)
    assert False
except MyError as e:
    assert str(e) == 'negative'
""",
            r"""
try:
    f(-1)
    assert False
except ValueError:
    pass
""",
            r"""
try:
    f(0)
    assert False
except (TypeError, ZeroDivisionError):
    pass
""",
            r"""
import pytest
with pytest.raises(KeyError):
    f(3)
""",
        ],
    ),
    "modules that the program imported": (
        r"""
import math
from collections import Counter
import numpy as np
def f(x): return x / 3
def g(): return np.arange(3)
def h(): return np.float64(0.5), np.int32(3)
""",
        [
            'assert math.isclose(f(1), 1 / 3) and abs(f(2) - 0.666666) < 1e-3',
            'assert Counter([1, 1]) == {1: 2}',
            r"""
assert (g() == np.array([0, 1, 2])).all() and np.allclose(g(), [0, 1, 2]) and g().tolist() == [0, 1, 2] and h() == (0.5, 3)
""",
        ],
    ),
    "globals of the program": (
        r"""
MOD = 10
count = 0
def f():
    global count
    count += 1
    return MOD
""",
        [
            'assert f() == MOD and count == 0',
            'assert count == 1',
            'f(); f()',
            'assert count == 3',
        ],
    ),
    "a builtin as what is tested": (
        'def sum(a, b): return a * b',
        [
            'assert sum(3, 4) == 12',
            'assert abs(sum(3, -4)) == 12',
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_right_programs_pass(sandbox, name):
    code, tests = CASES[name]
    if "numpy" in code:
        pytest.importorskip("numpy")
    passed, notes = run(sandbox, code, *tests)
    assert passed == [True] * len(tests), notes


def test_verdicts_are_of_each_test(sandbox):
    """A test that ends the program, hangs or fails does not touch its neighbours; what earlier tests set up is there again."""
    code = "import os\ndef f(x):\n    if x == 2: os._exit(0)\n    while x == 3: pass\n    return x"
    tests = ["k = 1", "assert f(1) == k", "assert f(2) == 2", "assert f(4) == 4 * k", "assert f(3) == 3", "assert f(5) == 5 * k"]
    tests += ["assert f(6) == 5"]
    passed, notes = run(sandbox, code, *tests, seconds=0.5)
    assert passed == [True, True, False, True, False, True, False]
    assert "ended" in notes[2] and notes[4] == "time limit" and notes[6] == "AssertionError"


def test_the_time_limit_is_of_each_test(sandbox):
    code = "import time\ndef f(x):\n    end = time.process_time() + 0.3\n    while time.process_time() < end: pass\n    return x"
    assert run(sandbox, code, *["assert f(1) == 1"] * 12, seconds=0.6)[0] == [True] * 12  # 3.6 s in all


def test_mistakes_in_tests_fail_them_alone(sandbox):
    passed, notes = run(sandbox, "def f(x): return x", "assert f(1) ==", "assert g(1) == 1", "assert f(1) == 1")
    assert passed == [False, False, True]
    assert notes[0].startswith("SyntaxError") and notes[1] == "NameError: name 'g' is not defined"


def names(code, tests, prefix=""):
    natives, asked = split_names(code, prefix, [ast.parse(test) for test in tests])
    return sorted(natives), sorted(asked)


def test_names():
    assert names("def f(x): pass", ["assert f(1) == abs(len([2]))"]) == ([], ["f"])
    assert names("def abs(x): return 0\ndef f(x): pass", ["assert abs(f(1) - 2) < 1"]) == ([], ["f"])
    assert names("def sum(a, b): return 1\ndef abs(x): return 0", ["assert abs(sum(1, 2)) == 3"]) == ([], ["sum"])
    # The prefix says what is tested, and its imports are the judge's whatever the program makes of the name.
    assert names("def sum(a): pass\ndef abs(x): pass", ["assert abs(sum([1]) - 1) < 1"], "def sum(a):\n") == ([], ["sum"])
    prefix = "from math import isclose\ndef f(x):\n    '''text'''\n"
    assert names("def isclose(*a): return True\ndef f(x): pass", ["assert isclose(f(1), 2)"], prefix) == (["isclose"], ["f"])
    # Modules, used as such, are the judge's; what a program calls by another name, or from elsewhere, is not.
    assert names("class math: pass\ndef f(x): pass", ["assert math.isclose(f(1), 2)"]) == (["math"], ["f"])
    assert names("from math import gcd\nfrom os import _exit as f", ["assert gcd(4, 6) == f(2)"]) == (["gcd"], ["f"])
    assert names("from math import gcd\ndef gcd(a, b): return 2", ["assert gcd(4, 6) == 2"]) == ([], ["gcd"])
    # What a test binds is its own.
    assert names("x = 1", ["x = f(1)\nassert x == [y for y in x]", "def check(c): assert c(1)\ncheck(f)"]) == ([], ["f"])

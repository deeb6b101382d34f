"""The judge's side of function tests: runs the tests' statements, in a process that the program cannot reach.

The statements never run beside the program. A name of the program that they use is a `Handle` here: calling it sends the
arguments to the program's process, and what comes back is data, built here of exact builtin types. The comparison, the
builtins and the expected values are the judge's own; the program is told arguments and nothing else.

An object that is not data (an instance of the program's class, a generator) stays with the program, as a Handle. It is not
believed where it could give the verdict: it equals no plain data, whatever its __eq__ says, and arithmetic with plain data
gives a Handle that tells nothing.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
from typing import Any, Iterable

from reward.function_names import parse, split_names
from reward.sandbox_values import Channel, Closed, Codec


class Distrust(TypeError):
    """A test asks an object of the program what only a comparison by the judge could tell."""


class Handle:
    """An object in the program's process."""

    def __init__(self, judge: Judge, number: int, opaque: bool = False) -> None:
        object.__setattr__(self, "_handle", (judge, number, opaque))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _clear(self)[0].call(self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__name__", "__doc__"):
            raise AttributeError(name)
        return _clear(self)[0].operate("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _clear(self)[0].operate("setattr", self, name, value)

    def __eq__(self, other: Any) -> Any:
        return _both(self, other, "eq") if isinstance(other, Handle) else NotImplemented

    def __ne__(self, other: Any) -> Any:
        return _both(self, other, "ne") if isinstance(other, Handle) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._handle[1])

    def __contains__(self, item: Any) -> bool:
        return any(item is one or item == one for one in self)

    def __bool__(self) -> bool:
        return bool(_clear(self)[0].operate("bool", self))

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, Handle) and _both(instance, self, "isinstance")

    def __subclasscheck__(self, kind: Any) -> bool:
        return isinstance(kind, Handle) and _both(kind, self, "issubclass")

    def __enter__(self) -> Any:
        return _clear(self)[0].operate("enter", self)

    def __exit__(self, *_: object) -> None:
        _clear(self)[0].operate("exit", self)

    def __str__(self) -> str:
        return _typed(_clear(self)[0].operate("str", self), str)

    def __repr__(self) -> str:
        return _typed(_clear(self)[0].operate("repr", self), str)

    def __format__(self, how: str) -> str:
        return _typed(_clear(self)[0].operate("format", self, how), str)

    def __len__(self) -> int:
        return _typed(_clear(self)[0].operate("len", self), int)


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"the program gave {type(value).__name__} where {kind.__name__} is due")
    return value


def _clear(handle: Handle) -> tuple[Judge, int, bool]:
    """What a handle holds, if it may be asked."""
    held = handle._handle
    if held[2]:
        raise Distrust("an object of the program was mixed with a value of the test, so what it says proves nothing")
    return held


def _both(a: Handle, b: Handle, name: str) -> bool:
    return bool(_typed(a._handle[0].operate(name, a, b), bool))


def _add_operators() -> None:
    def one(name: str, kind: type | None):
        def method(self: Handle) -> Any:
            value = _clear(self)[0].operate(name, self)
            return value if kind is None else _typed(value, kind)

        return method

    def two(name: str, swapped: bool):
        def method(self: Handle, other: Any) -> Any:
            judge, _, opaque = self._handle
            mixed = opaque or not isinstance(other, Handle) or other._handle[2]
            value = judge.operate(name, *((other, self) if swapped else (self, other)))
            if not mixed:
                return value
            if not isinstance(value, Handle):
                raise Distrust(f"an object of the program, {name} with a value of the test: the program's answer proves nothing")
            return Handle(judge, value._handle[1], opaque=True)

        return method

    def ordering(name: str):
        return lambda self, other: _both(self, other, name) if isinstance(other, Handle) else NotImplemented

    def asked(name: str):
        return lambda self, *args: _clear(self)[0].operate(name, self, *args)

    for name in "add sub mul truediv floordiv mod pow matmul and_ or_ xor lshift rshift".split():
        setattr(Handle, f"__{name.strip('_')}__", two(name, swapped=False))
        setattr(Handle, f"__r{name.strip('_')}__", two(name, swapped=True))
    for name in "lt le gt ge".split():
        setattr(Handle, f"__{name}__", ordering(name))
    for name, kind in {"neg": None, "pos": None, "invert": None, "abs": None, "int": int, "float": float, "index": int}.items():
        setattr(Handle, f"__{name}__", one(name, kind))
    for name in "iter next reversed round getitem setitem delitem".split():
        setattr(Handle, f"__{name}__", asked(name))


_add_operators()


class Judge:
    """One connection to a program."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.functions: dict[int, Any] = {}
        self.exceptions: dict[int, type] = {}
        self.codec = Codec(self._reference, self._resolve)

    def _reference(self, value: Any) -> dict:
        if isinstance(value, Handle):
            return {"o": value._handle[1]}
        if not callable(value):
            raise TypeError(f"{type(value).__name__} of a test cannot be handed to the program")
        self.functions[id(value)] = value
        return {"r": id(value)}

    def _resolve(self, kind: str, number: Any) -> Any:
        if kind != "r" or type(number) is not int:
            raise Closed("not a reference")
        return Handle(self, number)

    def _ask(self, request: list) -> list:
        self.channel.send(request)
        while True:
            message = self.channel.receive()
            if type(message) is not list or not message:
                raise Closed("not a message")
            if message[0] == "callback":
                self._answer(*message[1:])
            elif message[0] == "ok":
                return message[1:]
            elif message[0] == "error":
                raise self._exception(*message[1:])
            else:
                raise Closed("not a message")

    def _answer(self, number: int, args: Any, kwargs: dict) -> None:
        """The program calls a function that a test gave to it."""
        try:
            function = self.functions[number]
            kwargs = {name: self.codec.decode(value) for name, value in kwargs.items()}
            reply = ["ok", self.codec.encode(function(*self.codec.decode(args), **kwargs))]
        except Closed:
            raise
        except Exception as error:
            reply = ["error", type(error).__name__, str(error)]
        self.channel.send(reply)

    def _exception(self, kinds: list, text: str, reference: Any = None) -> BaseException:
        """An exception of the program as one of here: its own class where a test knows it, else the nearest builtin one."""
        known = self.exceptions.get(reference["r"]) if type(reference) is dict else None
        if known is not None:
            return known(text)
        return _nearest_builtin(kinds)(str(text))

    def call(self, function: Handle, args: tuple, kwargs: dict) -> Any:
        encoded = [self.codec.encode(value) for value in args]
        result, changed = self._ask(
            ["call", self.codec.encode(function), encoded, {name: self.codec.encode(value) for name, value in kwargs.items()}]
        )
        given = [*args, *kwargs.values()]
        for n, value in changed.items():
            _replace(given[int(n)], self.codec.decode(value))
        return self.codec.decode(result)

    def operate(self, name: str, *args: Any) -> Any:
        (result,) = self._ask(["op", name, [self.codec.encode(value) for value in args]])
        return self.codec.decode(result)

    def names(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of `names` that the program has, with what they are."""
        found, exceptions = self._ask(["names", sorted(names)])
        result = {name: self.codec.decode(value) for name, value in found.items() if name in names}
        for name in exceptions:
            if isinstance(value := result.get(name), Handle):
                number = value._handle[1]
                if number not in self.exceptions:
                    base = _nearest_builtin([kind for kind in self._mro_names(value)])
                    self.exceptions[number] = type(name, (base,), {})
                result[name] = self.exceptions[number]
        return result

    def _mro_names(self, kind: Handle) -> list[str]:
        try:
            return [base.__name__ for base in self.operate("getattr", kind, "__mro__")]
        except (TypeError, AttributeError):
            return []


def _nearest_builtin(kinds: list) -> type[BaseException]:
    for kind in kinds:
        found = getattr(builtins, kind, None) if type(kind) is str else None
        if isinstance(found, type) and issubclass(found, BaseException):
            try:
                found("")
            except TypeError:
                continue  # UnicodeDecodeError and its like want more arguments
            return found
    return RuntimeError


def _replace(target: Any, value: Any) -> None:
    """A mutable argument becomes what the program made of it, in place."""
    if type(target) is not type(value):
        return
    if isinstance(target, (list, bytearray)):
        target[:] = value
    elif isinstance(target, (dict, set)):
        target.clear()
        target.update(value)


# ---- the run -----------------------------------------------------------------------------------------------------------


def judge(job: dict) -> None:
    """Run tests `first`, ... of job["tests"] and report each on descriptor 1, a JSON line each. Ends the process.

    Reports: {"loaded": true} or {"failed": why} once, then {"test": n, "passed": bool, "note": str or null}, with
    "ended" where the program has. `prepare`: numbers
    of earlier tests that are run again first, unreported, because they set up what later ones use.
    """
    out = os.dup(1)
    os.dup2(2, 1)

    def report(**message: Any) -> None:
        os.write(out, json.dumps(message).encode() + b"\n")

    channel = Channel(3)
    try:
        reply = channel.receive()
        if type(reply) is not list or reply[:1] != ["ok"]:
            report(failed=": ".join(str(part)[:300] for part in (reply[1][0], reply[2]) if part))
            os._exit(0)
    except (Closed, IndexError, TypeError):
        report(failed="the program ended before its first test")
        os._exit(0)
    report(loaded=True)

    connection = Judge(channel)
    trees = [parse(test) for test in job["tests"]]
    natives, asked = split_names(job["code"], job["prefix"], [tree for tree in trees if tree is not None])
    space: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
    for statement in natives.values():
        module = ast.fix_missing_locations(ast.Module([statement], []))
        try:
            exec(compile(module, "imports", "exec"), space)
        except Exception:
            pass  # the test that needs it will say so
    from_program: dict[str, Any] = {}
    for n in [*job["prepare"], *range(job["first"], len(job["tests"]))]:
        note = None
        try:
            # A test's own assignments stay; what came from the program is asked for again, it may have changed.
            wanted = {name for name in asked if name not in space or space[name] is from_program.get(name, space)}
            fresh = connection.names(wanted)
            space.update(fresh)
            from_program = fresh
            exec(compile(job["tests"][n], f"test {n}", "exec", dont_inherit=True), space)
        except Closed as error:
            report(test=max(n, job["first"]), passed=False, note=f"the program ended ({error})"[:300], ended=True)
            os._exit(0)
        except BaseException as error:
            note = f"{type(error).__name__}: {error}"[:300].rstrip(": ")
        if n >= job["first"]:
            report(test=n, passed=note is None, note=note)
    os._exit(0)

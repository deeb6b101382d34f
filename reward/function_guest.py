"""The program's side of function tests: run the program, then answer what the judge asks of it.

All of this runs inside the program's own process, which may change it at will: it can only give other values, and the judge
(reward/function_judge.py) compares values, which it was never told.
"""

from __future__ import annotations

import builtins
import operator
import os
import sys
import types
from typing import Any

from reward.sandbox_values import Channel, Closed, Codec

MUTABLE = (list, dict, set, bytearray)

OPERATIONS: dict[str, Any] = {
    **{name: getattr(operator, name) for name in "eq ne lt le gt ge add sub mul truediv floordiv mod pow matmul".split()},
    **{name: getattr(operator, name) for name in "and_ or_ xor lshift rshift neg pos invert getitem setitem delitem index".split()},
    **{name: getattr(builtins, name) for name in "len iter next reversed str repr format bool int float abs round".split()},
    **{name: getattr(builtins, name) for name in "isinstance issubclass getattr setattr".split()},
    "enter": lambda manager: type(manager).__enter__(manager),
    "exit": lambda manager: type(manager).__exit__(manager, None, None, None),
}


class Guest:
    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.objects: dict[int, Any] = {}
        self.numbers: dict[int, int] = {}
        self.codec = Codec(self._reference, self._resolve)

    def _reference(self, value: Any) -> dict:
        number = self.numbers.get(id(value))
        if number is None:
            number = self.numbers[id(value)] = len(self.objects)
            self.objects[number] = value  # kept alive: an id stays an object's own
        return {"r": number}

    def _resolve(self, kind: str, number: int) -> Any:
        return self.objects[number] if kind == "o" else self._callback(number)

    def _callback(self, number: int) -> Any:
        """A function of a test, given to the program as an argument."""

        def callback(*args: Any, **kwargs: Any) -> Any:
            body = [number, self.codec.encode(list(args)), {name: self.codec.encode(value) for name, value in kwargs.items()}]
            return self.codec.decode(self.ask(["callback", *body]))

        return callback

    def ask(self, request: list) -> Any:
        self.channel.send(request)
        while True:
            message = self.channel.receive()
            if message[0] == "ok":
                return message[1]
            if message[0] == "error":
                raise getattr(builtins, message[1], RuntimeError)(message[2])
            self.answer(message)

    def answer(self, message: list) -> None:
        try:
            reply = ["ok", *getattr(self, f"do_{message[0]}")(*message[1:])]
        except Closed:
            raise
        except BaseException as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            reply = ["error", kinds, _text(error), self._safe_reference(type(error))]
        try:
            self.channel.send(reply)
        except (ValueError, TypeError) as error:
            self.channel.send(["error", [type(error).__name__], str(error), None])

    def _safe_reference(self, kind: type) -> Any:
        return None if kind.__module__ == "builtins" else self._reference(kind)

    def do_names(self, names: list[str]) -> list:
        found = {name: self.codec.encode(self.space[name]) for name in names if name in self.space}
        return [found, [name for name in found if _is_exception(self.space[name])]]

    def do_call(self, function: Any, args: list, kwargs: dict) -> list:
        function = self.codec.decode(function)
        args, kwargs = [self.codec.decode(a) for a in args], {name: self.codec.decode(a) for name, a in kwargs.items()}
        given = [*args, *kwargs.values()]
        before = [self.codec.encode(value) if type(value) in MUTABLE else None for value in given]
        result = function(*args, **kwargs)
        changed = {}
        for n, (value, old) in enumerate(zip(given, before)):
            if old is not None and (new := self.codec.encode(value)) != old:
                changed[str(n)] = new
        return [self.codec.encode(result), changed]

    def do_op(self, name: str, args: list) -> list:
        return [self.codec.encode(OPERATIONS[name](*map(self.codec.decode, args)))]


def _text(error: BaseException) -> str:
    try:
        return str(error)[:2000]
    except BaseException:
        return ""


def _is_exception(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


def serve(job: dict) -> None:
    """Run the program as an imported module, then serve the judge on descriptor 3 until it closes. Ends the process."""
    guest = Guest(Channel(3))
    module = types.ModuleType("solution")
    module.__dict__["__builtins__"] = builtins
    sys.modules["solution"] = module
    guest.space = module.__dict__
    try:
        try:
            exec(compile(job["code"], "program.py", "exec"), guest.space)
        except BaseException as error:
            guest.channel.send(["error", [type(error).__name__], _text(error), None])
            os._exit(1)
        guest.channel.send(["ok"])
        while True:
            guest.answer(guest.channel.receive())
    except Closed:
        os._exit(0)

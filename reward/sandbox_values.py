"""Values between a program under test and the judge of its tests: plain data by value, anything else by reference.

JSON and nothing cleverer, because one side is hostile: what is decoded is built here, of exact builtin types, whatever the
other side wrote. An object that is not plain data becomes a reference, a number in the table of the side that owns it.

    null, true, 1, 1.5, "text"      themselves (integers beyond 64 bits: {"i": hex})
    {"l": [...]} {"t": ...} {"s": ...} {"f": ...} {"d": [[key, value], ...]} {"b": hex} ...      see ENCODERS, DECODERS
    {"r": number}                   a reference to an object of the side that writes it
    {"o": number}                   an object of the side that reads it
"""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import json
import os
import re
import struct
import sys
from typing import Any, Callable

MAX_MESSAGE_BYTES = 64 << 20
MAX_DEPTH = 100
BIG = 1 << 63
SCALARS = {type(None), bool, str}
TYPES = (int, float, bool, str, bytes, list, tuple, set, frozenset, dict, complex, object, type(None))
TYPES_BY_NAME = {t.__name__: t for t in TYPES}
DATETIMES = {t.__name__: t for t in (datetime.datetime, datetime.date, datetime.time)}


class Closed(Exception):
    """The other side is gone, or wrote what cannot be a message."""


class Channel:
    """Messages over a stream socket: a length of 4 bytes, then JSON."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def send(self, message: Any) -> None:
        data = json.dumps(message, separators=(",", ":")).encode()
        if len(data) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a value of {len(data)} bytes is too large to be handed over")
        view = memoryview(struct.pack("<I", len(data)) + data)
        while view:
            try:
                view = view[os.write(self.fd, view) :]
            except OSError as error:
                raise Closed(str(error)) from None

    def _read(self, size: int) -> bytes:
        parts = []
        while size:
            try:
                part = os.read(self.fd, min(size, 1 << 20))
            except OSError as error:
                raise Closed(str(error)) from None
            if not part:
                raise Closed("end of the connection")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def receive(self) -> Any:
        (size,) = struct.unpack("<I", self._read(4))
        if size > MAX_MESSAGE_BYTES:
            raise Closed("message too long")
        try:
            return json.loads(self._read(size))
        except (ValueError, RecursionError) as error:
            raise Closed(f"not a message: {error}") from None


class Codec:
    """`reference(obj)` -> what to write for an object that is not data; `resolve(kind, number)` -> the object for a reference."""

    def __init__(self, reference: Callable[[Any], dict], resolve: Callable[[str, int], Any]) -> None:
        self.reference = reference
        self.resolve = resolve

    def encode(self, value: Any, depth: int = 0) -> Any:
        kind = type(value)
        if kind in SCALARS or kind is float:
            return value
        if kind is int:
            return value if -BIG < value < BIG else {"i": hex(value)}
        if depth > MAX_DEPTH:
            raise ValueError("a value is nested too deeply, or holds itself")
        encode = ENCODERS.get(kind)
        if encode is None:
            encode = _encoder_of_kin(value)
        return self.reference(value) if encode is None else encode(self, value, depth + 1)

    def items(self, values: Any, depth: int) -> list:
        values = list(values)
        kinds = set(map(type, values))
        if kinds <= SCALARS or (kinds == {int} and -BIG < min(values) and max(values) < BIG) or kinds == {float}:
            return values
        return [self.encode(value, depth) for value in values]

    def decode(self, value: Any) -> Any:
        kind = type(value)
        if kind is not dict:
            if kind is list:
                raise Closed("a bare list")
            return value
        if len(value) != 1:
            raise Closed("not a value")
        ((name, body),) = value.items()
        if name in ("r", "o"):
            return self.resolve(name, body)
        try:
            return DECODERS[name](self, body)
        except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError) as error:
            raise Closed(f"not a value: {error}") from None

    def decode_items(self, body: list) -> list:
        if type(body) is not list:
            raise Closed("not a list")
        if dict not in set(map(type, body)) and list not in set(map(type, body)):
            return body
        return [self.decode(value) for value in body]


ENCODERS: dict[type, Callable[[Codec, Any, int], Any]] = {
    list: lambda c, v, d: {"l": c.items(v, d)},
    tuple: lambda c, v, d: {"t": c.items(v, d)},
    set: lambda c, v, d: {"s": c.items(v, d)},
    frozenset: lambda c, v, d: {"f": c.items(v, d)},
    dict: lambda c, v, d: {"d": [c.items(pair, d) for pair in v.items()]},
    bytes: lambda c, v, d: {"b": v.hex()},
    bytearray: lambda c, v, d: {"B": v.hex()},
    complex: lambda c, v, d: {"c": [v.real, v.imag]},
    range: lambda c, v, d: {"R": [hex(v.start), hex(v.stop), hex(v.step)]},
    type(...): lambda c, v, d: {"e": 0},
    collections.OrderedDict: lambda c, v, d: {"od": [c.items(pair, d) for pair in v.items()]},
    collections.Counter: lambda c, v, d: {"ct": [c.items(pair, d) for pair in v.items()]},
    collections.defaultdict: lambda c, v, d: {"d": [c.items(pair, d) for pair in v.items()]},
    collections.deque: lambda c, v, d: {"dq": c.items(v, d)},
    type({}.keys()): lambda c, v, d: {"ks": c.items(v, d)},
    type({}.items()): lambda c, v, d: {"is": [c.items(pair, d) for pair in v]},
    decimal.Decimal: lambda c, v, d: {"de": str(v)},
    fractions.Fraction: lambda c, v, d: {"fr": [hex(v.numerator), hex(v.denominator)]},
    datetime.timedelta: lambda c, v, d: {"td": [v.days, v.seconds, v.microseconds]},
    type: lambda c, v, d: {"T": v.__name__} if TYPES_BY_NAME.get(v.__name__) is v else c.reference(v),
    **{t: lambda c, v, d: {"dt": [type(v).__name__, v.isoformat()]} for t in DATETIMES.values()},
}

DECODERS: dict[str, Callable[[Codec, Any], Any]] = {
    "i": lambda c, b: int(b, 16),
    "l": lambda c, b: c.decode_items(b),
    "t": lambda c, b: tuple(c.decode_items(b)),
    "s": lambda c, b: set(c.decode_items(b)),
    "f": lambda c, b: frozenset(c.decode_items(b)),
    "d": lambda c, b: dict(map(c.decode_items, b)),
    "b": lambda c, b: bytes.fromhex(b),
    "B": lambda c, b: bytearray.fromhex(b),
    "c": lambda c, b: complex(*b),
    "R": lambda c, b: range(*(int(n, 16) for n in b)),
    "e": lambda c, b: ...,
    "od": lambda c, b: collections.OrderedDict(map(c.decode_items, b)),
    "ct": lambda c, b: collections.Counter(dict(map(c.decode_items, b))),
    "dq": lambda c, b: collections.deque(c.decode_items(b)),
    "ks": lambda c, b: dict.fromkeys(c.decode_items(b)).keys(),
    "is": lambda c, b: dict(map(c.decode_items, b)).items(),
    "de": lambda c, b: decimal.Decimal(b),
    "fr": lambda c, b: fractions.Fraction(*(int(n, 16) for n in b)),
    "td": lambda c, b: datetime.timedelta(*b),
    "dt": lambda c, b: DATETIMES[b[0]].fromisoformat(b[1]),
    "T": lambda c, b: TYPES_BY_NAME[b],
    "np": lambda c, b: _decode_array(c, *b),
}

BASES = [bool, int, float, complex, str, bytes, tuple, list, set, frozenset, dict, collections.deque]


def _encoder_of_kin(value: Any) -> Callable[[Codec, Any, int], Any] | None:
    """For what is nearly data: arrays and scalars of numpy, and instances of subclasses (named tuples, an int with methods)."""
    kind = type(value)
    if (getattr(kind, "__module__", None) or "").partition(".")[0] == "numpy" and "numpy" in sys.modules:
        import numpy

        if isinstance(value, numpy.generic):
            return lambda c, v, d: c.encode(v.item(), d) if not isinstance(v.item(), numpy.generic) else c.reference(v)
        if kind is numpy.ndarray:
            return _encode_array
        return None
    if isinstance(value, type):
        return None
    for base in BASES:
        if issubclass(kind, base):
            return lambda c, v, d: c.encode(_as_base(base, v), d)
    return None


def _as_base(base: type, value: Any) -> Any:
    if base in (int, float, complex, str, bytes):  # the value itself, not what its __int__ or __str__ makes of it
        plain = {int: int.__pos__, float: float.__pos__, complex: complex.__pos__, str: str.__str__}
        return plain[base](value) if base is not bytes else bytes.join(b"", [value])
    return dict(dict.items(value)) if base is dict else base(base.__iter__(value))


def _encode_array(codec: Codec, value: Any, depth: int) -> Any:
    if value.dtype.kind in "biuf":
        return {"np": [value.dtype.str, list(value.shape), value.tobytes().hex()]}
    return {"np": [None, list(value.shape), codec.encode(value.tolist(), depth)]}


def _decode_array(codec: Codec, dtype: str | None, shape: list[int], body: Any) -> Any:
    import numpy

    if dtype is None:
        return numpy.array(codec.decode(body)).reshape(shape)
    if not re.fullmatch(r"[<>|=][biuf]\d{1,2}", dtype):
        raise ValueError(dtype)
    return numpy.frombuffer(bytes.fromhex(body), dtype=dtype).reshape(shape).copy()

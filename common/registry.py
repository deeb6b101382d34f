"""Named choices that a user can add to: families, traces, objectives, rewards, engines."""

from __future__ import annotations

import difflib
import importlib
from typing import Callable, Generic, Iterator, TypeVar

from common.errors import UserError

T = TypeVar("T")

NO_IMAGES = "images are not supported yet"
"""Why names and settings of models that see images are not here."""


def closest(name: str, choices: list[str], number: int) -> list[str]:
    """The choices most like `name`, at most `number`, best first: the same but for upper and lower case, then those that begin with
    it or hold it, the shortest first, then similar ones."""
    lower, name = {choice: choice.lower() for choice in choices}, str(name).lower()
    same = [choice for choice in choices if lower[choice] == name]
    holding = [choice for choice in choices if len(name) > 2 and name in lower[choice]]
    holding.sort(key=lambda choice: (not lower[choice].startswith(name), len(choice)))
    similar = difflib.get_close_matches(name, list(lower.values()), n=number, cutoff=0.5)
    ordered = [*same, *holding, *(choice for one in similar for choice in choices if lower[choice] == one)]
    return list(dict.fromkeys(ordered))[:number]


def did_you_mean(name: str, choices: list[str]) -> str:
    """` (did you mean X?)` for the closest choice, or nothing."""
    close = closest(name, choices, 1)
    return f" (did you mean {close[0]}?)" if close else ""


class Registry(Generic[T]):
    """A dict of named entries whose error lists the choices.

    An entry may be registered as the text "package.module:attribute": it is imported when it is first asked for, so that a
    registry can be read, and a config checked against it, before torch is imported.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind  # what one entry is, for the error: "model family", "reward", ...
        self._entries: dict[str, T | str] = {}
        self._lacking: dict[str, str] = {}

    def register(self, name: str, entry: T | str | None = None) -> Callable[[T], T] | None:
        """`register(name, entry)`, or as a decorator `@REGISTRY.register(name)`. A name is taken once."""
        if entry is None:

            def decorate(target: T) -> T:
                self.register(name, target)
                return target

            return decorate
        if name in self._entries and self._entries[name] is not entry:
            raise UserError(f"{self.kind} {name!r} is registered already: choose another name")
        self._entries[name] = entry
        return None

    def lacks(self, name: str, why: str) -> None:
        """A name known from elsewhere that is not supported: `get` says why, and guesses no other. A user may still register it."""
        self._lacking[name] = why

    def get(self, name: str, setting: str | None = None) -> T:
        """The entry called `name`; `setting` is the config key to blame. Raises UserError listing the choices."""
        if name not in self._entries:
            where = f"{setting}: " if setting else ""
            choices = f"choices: {', '.join(self.names())}"
            if name in self._lacking:
                raise UserError(f"{where}{self.kind} {name!r} is not supported: {self._lacking[name]}; {choices}")
            raise UserError(f"{where}unknown {self.kind} {name!r}{did_you_mean(name, self.names())}; {choices}")
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = self._entries[name] = getattr(importlib.import_module(module), attribute)
        return entry

    def names(self) -> list[str]:
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

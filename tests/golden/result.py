"""The outcome of one golden set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class SetResult:
    path: str
    """The set's path under the golden directory."""
    status: Literal["PASS", "FAIL", "UNSUPPORTED"]
    cases: int
    max_error: float
    tolerance: float
    notes: list[str] = field(default_factory=list)
    """What a reader should know: why unsupported, which cases differ and why."""

    def line(self) -> str:
        return f"{self.status} {self.path} cases={self.cases} max_error={self.max_error:.3g} tolerance={self.tolerance:.3g}"

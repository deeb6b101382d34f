"""What a golden check reports: one line per set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class SetResult:
    path: str
    """The set, as its path under the checked directory."""
    status: Literal["PASS", "FAIL", "UNSUPPORTED"]
    cases: int = 0
    max_error: float = 0.0
    """Largest error of any case, in the unit of the tolerance."""
    tolerance: float = 0.0
    notes: list[str] = field(default_factory=list)
    """What a reader should know: differing cases and why, what is not supported."""

    def line(self) -> str:
        """`PASS sdar/forward cases=3 max_error=1.2e-06 tolerance=0.0001`; notes are not part of it."""
        return f"{self.status} {self.path} cases={self.cases} max_error={self.max_error:.3g} tolerance={self.tolerance:.3g}"

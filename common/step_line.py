"""The line per step that a person reads on the terminal."""

from __future__ import annotations

import re
import time
from typing import Any, Callable


class Clock:
    """Wall seconds per step, for the time that is left."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.first_step: int | None = None

    def eta_seconds(self, step: int, total: int | None) -> float | None:
        if self.first_step is None:
            self.first_step = step
        if total is None:
            return None
        done = step - self.first_step + 1
        return (time.monotonic() - self.started) / max(done, 1) * max(total - step, 0)


PHASES = ("rollout", "reward", "update", "validation", "evaluation", "save", "offload")  # time/PHASE_seconds, in a step's order


def line_fields(step: int, total: int | None, metrics: dict[str, Any], eta_seconds: float | None = None) -> list[tuple[int, str]]:
    """The fields of a step's line in reading order, each with its rank: where space is short the highest ranks go first."""

    def get(*keys: str) -> float | None:
        for key in keys:
            value = metrics.get(key)
            if value is not None:
                value = float(value.item() if hasattr(value, "item") else value)
                return value
        return None

    fields: list[tuple[int, str]] = []

    def add(rank: int, form: Callable[[float], str], *keys: str) -> None:
        value = get(*keys)
        if value is not None:
            fields.append((rank, form(value)))

    width = len(str(total)) if total else 1
    fields.append((0, f"step {step:>{width}}/{total}" if total else f"step {step}"))
    add(1, lambda v: f"solved {v:.1%}", "rollout/solve_rate")
    add(4 if get("rollout/solve_rate") is not None else 1, lambda v: f"reward {v:+.3f}", "rollout/reward")
    add(3, lambda v: f"length {v:.0f}", "rollout/response_length")
    add(12, lambda v: f"cut {v:.0%}", "rollout/cut_off_share")
    add(2, lambda v: f"{v:.2f} tok/fwd", "rollout/tokens_per_forward")
    add(13, lambda v: f"entropy {v:.3f}", "rollout/entropy")
    add(14, lambda v: f"dropped {v:.0f}", "rollout/dropped_groups")
    add(5, lambda v: f"loss {v:+.4f}", "train/loss")
    add(8, lambda v: f"kl {_short(v)}", "train/kl")
    add(9, lambda v: f"clip {v:.1%}", "train/clip_fraction")
    add(7, lambda v: f"grad {_short(v)}", "train/gradient_norm")
    add(11, lambda v: f"lr {_short(v)}", "train/learning_rate")
    add(10, lambda v: f"gap {_short(v)}", "gap/logprob_mean")
    add(1, lambda v: f"validation {v:.4f}", "eval/validation_loss")
    for key in sorted(metrics):
        if re.fullmatch(r"eval/.+/accuracy", key):
            add(1, lambda v, key=key: f"{key[5:-9]} {v:.1%}", key)
    phases = [f"{phase} {_short(seconds)}" for phase in PHASES if (seconds := get(f"time/{phase}_seconds")) is not None]
    if phases:
        fields.append((15, " + ".join(phases) + " s"))
    add(6, lambda v: f"{_thousands(v)} tok/s", "rate/rollout_tokens_per_second", "rate/update_tokens_per_second")
    add(16, lambda v: f"{v:.1f} GiB", "memory/peak_gib")
    if eta_seconds is not None:
        fields.append((3, f"eta {duration(eta_seconds)}"))
    return fields


def fit_line(fields: list[tuple[int, str]], columns: int | None) -> str:
    """Join the fields; with `columns`, leave out fields of the highest rank until the line fits (the first always stays)."""
    fields = list(fields)
    while True:
        line = "  ".join(text for _, text in fields)
        if columns is None or len(line) < columns or len(fields) == 1:
            return line
        fields.remove(max(fields[1:], key=lambda field: field[0]))


def duration(seconds: float) -> str:
    """42s, 3m05s, 1h02m, 2d04h."""
    seconds = int(round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"


def _short(value: float) -> str:
    return f"{value:.3g}"


def _thousands(value: float) -> str:
    return f"{value:,.0f}" if value < 1e4 else f"{value / 1e3:,.1f}k" if value < 1e6 else f"{value / 1e6:,.1f}M"

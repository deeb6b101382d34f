"""Self-contained HTML pages: a template, the shared style, and data embedded so that no text can break out of it."""

from __future__ import annotations

import html
import json
import math
import os
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.run_dir import write_text

HERE = Path(__file__).parent


def finite(value: Any, digits: int = 5) -> float | int | None:
    """A number for a page: rounded to `digits` significant ones; None where it is not finite."""
    if isinstance(value, int) or value is None:
        return value
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def embed_json(data: Any) -> str:
    """JSON for a <script> element: `<`, `>` and `&` are escaped, so `</script>` and `<!--` in a text stay text."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return text.encode("utf-16", "surrogatepass").decode(
        "utf-16", "replace"
    )  # half of a surrogate pair: no text, a browser may die of it


def render_page(template: Path, title: str, data: Any) -> str:
    """Fill `{{title}}`, `{{style}}` (common/page.css) and `{{data}}` of the template, each once."""
    parts = {
        "{{title}}": html.escape(title),
        "{{style}}": (HERE / "page.css").read_text(encoding="utf-8"),
        "{{data}}": embed_json(data),
    }
    text = template.read_text(encoding="utf-8")
    filled = []
    for mark, value in parts.items():  # split, not replace: a value may hold the mark of another
        before, found, text = text.partition(mark)
        assert found, f"{template}: no {mark}, or out of order"
        filled += [before, value]
    return "".join(filled) + text


def write_page(path: str | os.PathLike, text: str) -> None:
    """Write beside and rename: who has the page open never reloads half of it."""
    try:
        write_text(Path(path), text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}): choose another place or free the disk") from error

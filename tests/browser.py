"""A headless browser for tests of pages; they are skipped where none is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--allow-file-access-from-files",
)  # fmt: skip


def find_browser() -> str | None:
    """$BROWSER_BINARY, or the first Chromium-like browser on the path."""
    return os.environ.get("BROWSER_BINARY") or next((path for name in NAMES if (path := shutil.which(name))), None)


needs_browser = pytest.mark.skipif(find_browser() is None, reason=f"no headless browser is installed: none of {', '.join(NAMES)}")


def dump_dom(page: Path, fragment: str = "", milliseconds: int = 2000) -> Page:
    """Load the page, let its scripts run for that long of virtual time, and parse what the DOM has become."""
    browser = find_browser()
    assert browser is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        result = subprocess.run(
            [
                browser, *FLAGS, f"--user-data-dir={profile}", f"--virtual-time-budget={milliseconds}", "--window-size=1280,900",
                "--enable-logging=stderr", "--dump-dom", page.resolve().as_uri() + (f"#{fragment}" if fragment else ""),
            ],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert result.returncode == 0, result.stderr
    complaints = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    assert not complaints, complaints
    parsed = Page()
    parsed.feed(result.stdout)
    return parsed


class Page(HTMLParser):
    """The elements of a page in document order: tag, attributes, and the text inside (scripts and styles left out)."""

    VOID = {"meta", "input", "br", "link", "img", "hr", "path", "line", "circle"}

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[Element] = []
        self._open: list[Element] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attributes}, self._open[-1] if self._open else None)
        self.elements.append(element)
        if tag not in self.VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        for depth in range(len(self._open) - 1, -1, -1):
            if self._open[depth].tag == tag:
                del self._open[depth:]
                return

    def handle_data(self, data: str) -> None:
        if not any(element.tag in ("script", "style") for element in self._open):
            for element in self._open:
                element.text += data

    def find(self, cls: str = "", tag: str = "", id: str = "") -> list[Element]:
        return [
            element
            for element in self.elements
            if (not cls or cls in element.classes)
            and (not tag or element.tag == tag)
            and (not id or element.attributes.get("id") == id)
        ]


class Element:
    def __init__(self, tag: str, attributes: dict[str, str], parent: Element | None) -> None:
        self.tag, self.attributes, self.parent, self.text = tag, attributes, parent, ""
        self.classes = attributes.get("class", "").split()

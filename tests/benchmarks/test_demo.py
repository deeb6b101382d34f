"""What a second demo does with the first."""

from __future__ import annotations

from pathlib import Path

import pytest

import common.run_lock
from benchmarks import demo
from common.errors import UserError


def test_earlier_demos_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(common.run_lock, "PATIENCE_SECONDS", 0)
    folder = tmp_path / "runs" / "demo"
    for number in range(3):
        lock = demo.set_aside(folder)
        with pytest.raises(UserError, match=f"^{folder} is in use by process .*, end it, or choose another place .--folder"):
            demo.set_aside(folder)
        (folder / "result").write_text(str(number))
        lock.release()
        said = capsys.readouterr().out
        assert said == ("" if not number else f"the earlier {folder} is kept as {folder}-{number}\n")
    kept = {path.name: (path / "result").read_text() for path in folder.parent.iterdir()}
    assert kept == {"demo-1": "0", "demo-2": "1", "demo": "2"}
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_a_run_begins_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Begun(Exception):
        pass

    def call(script: str, *arguments: str, **options: object) -> float:
        raise Begun

    monkeypatch.setattr(demo, "call", call)
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(Begun):
        demo.one_run(folder, seed=1)
    assert (tmp_path / "demo-1" / "thesis.tex").read_text() == "mine"

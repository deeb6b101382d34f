"""What a run directory that was damaged, moved or written otherwise is taken for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from common.errors import UserError
from common.run_dir import RunDir
from configs.load import load_config, to_yaml

STATE = {"step": 3, "finished": False, "num_optimizer_steps": 6, "num_processes": 1, "extra": {}}


def config_of(project: str | Path, *changes: str):
    return load_config("rl", ["config=configs/rl_tiny.yaml", f"experiment.project={project}", *changes])


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run behind step 3."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "as before")
    directory = RunDir(tmp_path / "run")
    directory.create(config_of(directory.path))
    folder = directory.states / "step_000003"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(STATE))
    return directory


def test_a_start_leaves_evaluations_at_work_alone(directory: RunDir):
    """Results come into the directory of a run that goes on; what a killed writer left goes with the next of its name."""
    directory.results.mkdir()
    own, others = directory.results / ".step-2.json.17.partial", directory.results / ".MATH.txt.17.partial"
    for file in (own, others, directory.path / ".config.yaml.17.partial"):
        file.touch()
    directory.create(config_of(directory.path))
    assert others.exists() and not own.exists() and not list(directory.path.glob(".*.partial"))
    directory.save_config(config_of(directory.path), "MATH500")
    assert others.exists()
    directory.save_config(config_of(directory.path), "MATH")
    assert not others.exists()


@pytest.mark.parametrize("files", [1, 2])
def test_an_evaluation_that_was_killed_while_it_wrote_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int):
    """Behind its first or its second file: the same command is welcome."""
    directory, replace, written = RunDir(tmp_path / "new"), os.replace, []

    def kill_behind(source, target):
        replace(source, target)
        written.append(target)
        if len(written) == files:
            raise KeyboardInterrupt

    config = config_of(directory.path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", kill_behind)
        directory.save_config(config, "MATH")
    directory.check_results(config, "MATH")
    directory.save_config(config, "MATH")
    assert directory.config.is_file() and directory.results_config("MATH").is_file()


@pytest.mark.parametrize("write", ["{}/", "{}/../run", "{relative}", "{link}"])
def test_a_directory_by_any_name(directory: RunDir, write: str):
    link = directory.path.with_name("link")
    link.symlink_to(directory.path)
    project = write.format(directory.path, relative=os.path.relpath(directory.path), link=link)
    assert project != str(directory.path)
    config = config_of(project)
    RunDir(project).check(config)
    assert RunDir(project).latest_step() == 3
    with pytest.raises(UserError, match=r"another config \(training.eps: 0.2 there, 0.3 here and 1 more\)"):  # training.eps_high
        RunDir(project).check(config_of(project, "training.eps=0.3"))


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "No such file or directory"),
        ("", "Expecting value"),
        (json.dumps(STATE)[:20], ""),
        ("[1]", "'step' is not in it"),
        (json.dumps({"step": 3, "finished": True, "extra": {}}), "'num_optimizer_steps' is not in it"),
    ],
)
def test_a_state_that_is_not_whole(directory: RunDir, content: str | None, reason: str):
    assert directory.read_state() == STATE
    file = directory.states / "step_000003" / "run.json"
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=f"^{file}: cannot be read \\({reason}.*remove {file.parent} and the run goes on") as raised:
        directory.read_state()
    assert "\n" not in str(raised.value)
    # An older one is the newest then.
    older = directory.states / "step_000001"
    file.parent.rename(older)
    (older / "run.json").write_text(json.dumps({**STATE, "step": 1}))
    assert directory.latest_step() == 1


@pytest.mark.parametrize("content", [b"a: [", b"- a list", b"", b"\xff\xfe", b"a: 1\na: 2", b"a: ${", b"\x00"])
def test_settings_that_cannot_be_read(directory: RunDir, content: bytes):
    config = config_of(directory.path)
    directory.config.write_bytes(content)
    with pytest.raises(UserError, match=f"^{directory.config}: cannot be read as settings .*--print-config") as raised:
        directory.check(config)
    assert "\n" not in str(raised.value)
    directory.config.write_text(to_yaml(config))
    directory.check(config)

"""A user's own Python files: plugins that register families, methods, rewards and objectives, and functions by path."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from common.errors import UserError

if TYPE_CHECKING:
    from configs.schema import Config

ROOT = Path(__file__).resolve().parents[1]


def find_file(path: str, setting: str) -> Path:
    """The file that a path means, from the working directory, else from the repo's root. Raises UserError blaming `setting`."""
    for file in (Path(path).expanduser(), ROOT / path):
        if file.is_file():
            return file
    raise UserError(f"{setting}: no such file: {path} (looked in {Path.cwd()} and {ROOT})")


def import_file(path: str, setting: str) -> ModuleType:
    """Import a .py file by its path (`find_file`); the second time nothing is run.

    `setting` is the config key to blame. Raises UserError where the file is missing or its import fails.
    """
    file = find_file(path, setting)
    if file.suffix != ".py":
        raise UserError(f"{setting}: {path} is not a .py file")
    file = file.resolve()
    name = f"plugin_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"{setting}: {path}{_line_in(error, file)} failed: {type(error).__name__}: {error}") from error
    return module


def _line_in(error: BaseException, file: Path) -> str:
    """`, line 7`: the last line of `file` in the traceback, where there is one."""
    line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(file):
            line = trace.tb_lineno
        trace = trace.tb_next
    return f", line {line}" if line else ""


def load_plugins(config: Config) -> None:
    """Import the files of `experiment.plugins`, in order. Every process calls it at its start; a second call does nothing."""
    for path in config.experiment.plugins:
        import_file(path, "experiment.plugins")

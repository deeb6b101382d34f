"""Check golden sets: `python -m tests.golden DIR` prints a line per set found under DIR and exits 1 where one fails.

    PASS|FAIL|UNSUPPORTED <set, as its path under DIR> cases=N max_error=X tolerance=Y

DIR has the layout of the golden folder: sdar/<variant>/, objective/<family>/[<variant>/], rewards/, ...; or it is one part of
it, known by its name: .../llada, .../objective, .../objective/dream. Sets that are not supported yet say so, and do not count as
passed. Indented lines below say why, and which cases differ and for what reason.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Callable, Iterator

import models.registry  # noqa: F401
from tests.golden import dream, llada, mmada, objective, rewards, sdar, value
from tests.golden.result import SetResult


def folders_with(root: Path, *names: str) -> Iterator[Path]:
    """Folders below `root` (itself included) that hold all of `names`."""
    for folder in [root, *sorted(p for p in root.rglob("*") if p.is_dir())]:
        if all((folder / name).exists() for name in names):
            yield folder


def unsupported(root: Path, top: Path) -> list[SetResult]:
    """One line per case file of a part that nothing checks yet."""
    files = sorted({p.with_suffix("") for p in top.rglob("*") if p.suffix in (".json", ".safetensors")})
    skip = {"config", "generation_config", "model", "tokenizer", "tokenizer_config", "special_tokens_map"}
    return [
        SetResult(str(f.relative_to(root)), "UNSUPPORTED", 0, 0.0, 0.0, ["not supported yet"]) for f in files if f.name not in skip
    ]


def check_objective(root: Path, top: Path) -> list[SetResult]:
    """top: the folder of all families, or of one."""
    results = []
    for family in [top] if top.parent != root else sorted(p for p in top.iterdir() if p.is_dir()):
        if family.name not in objective.FAMILIES_SUPPORTED:
            results += unsupported(root, family)
            continue
        for folder in folders_with(family, "policy", "old_policy"):
            results += objective.check(folder, str(folder.relative_to(root)), family.name)
    return results


def check_value(root: Path, top: Path) -> list[SetResult]:
    return [r for folder in folders_with(top, "value", "old_value") for r in value.check(folder, str(folder.relative_to(root)))]


def check_named(check: Callable[[Path], list[SetResult]]) -> Callable[[Path, Path], list[SetResult]]:
    return lambda root, top: check(top)


CHECKS: dict[str, Callable[[Path, Path], list[SetResult]]] = {
    "sdar": check_named(sdar.check),
    "llada": check_named(llada.check),
    "dream": check_named(dream.check),
    "mmada": check_named(mmada.check),
    "objective": check_objective,
    "rewards": check_named(rewards.check),
    "value": check_value,
}
"""Part of the golden folder -> what checks it; any other part is reported as unsupported."""


def parts_of(folder: Path) -> tuple[Path, list[Path]]:
    """(golden folder, what is to be checked of it): its parts where `folder` is the whole, else `folder` alone."""
    if folder.name not in CHECKS:
        return folder, sorted(p for p in folder.iterdir() if p.is_dir())
    is_family = folder.parent.name == "objective"
    return folder.parent.parent if is_family else folder.parent, [folder]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.golden", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    folder = Path(os.path.abspath(arguments.folder))  # "." has no name
    if not folder.is_dir():
        print(f"error: {arguments.folder}: no such folder", file=sys.stderr)
        return 2
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    failed = found = 0
    root, parts = parts_of(folder)
    for part in parts:
        for result in CHECKS.get(part.relative_to(root).parts[0], unsupported)(root, part):
            print(result.line(), flush=True)
            for note in result.notes:
                print(f"    {note}")
            found += 1
            failed += result.status == "FAIL"
    if not found:
        print(
            f"error: no golden set under {arguments.folder}: name the folder that holds sdar/, objective/, rewards/, ..., or one "
            "of them",
            file=sys.stderr,
        )
        return 2
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

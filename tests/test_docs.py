"""What the documentation says is there: files, commands, settings, links; and its code runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs.load import setting_types
from configs.reference import ALIASES
from tests.distributed.harness import clean_environment

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def fenced(text: str, language: str = "") -> list[str]:
    """The contents of the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def expand(name: str) -> list[str]:
    """As a shell does: sft_{a,b}.yaml is two names."""
    found = re.search(r"\{([^{}]*)\}", name)
    if found is None:
        return [name]
    return [one for part in found[1].split(",") for one in expand(name[: found.start()] + part + name[found.end() :])]


def tree(text: str) -> list[str]:
    """The paths of README's file tree: a line without indent is a path, or a folder that the indented ones below are in."""
    paths, folder = [], ""
    for line in text.splitlines():
        if line.strip():
            name = line.split()[0]
            folder = "" if not line.startswith(" ") else folder
            if not line.startswith(" ") and name.endswith("/"):
                folder = name
            paths += [one if not line.startswith(" ") else folder + one for one in expand(name)]
    return paths


FILES = tree(fenced(README.split("## Files")[1])[0])


def tracked() -> list[str]:
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("not a git checkout: the tracked files are not known")
    return [name for name in found.stdout.splitlines() if (ROOT / name).exists()]


def test_every_file_of_the_tree_exists():
    missing = [path for path in FILES if not (ROOT / path).exists() and not any(map(pattern(path).fullmatch, tracked()))]
    assert not missing, f"README's file tree names what is not there: {missing}"
    assert len(FILES) == len(set(FILES)), "a file stands in README's tree twice"


def pattern(path: str) -> re.Pattern:
    """`1_node_N_gpus_deepspeed_zeroK.yaml`: a row of files in one line, some of them with `_offload`."""
    folder, name = os.path.split(path)
    digits = re.escape(name).replace("N", r"\d+").replace("K", r"\d(_offload)?")
    return re.compile(re.escape(os.path.join(folder, "")) + digits)


def test_every_file_is_in_the_tree():
    """By a line of its own, a line for several, or the line of a folder that names none of its files."""
    folders = tuple(p for p in FILES if p.endswith("/") and not any(q != p and q.startswith(p) for q in FILES))
    patterns = [pattern(path) for path in FILES if path.startswith("accelerate_configs/")]
    missing = [
        name
        for name in tracked()
        if name not in FILES and not name.startswith(folders) and not any(p.fullmatch(name) for p in patterns)
    ]
    assert not missing, f"not in README's file tree: {missing}"


def commands(text: str) -> list[str]:
    """Lines of fenced blocks that start a job."""
    lines = [line.strip().removeprefix("$ ") for block in fenced(text) for line in block.splitlines()]
    return [line for line in lines if re.match(r"(python|make|pytest|accelerate launch) ", line)]


@by_name
def test_commands_name_what_exists(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for command in commands(page.read_text(encoding="utf-8")):
        words = command.split()
        if words[0] == "make":
            assert words[1] in targets, command
        elif words[:2] == ["python", "-m"]:
            module = ROOT / words[2].replace(".", "/")
            assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), command
        for word in words:
            path = re.fullmatch(r"(?:config=)?((?:\w+/)*\w+\.(?:py|yaml))", word)
            if path and words[:2] != ["python", "-m"]:
                assert (ROOT / path[1]).is_file(), f"{path[1]} in `{command}`"


@by_name
def test_settings_exist(page):
    known, sections = {*setting_types(), *ALIASES}, {key.partition(".")[0] for key in setting_types()}
    text = page.read_text(encoding="utf-8")
    mentioned = re.findall(r"`([a-z_]+(?:\.\w+)+)(?:=[^`]*)?`", text)
    mentioned += [key for line in commands(text) for key in re.findall(r"[\s\"]([a-z_]+(?:\.\w+)+)=", line)]
    of_sections = [key for key in mentioned if key.partition(".")[0] in sections and not key.endswith((".py", ".yaml"))]
    unknown = {key for key in of_sections if key not in known and not any(other.startswith(f"{key}.") for other in known)}
    unknown -= {"training.epss"}  # the mistake of an error message that is shown
    assert not unknown, f"{page.name}: settings that the schema does not have: {unknown}"


def anchors(page: Path) -> set[str]:
    """GitHub's names of the headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@by_name
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}: no such heading"


@by_name
def test_files_in_prose_exist(page):
    """`train/rl.py`, `docs/`: a path in backquotes that begins with one of our folders."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".") and path.name != "runs"}
    for path in re.findall(r"`([\w.-]+/(?:[\w.-]+/)*(?:[\w-]+\.\w+)?)`", page.read_text(encoding="utf-8")):
        if path.partition("/")[0] in folders and not re.search(r"NAME|_zeroK", path):
            assert (ROOT / path).exists(), f"{page.name} speaks of {path}"


def test_the_python_api_of_the_readme(capsys):
    """Run as it stands, on random weights instead of those of `make demo`."""
    (code,) = fenced(README, "python")
    assert "runs/demo/rl/ckpt/optimized" in code
    names: dict = {}
    exec(compile(code.replace("runs/demo/rl/ckpt/optimized", "tiny-random"), "README.md", "exec"), names)
    rollouts = names["rollouts"]
    assert [(r.task_id, r.sample) for r in rollouts] == [(task, i) for task in ["s52910=", "s3141="] for i in range(4)]
    assert all(min(r.step_map) >= 1 and r.num_forwards == max(r.step_map) and max(r.logprobs) < 0 for r in rollouts)
    assert len(capsys.readouterr().out.splitlines()) == 8


def test_the_examples_of_extending_run(tmp_path):
    """All plugins of docs/extending.md in one run of two steps, on random weights; then the data type, which needs another one."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    files = [block.removeprefix("# ").split("\n", 1) for block in fenced(page, "python")]
    for name, code in files:
        (tmp_path / name).write_text(code)
    plugins = [name for name, code in files if "register(" in code and "reward" not in code]
    assert sorted(plugins) == ["half_trace.py", "near_best.py", "qwen2_block.py", "reinforce.py"]
    one_run(
        tmp_path,
        f"experiment.plugins=[{','.join(plugins)}]",
        "model.model_base=qwen2_block",
        "training.method=HalfTraceRL",
        "training.objective=reinforce",
        "rollout.remasking_strategy=near_best",
        "reward.function=prefix_reward.py:right_prefix",
        project="plugins",
    )
    log = (tmp_path / "plugins" / "metrics.jsonl").read_text()
    assert '"train/surprise"' in log, "the objective of the plugin was not the one that was minimised"
    one_run(tmp_path, "experiment.plugins=[same_digits.py]", "dataset.data_type=same_digits", project="digits")


def one_run(folder: Path, *settings: str, project: str) -> None:
    command = [sys.executable, str(ROOT / "rl.py"), "config=configs/rl_tiny.yaml", f"experiment.project={project}"]
    command += ["model.pretrained_model=tiny-random", "model.prepare_config=null", "evaluation.if_eval=false"]
    command += ["experiment.total_step=2", *settings]
    result = subprocess.run(command, cwd=folder, env=clean_environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr

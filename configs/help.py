"""`--help`: every setting with its type, default and docstring, read from the source of configs/schema.py."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path
from typing import NamedTuple

WIDTH = 120

USAGE = {
    "rl": ("Reinforcement learning of a diffusion language model.", "python rl.py config=configs/rl_trado.yaml"),
    "eval": ("Evaluation of a diffusion language model.", "python eval.py config=configs/trado_eval.yaml"),
    "sft": (
        "Supervised finetuning of a diffusion language model.",
        "accelerate launch --config_file accelerate_configs/FILE.yaml train/sft_sdar.py config=configs/sft_tiny.yaml",
    ),
}


class Setting(NamedTuple):
    key: str
    type: str
    default: str
    doc: str


def settings() -> list[tuple[str, str, list[Setting]]]:
    """(section, its docstring, its settings) in the schema's order; sections of sections follow their section."""
    tree = ast.parse(Path(__file__).with_name("schema.py").read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    aliases = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    sections: list[tuple[str, str, list[Setting]]] = []

    def fields(name: str) -> dict[str, tuple[ast.AnnAssign, str]]:
        found: dict[str, tuple[ast.AnnAssign, str]] = {}
        for base in classes[name].bases:
            found.update(fields(base.id))
        body = classes[name].body
        for node, below in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign):
                documented = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                found[node.target.id] = (node, " ".join(below.value.value.split()) if documented else "")
        return found

    def walk(name: str, prefix: str) -> None:
        listed: list[Setting] = []
        if prefix:
            sections.append((prefix.rstrip("."), " ".join(ast.get_docstring(classes[name]).split()), listed))
        inherited = {key for base in classes[name].bases for key in fields(base.id)} if name == "Evaluation" else set()
        nested = []
        for field, (node, doc) in fields(name).items():
            annotation = ast.unparse(aliases.get(ast.unparse(node.annotation), node.annotation))
            if annotation in classes:
                nested.append((annotation, f"{prefix}{field}."))
                continue
            default = "as rollout" if field in inherited else _default(node.value)
            if field in inherited and not isinstance(_own(classes[name], field), ast.AnnAssign):
                doc = f"See rollout.{field}."
            listed.append(Setting(prefix + field, _type(annotation), default, doc))
        for annotation, deeper in nested:
            walk(annotation, deeper)

    walk("Config", "")
    return sections


def _own(node: ast.ClassDef, field: str) -> ast.AnnAssign | None:
    return next((one for one in node.body if isinstance(one, ast.AnnAssign) and one.target.id == field), None)


def _type(annotation: str) -> str:
    nullable = " | None" in annotation
    kind = annotation.replace(" | None", "")
    if kind.startswith("Literal["):
        choices = [choice.strip(" '") for choice in kind[len("Literal[") : -1].split(",")]
        kind = " | ".join({"True": "true", "False": "false"}.get(choice, choice) for choice in choices)
    return kind + (" | null" if nullable else "")


def _default(value: ast.expr) -> str:
    if isinstance(value, ast.Call):  # field(default_factory=...)
        factory = value.keywords[0].value
        value = factory.body if isinstance(factory, ast.Lambda) else ast.List([], ast.Load())
    text = ast.unparse(value)
    return {"None": "null", "True": "true", "False": "false"}.get(text, text.replace("'", ""))


def help_text(job: str) -> str:
    """What `--help` prints for a job: usage, then every setting."""
    purpose, launch = USAGE[job]
    lines = [
        purpose,
        "",
        f"  {launch} [section.key=value ...]",
        f"  {launch} --print-config      show the resolved settings and stop",
        "",
        "Settings are read from the file and overridden by section.key=value; lists are written [a,b], nothing is null.",
    ]
    for section, doc, listed in settings():
        lines += ["", *textwrap.wrap(f"{section}: {doc}", WIDTH)]
        for one in listed:
            lines.append(f"  {one.key}: {one.type} = {one.default}")
            lines += textwrap.wrap(one.doc, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)

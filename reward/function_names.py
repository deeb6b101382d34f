"""Whose is a name in a test: the test's own, the judge's, or the program's. Pure functions on syntax trees."""

from __future__ import annotations

import ast
import builtins

TRUSTED_IMPORTS = set(
    "bisect cmath collections copy datetime decimal fractions functools heapq itertools json math numpy operator pandas re "
    "statistics string typing".split()
)
"""What the judge imports because a program did, under the same name: nothing else that a program names runs in the judge."""


def parse(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def parse_head(prefix: str) -> ast.Module | None:
    """Of the head of a function, which may end before there is a body."""
    return parse(prefix) or parse(prefix.rstrip() + "\n        pass\n")


def imports_of(tree: ast.Module | None) -> dict[str, ast.stmt]:
    """Bound name -> import statement, at the top level."""
    found: dict[str, ast.stmt] = {}
    for node in tree.body if tree else []:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                one = ast.Import([alias]) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, [alias], node.level)
                found[(alias.asname or alias.name).partition(".")[0]] = one
    return found


def definitions_of(tree: ast.Module | None) -> set[str]:
    """Functions and classes of the top level."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in tree.body if isinstance(node, kinds)} if tree else set()


def names_in(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def shadowed_builtins(trees: list[ast.Module], own: set[str], names: set[str]) -> set[str]:
    """Builtin names that mean the program's function, where no head of the function says what is tested.

    `own`: names that the program defines. In `assert sum(10, 15) == 6`, `sum` is what is tested; in `assert abs(f(1)) < 1`,
    `abs` is the judge's. So: builtins which the program defines, if it defines nothing else that a test uses, and of nested
    calls the innermost.
    """
    shadowed = {name for name in names & own if hasattr(builtins, name)}
    if not shadowed or (names & own) - shadowed:
        return set()

    def calls(node: ast.AST) -> list[ast.Call]:
        return [n for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in shadowed]

    return {c.func.id for tree in trees for c in calls(tree) if calls(c) == [c]}


def bound_in(trees: list[ast.Module]) -> set[str]:
    """Names that the tests themselves give a meaning."""
    found: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).partition(".")[0])
    return found


def is_trusted_import(statement: ast.stmt) -> bool:
    (alias,) = statement.names
    if isinstance(statement, ast.Import):
        return alias.name.partition(".")[0] in TRUSTED_IMPORTS and alias.asname in (None, "np", "pd")
    return statement.level == 0 and (statement.module or "").partition(".")[0] in TRUSTED_IMPORTS and alias.asname is None


def split_names(code: str, prefix: str, trees: list[ast.Module]) -> tuple[dict[str, ast.stmt], set[str]]:
    """(names in the tests that the judge imports itself, with the statement; names that it asks the program for).

    In this order: what a test binds is the test's; what the prefix defines is the program's (it is what is tested); what the
    prefix imports is the judge's; so are builtins (see `shadowed_builtins`), modules of the standard library that are used as
    such, and what the program imports from TRUSTED_IMPORTS; the rest is the program's.
    """
    names = {name for tree in trees for name in names_in(tree)}
    head, program = parse_head(prefix), parse(code)
    tested, head_imports = definitions_of(head), imports_of(head)
    own, imported = definitions_of(program), imports_of(program)
    roots = {n.value.id for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)}
    builtins_meant = set() if tested else shadowed_builtins(trees, own, names)
    natives: dict[str, ast.stmt] = {}
    asked: set[str] = set()
    for name in names - bound_in(trees):
        if name in tested:
            asked.add(name)
        elif name in head_imports:
            natives[name] = head_imports[name]
        elif hasattr(builtins, name):
            if name in builtins_meant:
                asked.add(name)
        elif name in roots and name in TRUSTED_IMPORTS:
            natives[name] = ast.Import([ast.alias(name)])
        elif name in imported and name not in own and is_trusted_import(imported[name]):
            natives[name] = imported[name]
        else:
            asked.add(name)
    return natives, asked


def is_setup(tree: ast.Module | None) -> bool:
    """Whether a test only prepares later ones: imports, definitions and assignments."""
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    return tree is not None and all(isinstance(node, kinds) for node in tree.body)

"""Elaborating changes nothing: a component can be looked at, elaborated again, or shared."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rtl

SOURCES = sorted(Path(rtl.__path__[0]).rglob("*.py"))
MUTATING = {"append", "add", "clear", "extend", "insert", "pop", "remove", "setdefault", "update"}


def of_self(node: ast.AST) -> bool:
    """Whether it is something that is kept on ``self``, or a part of that."""
    while isinstance(node, ast.Subscript | ast.Attribute):
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            return True
        node = node.value
    return False


def targets(node: ast.AST) -> Iterator[ast.AST]:
    """What a statement or a call changes."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            yield from target.elts if isinstance(target, ast.Tuple | ast.List) else [target]
    elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr):
        yield node.target
    elif isinstance(node, ast.Call):
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr in MUTATING:
            yield function.value
        elif isinstance(function, ast.Name) and function.id == "setattr":
            yield ast.Attribute(node.args[0], "")


def changes(source: str) -> list[str]:
    """Where a class that is elaborated changes itself after it was made."""
    found = []
    for part in ast.walk(ast.parse(source)):
        if not isinstance(part, ast.ClassDef):
            continue
        methods = [item for item in part.body if isinstance(item, ast.FunctionDef)]
        if "elaborate" not in {method.name for method in methods}:
            continue
        found += [
            f"{part.name}.{method.name}, line {getattr(node, 'lineno', 0)}"
            for method in methods
            if method.name != "__init__"
            for node in ast.walk(method)
            for target in targets(node)
            if of_self(target)
        ]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_elaborating_changes_no_component(path: Path) -> None:
    assert changes(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "statement",
    [
        "self._stop = 1",
        "first, self._stop = 1, 2",
        "self._stop: int = 1",
        "self._errors['late'] |= 1",
        "self._taken.append(1)",
        "self._taken[0].parts.update(a=1)",
        "setattr(self, 'stop', 1)",
    ],
)
def test_a_change_is_noticed(statement: str) -> None:
    source = (
        f"class Unit:\n    def elaborate(self): ...\n    def _part(self):\n        {statement}\n"
    )
    assert changes(source) == ["Unit._part, line 4"]
    assert changes(source.replace("_part", "__init__")) == []

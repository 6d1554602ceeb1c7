"""Modules stay small, and a name of a class or type means one thing in the whole package."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import mmconvert

PACKAGE = Path(mmconvert.__file__).parent
MODULES = {str(p.relative_to(PACKAGE)): p.read_text("utf-8") for p in PACKAGE.rglob("*.py")}
LINES = 320  # 300 are what is aimed at; see CONTRIBUTING.md
SHARED = {"T", "R", "P"}  # variables of types, which several modules have, each for itself


def types_of(text: str) -> set[str]:
    """The classes and named types at a module's top."""
    found: set[str] = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name[0].isupper() and not name.isupper():
                found.add(name)
    return found


def test_modules_are_small() -> None:
    assert [name for name, text in MODULES.items() if len(text.splitlines()) > LINES] == []


def test_a_name_means_one_thing() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for module, text in MODULES.items():
        for name in types_of(text) - SHARED:
            if not name.startswith("_"):
                places[name].append(module)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}

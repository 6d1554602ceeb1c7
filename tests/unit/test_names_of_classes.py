"""One name means one class: two public classes of the package never share one."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "mmconvert"

# name -> why several classes may have it
SHARED: dict[str, str] = {}


@cache
def classes(package: Path) -> dict[str, list[str]]:
    """Where the public classes of a package are, by name."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(f"{path.relative_to(package)}:{node.lineno}")
    return found


def shared(package: Path) -> dict[str, list[str]]:
    """The names that several public classes have."""
    return {name: places for name, places in classes(package).items() if len(places) > 1}


def test_no_two_classes_share_a_name() -> None:
    assert len(classes(PACKAGE)) > 200
    assert {k: v for k, v in shared(PACKAGE).items() if k not in SHARED} == {}


def test_no_exception_is_left_over() -> None:
    assert set(SHARED) <= set(shared(PACKAGE))


def test_a_second_class_of_a_name_is_seen(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("class Layout:\n    pass\n\n\nclass _Reader:\n    pass\n")
    (tmp_path / "two.py").write_text("class Outer:\n    class Layout:\n        pass\n")
    (tmp_path / "three.py").write_text("class _Reader:\n    pass\n")
    assert shared(tmp_path) == {"Layout": ["one.py:1", "two.py:2"]}

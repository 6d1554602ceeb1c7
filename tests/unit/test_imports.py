"""Imports point one way, and starting costs little. See ALLOWED for the direction.

A new room must be listed here; that is the moment to think about where it belongs.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import mmconvert
from mmconvert.converters import BUILT_IN
from mmconvert.playground.checkpoints import make_hf

PACKAGE = Path(mmconvert.__file__).parent

# Everyone may import these: errors, the version, numbers and names in words.
ANYONE = {
    "adapters",
    "durable",
    "errors",
    "version",
    "words",
    "events",
    "disks",
    "names",
    "narrow",
    "positioned",
}

# Room -> the rooms it may import from, also inside functions; a room may always import itself. A
# room is a folder of the package, or one file beside them. The lines go from the bottom to the top.
FILES_ROOM = {
    "causes",
    "modeljson",
    "formats",
    "executor",
    "stored",
    "plan",
    "converters",
    "sharding",
    "config",
}
STORY = {*FILES_ROOM, "result", "estimate", "request", "convert", "run"}
ALLOWED: dict[str, set[str]] = {
    **{name: set[str]() for name in ANYONE},
    "sharding": set(),
    "stored": {"sharding"},
    "causes": {"sharding", "stored"},
    "converters": {"sharding"},
    "plan": {"converters", "sharding", "stored"},
    "config": {"sharding"},
    "modeljson": {"config", "sharding"},
    "executor": {"formats", "plan", "sharding", "stored"},
    "formats": {"causes", "config", "converters", "executor", "plan", "sharding", "stored"},
    "estimate": {"executor", "plan", "stored"},
    "result": {"estimate", "executor", "formats", "plan"},
    "request": {"config", "converters", "formats", "plan"},
    "run": STORY - {"convert", "request"},
    "convert": STORY,
    "directions": STORY,
    "renaming": {*STORY, "directions"},
    "regroup": STORY - {"convert", "request"},
    "loading": FILES_ROOM,
    "lazy": {*FILES_ROOM, "loading"},
    "datasets": set(),
    "playground": {*STORY, "api"},
    "tools": STORY,
    "api": {*STORY, "directions", "lazy", "loading", "tools"},
    "testing": {*STORY, "directions"},
    "report": {"executor", "formats", "sharding", "stored", "tools"},
    "runtime": {*FILES_ROOM, "loading"},
    "cli": {
        *STORY,
        *("api", "datasets", "directions", "playground", "regroup"),
        *("renaming", "report", "runtime", "tools"),
    },
    "__init__": {"api", "config"},
    "__main__": {"cli"},
}

# Libraries beside the standard library: who may import them at all.
LIBRARIES: dict[str, set[str]] = {
    "numpy": {
        "executor.measure",
        "executor.products",
        "executor.productsize",
        "executor.rounding",
        "executor.values",
        "playground.*",
    },
    "PIL": {"runtime.films", "runtime.media", "runtime.pictures", "runtime.tiles"},
    "av": {"runtime.films"},
    "rich": {"cli.screen", "cli.tools.*", "report.picture"},
    "tyro": {"cli.arguments", "cli.parsing", "cli.tools.*"},
    "yaml": {"cli.settings"},
}
HEAVY = {"torch", "torch_npu", "transformers", "safetensors", "megatron"}
# These may import them: the first inside functions, the second also at their top, for which no
# other module imports that room at its own top.
HEAVY_ROOMS = ("loading", "lazy", "api", "executor.group", "runtime.needs")
HEAVY_AT_THE_TOP = ("runtime.",)
LIGHT = {"runtime.needs"}  # runs before torch may be imported


class Import(NamedTuple):
    """One import: of a module of the package, or (`inside` False) of another library."""

    target: str
    inside: bool
    line: int
    top: bool  # runs when the module is imported


def module_files() -> dict[str, Path]:
    """Every module of the package by its name without the package's own."""
    found: dict[str, Path] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        words = list(path.relative_to(PACKAGE).with_suffix("").parts)
        if len(words) > 1 and words[-1] == "__init__":
            words.pop()
        found[".".join(words)] = path
    return found


FILES = module_files()


def _package_of(module: str, path: Path) -> list[str]:
    words = [] if module == "__init__" else module.split(".")
    return ["mmconvert", *(words if path.name == "__init__.py" else words[:-1])]


def _modules_named(node: ast.Import | ast.ImportFrom, package: list[str]) -> Iterator[str]:
    """Full names of the modules that an import statement loads by name."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = package[: len(package) - node.level + 1] if node.level else []
    source = ".".join([*base, *([node.module] if node.module else [])])
    for alias in node.names:  # `from package import module` loads that module
        member = f"{source}.{alias.name}"
        yield member if member.removeprefix("mmconvert.") in FILES else source


def _typing_only(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _walk(node: ast.AST, top: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, top
            continue
        later = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        later = later or (isinstance(child, ast.If) and _typing_only(child))
        yield from _walk(child, top and not later)


def imports_in(source: str, module: str, path: Path) -> list[Import]:
    """Every import in a module's source, those inside functions too."""
    package = _package_of(module, path)
    found: list[Import] = []
    for node, top in _walk(ast.parse(source), True):
        for name in _modules_named(node, package):
            inside = name == "mmconvert" or name.startswith("mmconvert.")
            target = (name.removeprefix("mmconvert").strip(".") or "__init__") if inside else name
            found.append(Import(target, inside, node.lineno, top))
    return found


@cache
def imports_of(module: str) -> list[Import]:
    path = FILES[module]
    return imports_in(path.read_text(encoding="utf-8"), module, path)


def _fits(name: str, pattern: str) -> bool:
    room = pattern.removesuffix(".*")
    return name == pattern or (pattern.endswith(".*") and (name + ".").startswith(room + "."))


def complaints(module: str, imports: list[Import]) -> list[str]:
    """The imports of a module that the table does not allow."""
    room = module.partition(".")[0]
    if room not in ALLOWED:
        return [f"{room} is new: add it to ALLOWED in {Path(__file__).name}"]
    allowed = {room, *ANYONE, *ALLOWED[room]}
    return [
        f"{module}, line {i.line}, imports {i.target}; {room} may import {sorted(allowed)}"
        for i in imports
        if i.inside and i.target.partition(".")[0] not in allowed
    ]


def test_imports_point_one_way() -> None:
    assert [words for m in FILES for words in complaints(m, imports_of(m))] == []


def test_the_table_lists_only_modules_that_are_there() -> None:
    stale = [key for key in ALLOWED if not any(_fits(name, f"{key}.*") for name in FILES)]
    assert stale == [], "take these out of ALLOWED"


def test_modules_of_the_package_do_not_import_in_circles() -> None:
    """Without those inside functions and for type checkers: what importing really runs."""
    edges = {m: {i.target for i in imports_of(m) if i.inside and i.top} - {m} for m in FILES}
    left = dict(edges)
    while ready := [m for m, targets in left.items() if not targets & left.keys()]:
        for module in ready:
            del left[module]
    assert left == {}


def test_libraries_are_imported_where_they_belong() -> None:
    """numpy only where bytes move; torch and its kin never when a module is imported."""
    assert [words for module in FILES for words in strangers(module)] == []


def strangers(module: str) -> Iterator[str]:
    """The libraries that a module imports and should not."""
    for found in imports_of(module):
        library = found.target.partition(".")[0]
        if found.inside or library in sys.stdlib_module_names:
            continue
        if library in HEAVY:
            if module.startswith(HEAVY_AT_THE_TOP) and module not in LIGHT:
                continue
            if found.top or not (module + ".").startswith(HEAVY_ROOMS):
                yield f"{module}, line {found.line}: {library}"
        elif not any(_fits(module, place) for place in LIBRARIES.get(library, set())):
            yield f"{module}, line {found.line}: {library}, not listed for it in LIBRARIES"


def test_the_runtime_is_imported_late() -> None:
    """Its modules import torch: from outside the room only inside functions, after a look."""
    early = [
        (module, found.target)
        for module in FILES
        if not module.startswith(HEAVY_AT_THE_TOP) or module in LIGHT
        for found in imports_of(module)
        if found.inside
        and found.top
        and found.target.startswith(HEAVY_AT_THE_TOP)
        and found.target not in LIGHT
    ]
    assert early == []


def test_only_the_entry_point_imports_the_command_line() -> None:
    importers = {m for m in FILES for i in imports_of(m) if i.inside and i.target == "cli"}
    assert {m for m in importers if not m.startswith("cli")} == {"__main__"}


def test_the_parser_of_imports_sees_all_forms() -> None:
    """Each form of import that could slip through is found."""
    source = """
import torch.nn as nn, os
import mmconvert.cli
from mmconvert import api, __version__
from mmconvert.formats import hf
from . import spans
from .stages import flat
from ..plan import Plan
from .. import errors
if TYPE_CHECKING:
    import numpy
try:
    import yaml
except ImportError:
    pass
class Lazy:
    import rich
    def load(self):
        from transformers import AutoModel
"""
    found = imports_in(source, "sharding.layout", PACKAGE / "sharding" / "layout.py")
    inside = [i.target for i in found if i.inside]
    assert inside == [
        *("cli", "api", "__init__", "formats.hf", "sharding.spans", "sharding.stages"),
        *("plan", "errors"),
    ]
    outside = [(i.target, i.top) for i in found if not i.inside]
    assert outside == [
        *(("torch.nn", True), ("os", True), ("numpy", False), ("yaml", True), ("rich", True)),
        ("transformers", False),
    ]
    lines = complaints("sharding.layout", found)
    assert [line.split(" imports ")[1].split(";")[0] for line in lines] == [
        *("cli", "api", "__init__", "formats.hf", "plan")
    ]


# --------------------------------------------------------------------------------- starting
def loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh process has loaded after running `code`."""
    script = f"{code}\nimport sys\nprint('MODULES', *{{m.partition('.')[0] for m in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


HELP = """
import sys
from mmconvert.cli import main
try:
    code = main({argv!r})
except SystemExit as stop:
    code = stop.code
assert code in (0, None), code
"""
STARTS = {
    "import": "import mmconvert",
    "tables": "from mmconvert.converters import registry; assert registry()",
    "help": HELP.format(argv=["--help"]),
    "version": HELP.format(argv=["--version"]),
    "help of validate": HELP.format(argv=["validate", "-h"]),
    "help of generate": HELP.format(argv=["generate", "-h"]),
    "help of finetune": HELP.format(argv=["finetune", "-h"]),
    "help of a command": HELP.format(argv=["Qwen2VLConverter", "hf_to_mm", "--help"]),
}


@pytest.mark.parametrize("start", STARTS)
def test_starting_loads_nothing_heavy(start: str) -> None:
    loaded = loaded_by(STARTS[start])
    assert "mmconvert" in loaded
    assert loaded & (HEAVY | {"numpy"}) == set()


def test_python_itself_tells_that_help_imports_no_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "mmconvert", "validate", "-h"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"tyro", "mmconvert.cli.arguments"} <= loaded  # the tool's own imports
    assert {name.partition(".")[0] for name in loaded} & HEAVY == set()
    assert "--mm_dir" in done.stdout


# Rooms and modules that Hugging Face -> MM does not need; what it needs is one table's family, two
# formats, the plan and what moves the bytes.
IDLE = (
    *("mmconvert.api", "mmconvert.lazy", "mmconvert.loading", "mmconvert.estimate"),
    *("mmconvert.cli.parsing", "mmconvert.cli.settings", "mmconvert.cli.tools"),
    *("mmconvert.config.", "mmconvert.directions.mindspore", "mmconvert.directions.dcp"),
    *("mmconvert.directions.lora", "mmconvert.modeljson", "mmconvert.tools", "mmconvert.report"),
    *("mmconvert.runtime", "mmconvert.playground", "mmconvert.executor.rendezvous"),
    *("mmconvert.executor.digests", "mmconvert.executor.rounding", "mmconvert.executor.values"),
    *("mmconvert.formats.containers.ckpt", "mmconvert.formats.containers.pickles"),
    "mmconvert.formats.contents",
    *("mmconvert.formats.containers.protobuf", "mmconvert.formats.containers.ptfile"),
    *("mmconvert.formats.dcp", "mmconvert.formats.mindspore", "mmconvert.formats.peft"),
    *("mmconvert.formats.mm.adapters", "mmconvert.formats.mm.detect", "mmconvert.formats.mm.model"),
    *("mmconvert.formats.mm.opening", "mmconvert.formats.mm.optimizer"),
    "mmconvert.formats.mm.tpsize",
    *("difflib", "numpy", "pickle", "rich", "tempfile", "typeguard", "tyro", "yaml"),
)


# What reading MM files takes, and writing none.
READING = (
    *("mmconvert.formats.containers.pickles", "mmconvert.formats.containers.ptfile"),
    *("mmconvert.formats.mm.adapters", "mmconvert.formats.mm.detect", "mmconvert.formats.mm.model"),
    *("mmconvert.formats.mm.opening", "mmconvert.formats.mm.tpsize", "mmconvert.formats.peft"),
    "pickle",  # of pickletools, which describes the opcodes
)


def test_a_conversion_imports_what_it_needs(tmp_path: Path) -> None:
    """From the command line to the last byte, there and back."""
    hf = make_hf("qwen2vl-2b", tmp_path / "hf", layers=1, vit_layers=1, vocab_size=64)
    both = ["--cfg.hf_config.hf_dir", str(hf), "--cfg.mm_dir", str(tmp_path / "mm")]
    words = [*both, "--cfg.parallel_config.llm_pp_layers", "[1]"]
    words += ["--cfg.parallel_config.vit_pp_layers", "[1]", "--cfg.parallel_config.tp_size", "2"]
    assert [name for name in converting("hf_to_mm", words) if name.startswith(IDLE)] == []
    idle = tuple(name for name in IDLE if name not in READING)
    words = [*both, "--cfg.save_hf_dir", str(tmp_path / "back")]
    assert [name for name in converting("mm_to_hf", words) if name.startswith(idle)] == []


def converting(verb: str, words: list[str]) -> list[str]:
    """The modules that are loaded at the end of a conversion."""
    script = f"{HELP.format(argv=['Qwen2VLConverter', verb, *words])}\nprint('M', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.splitlines()[-1].split()[1:]
    assert "mmconvert.plan.proof" in loaded
    tables = [name for name in loaded if name in BUILT_IN.values()]
    assert tables == ["mmconvert.converters.qwen2vl"]
    return loaded


def test_converting_needs_no_torch() -> None:
    """The whole path to the bytes is imported: the standard library does, and tyro for flags.

    numpy and typeguard, which tyro loads for default values of generic types, cost a tenth of a
    second each.
    """
    code = (
        "import mmconvert.convert, mmconvert.cli.arguments as a\n"
        "from mmconvert.config import HFToMM\n"
        "a.read(HFToMM, ['--cfg.mm_dir', 'a', '--cfg.hf_config.hf_dir', 'b'], 'p', 'd')"
    )
    assert loaded_by(code) & (HEAVY | {"numpy", "typeguard"}) == set()

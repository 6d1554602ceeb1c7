"""Imports point one way, and starting costs little. See ALLOWED for the direction.

A new module must be listed here; that is the moment to think about where it belongs.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import mmconvert

PACKAGE = Path(mmconvert.__file__).parent

# Everyone may import these: errors, the version, numbers and names in words.
ANYONE = {"errors", "version", "words"}

# Module -> what else of the package it may import, also inside functions. `room.*` stands for
# every module of a sub-package. Keys with `*` hold for modules that have no line of their own.
ALLOWED: dict[str, set[str]] = {
    # the bottom: integers, names, nothing of files
    "errors": set(),
    "version": set(),
    "disks": set(),
    "events": set(),
    "names": set(),
    "words": set(),
    "sharding.stages": set(),
    "sharding.spans": set(),
    "sharding.layout": {"sharding.stages"},
    "sharding.devices": set(),
    "sharding.slices": {"sharding.spans"},
    "stored": {"sharding.layout"},
    # files
    "formats.*": {"formats.*", "stored"},
    "formats.allocate": {"disks"},
    "formats.megatron": {"formats.*", "sharding.layout", "stored"},
    "formats.strategy": {"formats.*", "sharding.slices"},
    "formats.strategy_writer": {"formats.*", "sharding.slices"},
    "formats.mindspore_folder": {"formats.*", "names", "stored"},
    "formats.hf_choice": {"formats.hf_bin", "names"},
    "formats.hf_sides": {"formats.hf", "formats.hf_choice", "names"},
    # tables
    "converters.*": {"converters.*", "names", "sharding.*"},
    # the plan, and its sides made from a table
    "plan": {"converters.family", "names", "sharding.*", "stored"},
    "proof": {"plan"},
    "sides.*": {"converters.family", "names", "plan", "sharding.*", "sides.*", "stored"},
    # MindSpeed-MM's own files
    "modeljson": {"sharding.*"},
    # what a request is
    "config": {"sharding.*"},
    "config_ms": {"config"},
    # moving and comparing bytes
    "executor.fileio": {"disks"},
    "executor.blockio": {"executor.fileio", "plan", "stored"},
    "executor.casts": set(),
    "executor.jobs": {"executor.casts", "executor.fileio"},
    "executor.execute": {
        *("executor.blockio", "executor.casts", "executor.differences", "executor.fileio"),
        *("executor.jobs", "executor.values", "plan", "stored"),
    },
    "executor.journal": {"executor.casts", "executor.jobs", "plan"},
    "executor.group": set(),
    "executor.pieces": {"formats.mindspore_layout", "plan", "proof", "stored"},
    "executor.moving": {
        *("events", "executor.casts", "executor.execute", "executor.group", "executor.jobs"),
        *("executor.journal", "executor.pieces", "plan", "stored"),
    },
    "executor.digests": {
        *("events", "executor.blockio", "executor.fileio", "executor.jobs", "plan", "stored"),
    },
    "estimate": {
        *("executor.execute", "executor.fileio", "executor.jobs", "output", "plan", "stored"),
    },
    "result": {"estimate", "executor.moving", "plan", "sharding.layout"},
    "executor.differences": {"plan", "stored"},
    "executor.values": {"stored"},
    "executor.measure": {"executor.values", "stored"},
    "executor.distance": {
        *("executor.blockio", "executor.fileio", "executor.jobs", "executor.measure", "plan"),
        "stored",
    },
    "comparison.diffresult": {"executor.distance"},
    "executor.compare": {
        *("executor.blockio", "executor.differences", "executor.fileio", "executor.jobs"),
        *("executor.values", "plan", "stored"),
    },
    "output": {"names", "sharding.layout"},
    # opening checkpoints
    "sources.manifest": {"converters.family", "formats.*"},
    "sources.recognise": {"converters.*", "formats.*", "sources.manifest"},
    "sources.detect": {"converters.family", "formats.*", "names", "plan", "sharding.*", "stored"},
    "sources.*": {
        *("config", "converters.*", "executor.compare", "formats.*", "names", "sharding.*"),
        *("sides.*", "sources.*", "stored"),
    },
    "sources.mindspore": {
        *("config", "converters.*", "formats.*", "names", "plan", "sharding.*", "sides.*"),
        *("sources.model", "stored"),
    },
    # proving, then writing
    "run": {
        *("config", "estimate", "events", "executor.casts", "executor.compare"),
        *("executor.differences", "executor.digests", "executor.group", "executor.jobs"),
        *("executor.journal", "executor.moving", "formats.*", "output", "plan", "proof", "result"),
        *("sharding.layout", "sources.manifest", "sources.model", "stored"),
    },
    # the story
    "convert": {
        *("config", "converters.family", "events", "names", "output", "plan", "result", "run"),
        *("sharding.*", "sides.*", "sources.*"),
    },
    "run_ms": {
        *("config_ms", "formats.*", "output", "plan", "result", "run", "sides.devices", "stored"),
    },
    "convert_ms": {
        *("config", "config_ms", "convert", "converters.*", "events", "formats.*", "names"),
        *("output", "plan", "result", "run", "run_ms", "sharding.devices", "sides.*", "sources.*"),
    },
    "comparison.opened": {"plan", "sharding.layout", "sources.model"},
    "comparison.pairing_ms": {
        *("comparison.opened", "config", "converters.*", "formats.mindspore_folder", "sides.hf"),
        "sources.*",
    },
    "comparison.pairing": {
        *("comparison.opened", "comparison.pairing_ms", "config", "sharding.layout", "sides.*"),
        "sources.*",
    },
    "comparison.verification": {
        *("comparison.pairing", "config", "events", "executor.compare", "executor.differences"),
        *("executor.jobs", "names", "plan", "sources.manifest"),
    },
    "comparison.diff": {
        *("comparison.diffresult", "comparison.opened", "comparison.pairing", "config"),
        *("converters.family", "events", "executor.differences", "executor.distance"),
        *("executor.jobs", "formats.*", "names", "plan", "sources.model", "sources.recognise"),
        "stored",
    },
    "contents": {"converters.family", "formats.hf", "names", "sharding.*", "stored", "words"},
    "inspection": {
        *("config", "contents", "converters.*", "formats.*", "sharding.layout", "sides.*"),
        *("sources.*", "stored"),
    },
    # balancing a pipeline
    "balance.effort": set(),
    "balance.chains": {"sharding.stages"},
    "balance.narrow": {"balance.chains", "balance.effort"},
    "balance.wide": {"balance.chains", "balance.effort", "balance.narrow"},
    "balance.optimum": {"balance.*", "sharding.stages"},
    "balance.workload": {"converters.family", "sources.model"},
    "balance.cost": {
        *("balance.chains", "balance.workload", "converters.family", "names", "plan"),
        *("sharding.layout", "sides.*", "sources.model", "stored"),
    },
    "balance.shapes": {"config", "converters.family", "plan", "sides.*", "sources.*"},
    "balance.frozen": {"sharding.stages", "sources.model"},
    "balance.suggestion": {
        *("balance.*", "converters.family", "formats.hf", "sharding.*", "sources.*"),
        "sources.recognise",
    },
    "doctor.report": set(),
    "doctor.leftovers": {"doctor.report", "doctor.shell"},
    "doctor.shell": {"sharding.*"},
    "doctor.asked": {
        *("config", "doctor.report", "doctor.shell", "formats.hf", "plan", "sides.hf"),
        *("sources.hf", "sources.model", "sources.recognise"),
    },
    "doctor.folder": {"doctor.report", "doctor.shell", "formats.megatron", "sharding.layout"},
    "doctor.rankfiles": {
        *("doctor.folder", "doctor.report", "doctor.shell", "formats.*", "sharding.layout"),
        "stored",
    },
    "doctor.chart": {
        *("converters.family", "doctor.folder", "doctor.report", "formats.megatron", "names"),
        *("sharding.*", "sources.*", "stored"),
    },
    "doctor.tensors": {
        *("converters.family", "doctor.chart", "doctor.folder", "doctor.report", "doctor.shell"),
        *("names", "sharding.stages", "stored"),
    },
    "doctor.shapes": {
        *("doctor.chart", "doctor.folder", "doctor.report", "executor.compare", "plan"),
        *("sharding.layout", "sides.mm_source", "sources.detect"),
    },
    "doctor.values": {
        *("converters.family", "doctor.chart", "doctor.report", "events", "executor.blockio"),
        *("executor.compare", "executor.differences", "executor.fileio", "executor.jobs"),
        *("executor.values", "plan", "sharding.layout", "sides.*", "stored"),
    },
    "doctor.hf_files": {"doctor.rankfiles", "doctor.report", "doctor.shell", "formats.*", "names"},
    "doctor.single": {"doctor.*", "events", "formats.*", "sharding.layout", "stored"},
    "doctor.mm": {
        *("config", "doctor.*", "events", "formats.*", "sharding.layout", "sides.mm_source"),
        *("sources.manifest", "sources.mm"),
    },
    "doctor.hf": {
        *("config", "converters.*", "doctor.*", "events", "formats.safetensors", "names"),
        *("sides.*", "sources.hf", "stored"),
        "plan",
    },
    "doctor.examine": {"doctor.*", "events", "formats.*"},
    "loading": {
        *("config", "converters.family", "executor.blockio", "executor.fileio", "plan", "proof"),
        *("sharding.layout", "sides.*", "sources.*", "stored"),
    },
    "roundtrip": {
        *("config", "converters.family", "events", "executor.compare", "executor.digests"),
        *("executor.jobs", "names", "plan", "proof", "sharding.*", "sides.*", "sources.*"),
        "stored",
    },
    # running checkpoints, with torch
    "runtime.*": {"formats.*", "runtime.*", "sharding.*"},
    "runtime.datajson": {"modeljson", "runtime.prepare", "runtime.samples"},
    "runtime.inferencejson": {"modeljson"},
    "runtime.prepare": set(),
    "runtime.pictures": set(),
    "runtime.films": set(),
    "runtime.sounds": {"runtime.films"},
    "runtime.tiles": {"runtime.prepare"},
    "runtime.template": {"runtime.batch", "runtime.families"},
    "runtime.samples": set(),
    "runtime.needs": set(),
    "runtime.launch": {"runtime.device"},
    "runtime.device": {"runtime.needs"},
    "runtime.curve": set(),
    "runtime.verdict": set(),
    "runtime.parallel": set(),
    "runtime.shard": {"runtime.parallel"},
    "runtime.bind": {"runtime.parallel", "runtime.shard"},
    "runtime.attention": {"runtime.bind", "runtime.parallel"},
    "runtime.families": {"runtime.shard"},
    "runtime.towers": set(),
    "runtime.vision": {"runtime.attention", "runtime.bind", "runtime.towers"},
    "runtime.audio": {"runtime.attention", "runtime.bind", "runtime.towers"},
    "runtime.text": {"runtime.attention", "runtime.bind", "runtime.towers"},
    "runtime.batch": set(),
    "lazy": {
        *("config", "executor.blockio", "executor.fileio", "formats.*", "loading", "plan"),
        *("sides.*", "sources.*", "stored"),
    },
    "api": {
        *("comparison.verification", "config", "convert", "converters.*", "events", "inspection"),
        *("lazy", "loading", "result", "sharding.stages", "sources.recognise"),
    },
    # what was found, as text, pictures and pages
    "report.data": {"comparison.diffresult", "executor.distance"},
    "report.text": {"comparison.diffresult", "report.chart", "words"},
    "report.files": set(),
    "report.style": set(),
    "report.svg": {"report.style", "words"},
    "report.grid": {"contents", "report.*", "sharding.*", "words"},
    "report.stacks": {"contents", "report.*", "words"},
    "report.chart": {"report.svg"},
    "report.page": {"report.style", "report.svg"},
    "report.diffpage": {"comparison.diffresult", "report.*"},
    "report.inspectpage": {"inspection", "report.*", "sharding.*", "stored", "words"},
    # datasets
    "datasets.*": {"datasets.*"},
    "datasets.convert": {"datasets.*", "events"},
    # the shell
    "cli": {"cli.*", "config", "converters.*", "executor.group"},
    "cli.arguments": {"config", "sharding.*"},
    "cli.screen": {"events", "words"},
    "cli.conversions": {
        *("cli", "cli.*", "config", "convert", "converters.*", "executor.group", "result"),
        "sources.recognise",
    },
    "cli.mindspore": {"cli", "cli.*", "config_ms", "convert_ms", "converters.*", "executor.group"},
    "cli.dry_run": {"cli.*", "names", "result"},
    "cli.tools.verify": {"cli.*", "comparison.verification", "config", "executor.differences"},
    "cli.tools.roundtrip": {"api", "cli.*", "config", "roundtrip", "sources.recognise"},
    "cli.tools.junit": set(),
    "cli.tools.completion": {"cli", "converters.*"},
    "cli.tools.suggest": {"balance.*", "cli.*"},
    "report.picture": {"contents", "sharding.*", "words"},
    "cli.tools.diff": {
        *("cli.*", "comparison.diff", "comparison.diffresult", "config", "report.*", "words"),
    },
    "cli.tools.inspect": {"cli.*", "config", "inspection", "report.*", "words"},
    "cli.tools.doctor": {"cli.*", "config", "doctor.*", "executor.jobs"},
    "cli.tools.convert_weight": {"cli.*", "config", "config_ms"},
    "cli.tools.data": {"cli.*", "datasets.*"},
    "cli.tools.validate": {
        *("cli.arguments", "runtime.commands", "runtime.launch", "runtime.needs"),
        "runtime.verdict",
    },
    "cli.tools.generate": {
        *("cli.arguments", "cli.scriptflags", "cli.tools.finetune", "config", "runtime.commands"),
        "sharding.layout",
        *("runtime.inferencejson", "runtime.launch", "runtime.needs", "runtime.prepare"),
    },
    "cli.scripttable": set(),
    "cli.scriptflags": {"cli.scripttable", "modeljson", "sharding.layout"},
    "cli.tools.finetune": {
        *("cli.arguments", "cli.scriptflags", "cli.scripttable", "config", "modeljson"),
        "runtime.commands",
        *("runtime.datajson", "runtime.dataset", "runtime.launch", "runtime.needs"),
        *("runtime.optimizer", "runtime.prepare", "runtime.samples", "runtime.training"),
        "sharding.layout",
    },
    "__main__": {"cli"},
    "__init__": {"api", "config"},
}

# Libraries beside the standard library: who may import them at all.
LIBRARIES: dict[str, set[str]] = {
    "numpy": {"executor.measure", "executor.values"},
    "PIL": {"runtime.films", "runtime.media", "runtime.pictures", "runtime.tiles"},
    "av": {"runtime.films"},
    "rich": {"cli.screen", "cli.tools.*", "report.picture"},
    "tyro": {"cli.arguments", "cli.tools.*"},
    "yaml": {"cli.arguments"},
}
HEAVY = {"torch", "torch_npu", "transformers", "safetensors", "megatron"}
# These may import them: the first inside functions, the second also at their top, for which no
# other module imports that room at its own top.
HEAVY_ROOMS = ("loading", "lazy", "api", "executor.group")
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


def imports_of(module: str) -> list[Import]:
    path = FILES[module]
    return imports_in(path.read_text(encoding="utf-8"), module, path)


def _fits(name: str, pattern: str) -> bool:
    room = pattern.removesuffix(".*")
    return name == pattern or (pattern.endswith(".*") and (name + ".").startswith(room + "."))


def allowed_for(module: str) -> set[str] | None:
    """What a module may import, or None if the table does not list it."""
    if module in ALLOWED:
        return ALLOWED[module]
    for pattern, allowed in ALLOWED.items():
        if pattern.endswith(".*") and _fits(module, pattern):
            return allowed
    if (FILES[module].parent / "__init__.py") == FILES[module] and not imports_of(module):
        return set()  # an empty __init__.py
    return None


def complaints(module: str, imports: list[Import]) -> list[str]:
    """The imports of a module that the table does not allow."""
    allowed = allowed_for(module)
    if allowed is None:
        return [f"{module} is new: add it to ALLOWED in {Path(__file__).name}"]
    return [
        f"{module}, line {i.line}, imports {i.target}; it may import {sorted(allowed | ANYONE)}"
        for i in imports
        if i.inside
        and i.target not in ANYONE
        and not any(_fits(i.target, pattern) for pattern in allowed)
    ]


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_point_one_way(module: str) -> None:
    assert complaints(module, imports_of(module)) == []


def test_the_table_lists_only_modules_that_are_there() -> None:
    stale = [key for key in ALLOWED if not any(_fits(name, key) for name in FILES)]
    assert stale == [], "take these out of ALLOWED"


def test_modules_of_the_package_do_not_import_in_circles() -> None:
    """Without those inside functions and for type checkers: what importing really runs."""
    edges = {m: {i.target for i in imports_of(m) if i.inside and i.top} - {m} for m in FILES}
    left = dict(edges)
    while ready := [m for m, targets in left.items() if not targets & left.keys()]:
        for module in ready:
            del left[module]
    assert left == {}


@pytest.mark.parametrize("module", sorted(FILES))
def test_libraries_are_imported_where_they_belong(module: str) -> None:
    """numpy only where bytes move; torch and its kin never when a module is imported."""
    wrong: list[str] = []
    for found in imports_of(module):
        library = found.target.partition(".")[0]
        if found.inside or library in sys.stdlib_module_names:
            continue
        if library in HEAVY:
            if module.startswith(HEAVY_AT_THE_TOP) and module not in LIGHT:
                continue
            if found.top or not (module + ".").startswith(HEAVY_ROOMS):
                wrong.append(f"line {found.line}: {library}")
        elif not any(_fits(module, place) for place in LIBRARIES.get(library, set())):
            wrong.append(f"line {found.line}: {library}, not listed in LIBRARIES for {module}")
    assert wrong == []


def test_the_runtime_is_imported_late() -> None:
    """Its modules import torch: from outside the room only inside functions, after a look."""
    early = [
        (module, found.target)
        for module in FILES
        if not module.startswith(HEAVY_AT_THE_TOP) or module in LIGHT
        for found in imports_of(module)
        if found.inside and found.top and found.target.startswith(HEAVY_AT_THE_TOP)
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
from mmconvert import plan, __version__
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
        *("cli", "plan", "__init__", "formats.hf", "sharding.spans", "sharding.stages"),
        *("plan", "errors"),
    ]
    outside = [(i.target, i.top) for i in found if not i.inside]
    assert outside == [
        *(("torch.nn", True), ("os", True), ("numpy", False), ("yaml", True), ("rich", True)),
        ("transformers", False),
    ]
    lines = complaints("sharding.layout", found)
    assert [line.split(" imports ")[1].split(";")[0] for line in lines] == [
        *("cli", "plan", "__init__", "formats.hf", "sharding.spans", "plan")
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

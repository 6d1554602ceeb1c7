"""The command ``inspect``: what is this checkpoint?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from mmconvert.cli.arguments import read_plain
from mmconvert.cli.screen import shows_blocks
from mmconvert.config import MaybePath
from mmconvert.names import number
from mmconvert.report.files import check_reports
from mmconvert.words import amount, one_line, printable

if TYPE_CHECKING:
    from mmconvert.tools.inspection import Inspection

LONG = 2000  # characters of a note


@dataclass(frozen=True)
class Inspected:
    """What to look at."""

    path: tyro.conf.Positional[Path]
    """A checkpoint: a folder of any format, or one file."""
    tensors: bool = False
    """List every tensor."""
    html: MaybePath = None
    """Write a report to this file: one HTML page with the picture, which needs nothing else."""
    svg: MaybePath = None
    """Write the picture alone to this file."""
    overwrite: bool = False
    """Replace an existing report or picture."""
    json: bool = False
    """Print the result, or the error, as JSON."""
    debug: bool = False
    """Add the traceback to errors."""


def run(words: list[str]) -> int:
    """Looks, and shows."""
    text = "What a checkpoint is: kind, family, sizes, and which layers are where, as a picture."
    prog = "mm-convert inspect"
    example = f"{prog} MM_DIR --html report.html --svg layout.svg"
    asked = read_plain(Inspected, words, prog, f"{text}\n\nexample:\n  {example}")
    from mmconvert.tools import inspection

    reports = check_reports(asked.html, asked.svg, overwrite=asked.overwrite)
    found = inspection.inspect(asked.path)
    _write(found, asked)
    if asked.json:
        listing = [[t.name, t.dtype, list(t.shape), str(t.path)] for t in found.listing]
        extra = {"listing": listing} if asked.tensors else {}
        print(json.dumps(found.as_dict() | extra))
        return 0
    _show(found, asked)
    for path in reports:
        print(one_line(f"written: {path}"))
    return 0


def _write(found: Inspection, asked: Inspected) -> None:
    """The files that were asked for."""
    if asked.html is None and asked.svg is None:
        return
    from mmconvert.report.files import write_report
    from mmconvert.report.inspectpage import inspect_page, inspect_svg

    if asked.html:
        text = inspect_page(found, asked.path, tensors=asked.tensors)
        write_report(asked.html, text, overwrite=asked.overwrite)
    if asked.svg:
        write_report(asked.svg, inspect_svg(found, asked.path), overwrite=asked.overwrite)


def _show(found: Inspection, asked: Inspected) -> None:
    """The facts, the picture and, if asked for, the tensors on the terminal."""
    from rich.console import Console

    from mmconvert.report.picture import boxes_table, layout_table

    family = found.family or "unknown family"
    print(f"{printable(str(asked.path), LONG)}: {found.title}, {family}")
    tensors = number(found.tensors, "tensor")
    print(
        f"{found.parameters:,} parameters, {'/'.join(found.dtype)}, {tensors}, ",
        end="",
    )
    print(amount(found.nbytes) + (f", iteration {found.iteration}" if found.iteration else ""))
    for note in found.notes:
        print(("" if note.startswith("warning: ") else "note: ") + printable(note, LONG))
    table = None
    if found.layout is not None:
        table = layout_table(found.layout, boxes=found.boxes, unicode=shows_blocks())
    elif found.boxes:
        table = boxes_table(found.boxes, found.unit, unicode=shows_blocks())
    if table is not None:
        Console().print(table)
    if asked.tensors:
        for t in found.listing:
            place = f"{t.path.parent.name}/{t.path.name}"
            print(f"{printable(t.name)}  {t.dtype} {list(t.shape)}  {place}")

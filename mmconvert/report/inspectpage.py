"""The report of ``inspect``: one page, or its picture alone."""

from __future__ import annotations

from pathlib import Path

from mmconvert.report import page
from mmconvert.report.grid import layout_drawing
from mmconvert.report.stacks import stacks_drawing
from mmconvert.report.svg import Drawing
from mmconvert.sharding.layout import grid_flag
from mmconvert.sharding.stages import show
from mmconvert.stored import StoredTensor
from mmconvert.tools.inspection import Inspection
from mmconvert.words import amount


def title_of(found: Inspection, path: Path) -> str:
    """One line: name, kind, family, size. A rank file is called by its folder too."""
    path = path.absolute()
    name = path.name
    name = f"{path.parent.name}/{name}" if found.kind == "mm_rank_file" else name
    family = f", {found.family}" if found.family else ""
    return f"{name}: {found.title}{family}, {amount(found.nbytes)}"


def inspect_drawing(found: Inspection, title: str, width: int = 0) -> Drawing:
    """The picture that fits the kind, ``width`` pixels wide; 0: as wide as it needs to be."""
    if found.layout is not None:
        return layout_drawing(found.layout, found.boxes, title, width)
    return stacks_drawing(found.boxes, title, found.unit, width)


def inspect_svg(found: Inspection, path: Path) -> str:
    """The picture as a file of its own."""
    title = title_of(found, path)
    return inspect_drawing(found, title).standalone(title)


def inspect_page(found: Inspection, path: Path, *, tensors: bool) -> str:
    """The whole page; ``tensors`` lists every stored tensor."""
    facts = {
        "path": str(path),
        "kind": found.title,
        "family": found.family,
        "parameters": f"{found.parameters:,}",
        "dtype": ", ".join(found.dtype),
        "tensors": f"{found.tensors:,}",
        "bytes": f"{found.nbytes:,} ({amount(found.nbytes)}), every copy counted",
        "iteration": found.iteration,
    }
    if found.layout is not None:
        facts |= {grid_flag(key): show(grid) for key, grid in found.layout.grids.items()}
    parts = [page.heading(title_of(found, path), 1), page.facts(facts)]
    parts += [page.bullets(found.notes)] if found.notes else []
    title = "Which tensors are where"
    drawn = page.pictures(lambda width: inspect_drawing(found, title, width), title_of(found, path))
    parts.append(drawn)
    parts.append(page.heading("In figures"))
    rows = [
        (box.name, "; ".join(h.words for h in box.holdings), f"{box.tensors:,}", f"{box.nbytes:,}")
        for box in found.boxes
    ]
    parts.append(page.table(("place", "holds", "tensors", "bytes"), rows, "ttnn"))
    if tensors:
        listed = [
            (t.name, t.dtype, "x".join(map(str, t.shape)) or "scalar", f"{t.nbytes:,}", _file(t))
            for t in found.listing
        ]
        parts.append(page.heading("Tensors"))
        head = ("tensor", "dtype", "shape", "bytes", "file")
        parts.append(page.table(head, listed, "mttnt"))
    return page.page(title_of(found, path), parts)


def _file(tensor: StoredTensor) -> str:
    return f"{tensor.path.parent.name}/{tensor.path.name}"

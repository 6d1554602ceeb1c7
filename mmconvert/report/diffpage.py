"""The report of ``diff`` as one HTML page: figures, a bar chart by layer, tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mmconvert.report import page
from mmconvert.report.chart import EDGE, WHOLE, Bar, bar_chart
from mmconvert.report.style import WIDTHS, module_class
from mmconvert.report.svg import Drawing
from mmconvert.report.text import (
    by_layered_module,
    facts,
    figure,
    headline,
    layer_axis,
    part,
    percent,
)
from mmconvert.tools.comparison.diffresult import Diff, DiffGroup, TensorDistance

QUANTITY = "relative L2 of each layer"
MARKS = (
    "relative L2: ||A - B|| / ||A||, all charts on one scale. in, out: what stands before and "
    "after the layers. !: NaN or infinite values, which are in no sum. ∞: A is zero throughout."
)
FIGURES = ("relative L2", "largest difference", "elements that differ")


def layers_drawing(found: Diff, width: int, title: str = "") -> Drawing:
    """A chart below the other for each module with layers of which any changed.

    All have one scale, so that modules can be compared by eye.
    """
    drawing = Drawing()
    if title:
        drawing.text(EDGE, 24, title, "ink big")
        drawing.text(EDGE, 44, headline(found), "dim")
    top = 56.0 if title else 0.0
    modules = by_layered_module(found.layers())
    axis = layer_axis(modules)
    for module, groups in modules.items():
        if not any(group.changed for group in groups):
            drawing.text(EDGE, top + 20, module, "ink big")
            drawing.text(EDGE, top + 38, "no layer changed", "dim")
            top += 60
            continue
        bars = [Bar(str(g.layer), g.totals.relative, _hint(g), mark(g)) for g in groups]
        css = module_class(found.colours.get(module, ""))
        bar_chart(drawing, top, module, bars, css, QUANTITY, axis, width)
        top += WHOLE
    drawing.width = max(drawing.width + EDGE, width)
    drawing.height += EDGE
    return drawing


def diff_svg(found: Diff) -> str:
    """The charts as a file of their own."""
    title = title_of(found)
    return layers_drawing(found, WIDTHS["medium"], title).standalone(title)


def title_of(found: Diff) -> str:
    """One line."""
    a, b = (side.path.absolute().name for side in (found.a, found.b))
    return f"{a} and {b}: how far apart"


def mark(group: DiffGroup) -> str:
    """What stands above a bar, see MARKS."""
    if group.totals.odd:
        return "!"
    return "∞" if group.totals.relative == math.inf else ""


def _hint(group: DiffGroup) -> str:
    t = group.totals
    return (
        f"layer {group.layer}: relative L2 {figure(t.relative)}, largest difference "
        f"{figure(t.largest)}, {group.changed} of {group.tensors} tensors differ"
    )


def diff_page(found: Diff, top: int) -> str:
    """The whole page, with the ``top`` tensors that changed most (0: all that changed)."""
    title = title_of(found)
    parts = [
        page.heading(title, 1),
        page.facts({"A": facts(found.a), "B": facts(found.b)}),
        page.paragraph(headline(found), "lead"),
    ]
    parts += [page.bullets(found.notes)] if found.notes else []
    parts += [page.heading("By module"), _modules(found.modules())]
    if found.changed():
        parts.append(page.heading("By layer"))
        parts.append(page.paragraph(MARKS, "quiet"))
        label = "relative L2 by layer"
        parts.append(page.pictures(lambda width: layers_drawing(found, width), label))
        parts += _tensors(found, top)
    parts += _odd(found.odd())
    for what, names in (("Only in A", found.only_a), ("Only in B", found.only_b)):
        parts += [page.heading(what), page.bullets(names)] if names else []
    if found.other_shapes:
        rows = [(s.name, str(list(s.a)), str(list(s.b))) for s in found.other_shapes]
        parts.append(page.heading("Other shapes: not compared"))
        parts.append(page.table(("tensor", "A", "B"), rows, "mnn"))
    parts += [page.heading("By layer, in figures"), _layers(found.layers())]
    return page.page(title, parts)


def _figures(group: DiffGroup) -> tuple[str, ...]:
    t = group.totals
    return (
        figure(t.relative),
        figure(t.largest),
        percent(t.different, t.elements),
        f"{group.changed}/{group.tensors}",
    )


def _modules(groups: Sequence[DiffGroup]) -> str:
    rows = [(g.module, *_figures(g)) for g in groups]
    return page.table(("module", *FIGURES, "tensors that differ"), rows, "mnnnn")


def _layers(groups: Sequence[DiffGroup]) -> str:
    rows = [(g.module, str(g.layer), *_figures(g)) for g in groups]
    return page.table(("module", "layer", *FIGURES, "tensors that differ"), rows, "mnnnnn")


def _tensors(found: Diff, top: int) -> list[str]:
    changed = found.changed()
    shown = changed[:top] if top else changed
    rows = [
        (
            "\n".join((t.name, *t.hf_names)),
            part(found.share(t)),
            figure(t.totals.relative),
            figure(t.totals.largest),
            *((f"{t.a.value:g}", f"{t.b.value:g}") if t.a and t.b else ("", "")),
            percent(t.totals.different, t.totals.elements),
        )
        for t in shown
    ]
    name = "tensor, and what Hugging Face calls it"
    head = (name, "of the change", *FIGURES[:2], "A there", "B there", "differ")
    return [
        page.heading(f"Tensors, {len(shown)} of {len(changed)} that differ"),
        page.table(head, rows, "mnnnnnn"),
    ]


def _odd(tensors: Sequence[TensorDistance]) -> list[str]:
    rows = [
        (t.name, *map(str, (t.totals.nan_a, t.totals.inf_a, t.totals.nan_b, t.totals.inf_b)))
        for t in tensors
    ]
    if not rows:
        return []
    head = ("tensor", "NaN in A", "infinite in A", "NaN in B", "infinite in B")
    return [page.heading("NaN and infinite values"), page.table(head, rows, "mnnnn")]

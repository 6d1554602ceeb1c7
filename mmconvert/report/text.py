"""A diff as lines for a terminal: plain text, names at the end of lines so that none is cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from mmconvert.names import number
from mmconvert.report.chart import Axis, axis_for
from mmconvert.tools.comparison.diffresult import Diff, DiffGroup, Facts, TensorDistance
from mmconvert.words import amount, printable

BLOCKS, ASCII = "▁▂▃▄▅▆▇█", "12345678"
KINDS = {"hf": "Hugging Face", "mm": "MM", "ms": "MindSpore"}
LISTED = 5  # names of tensors that only one side has
Name = Callable[[TensorDistance], str]


def percent(part: int, whole: int) -> str:
    """A share that is 0% only for none and 100% only for all."""
    if part in (0, whole):
        return "100%" if part else "0%"
    return f"{min(99.9, max(0.1, 100 * part / whole)):.1f}%"


def part(share: float) -> str:
    """A part of the whole change, 0 to 1; - where float64 cannot hold that."""
    if not math.isfinite(share):
        return "-"
    return "<0.1%" if 0 < share < 0.0005 else f"{100 * share:.1f}%"


def figure(value: float) -> str:
    """A relative or absolute difference in four figures; 0 is exact."""
    return "0" if value == 0 else f"{value:.3e}"


def facts(side: Facts) -> str:
    """A checkpoint in one line."""
    more = f", iteration {side.iteration}" if side.iteration else ""
    dtypes = "/".join(side.dtypes)
    kind = KINDS.get(side.kind, side.kind)
    return f"{printable(str(side.path))} ({kind}, {side.family}, {dtypes}{more})"


def headline(found: Diff) -> str:
    """The outcome in one sentence."""
    size, count = amount(found.nbytes), len(found.tensors)
    changed = len(found.changed())
    if found.equal:
        return f"equal: {number(count, 'tensor')}, {size} compared as numbers"
    words = (
        f"{changed} of {count} tensors differ"
        if changed
        else f"{number(count, 'tensor is', 'tensors are')} equal"
    )
    if changed:
        t, whose = found.weights, " of the weights," if found.with_state else ""
        words += (
            f":{whose} relative L2 {figure(t.relative)}, largest difference {figure(t.largest)}, "
            f"{percent(t.different, t.elements)} of the elements"
        )
    for what, names in (("only in A", found.only_a), ("only in B", found.only_b)):
        words += f"; {len(names)} {what}" if names else ""
    if found.other_shapes:
        words += f"; {len(found.other_shapes)} of other shapes"
    return words


def lines_of(
    found: Diff, top: int, *, hf_names: bool, unicode: bool, narrow: bool = False
) -> list[str]:
    """The whole report.

    Args:
        top: number of tensors listed; 0 for all.
        hf_names: name tensors as Hugging Face does.
        unicode: whether block characters can be shown.
        narrow: below 80 columns: long lines are divided, and columns that can be spared left out.
    """
    lines = [f"A  {facts(found.a)}", f"B  {facts(found.b)}", headline(found)]
    changed = found.changed()
    if changed:
        lines += ["", *_modules(found.modules())]
        lines += ["", *_layers(found.layers(), BLOCKS if unicode else ASCII, narrow=narrow)]
        shown = changed[:top] if top else changed
        name = _hf_name if hf_names else _mm_name
        lines += ["", *_tensors(found, shown, len(changed), name, narrow=narrow)]
    lines += _odd(found.odd()) if found.odd() else []
    for what, names in (("only in A", found.only_a), ("only in B", found.only_b)):
        lines += ["", f"{what}: {_some(names)}"] if names else []
    if found.other_shapes:
        words = [f"{s.name} {list(s.a)} and {list(s.b)}" for s in found.other_shapes]
        lines += ["", f"other shapes: {_some(words)}"]
    return lines


def _some(names: Sequence[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(map(printable, names[:LISTED])) + (f" and {more} more" if more > 0 else "")


def _mm_name(t: TensorDistance) -> str:
    return t.name


def _hf_name(t: TensorDistance) -> str:
    return " + ".join(t.hf_names) or t.name


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns: the last one, a name, to the left, the others to the right."""
    table = [head, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(head) - 1)]
    return [
        "  ".join([*(cell.rjust(w) for cell, w in zip(row, widths, strict=False)), row[-1]])
        for row in table
    ]


def _modules(groups: Sequence[DiffGroup]) -> list[str]:
    head = ("relative L2", "largest", "tensors", "elements", "module")
    return _table(
        head,
        [
            (
                figure(g.totals.relative),
                figure(g.totals.largest),
                f"{g.changed}/{g.tensors}",
                percent(g.totals.different, g.totals.elements),
                g.module,
            )
            for g in groups
        ],
    )


def by_layered_module(groups: Sequence[DiffGroup]) -> dict[str, list[DiffGroup]]:
    """The groups of each module that has layers, in their order."""
    by_module: dict[str, list[DiffGroup]] = {}
    for group in groups:
        by_module.setdefault(group.module, []).append(group)
    return {m: gs for m, gs in by_module.items() if any(isinstance(g.layer, int) for g in gs)}


def layer_axis(modules: Mapping[str, Sequence[DiffGroup]]) -> Axis:
    """One scale for all modules of a comparison, so that they can be compared by eye."""
    return axis_for([g.totals.relative for groups in modules.values() for g in groups])


def _layers(groups: Sequence[DiffGroup], levels: str, *, narrow: bool) -> list[str]:
    """One line for each module that changed: a bar for each layer, on the scale of the charts."""
    modules = by_layered_module(groups)
    axis = layer_axis(modules)
    lines: list[str] = []
    for module, all_of_it in modules.items():
        found = [group for group in all_of_it if isinstance(group.layer, int)]
        if not any(group.changed for group in found):
            continue
        bars = "".join(_level(g, axis, levels) for g in found)
        most = max(found, key=lambda g: g.totals.relative)
        least = min(found, key=lambda g: g.totals.relative)
        scale = " (log scale)" if axis.low else ""
        between = "\n  " if narrow else "  "
        lines += (
            f"{module} layers 0-{len(found) - 1}  {bars}{scale}{between}most "
            f"{figure(most.totals.relative)} in layer {most.layer}, least "
            f"{figure(least.totals.relative)} in layer {least.layer}"
        ).split("\n")
    return lines


def _level(group: DiffGroup, axis: Axis, levels: str) -> str:
    """A layer as one character: ! for NaN or infinite values, . for no difference."""
    if group.totals.odd:
        return "!"
    share = axis.share(group.totals.relative)
    return levels[min(len(levels) - 1, int(share * len(levels)))] if share else "."


def _odd(tensors: Sequence[TensorDistance]) -> list[str]:
    lines = [
        f"{printable(t.name)}: A {t.totals.nan_a} NaN, {t.totals.inf_a} infinite; "
        f"B {t.totals.nan_b} NaN, {t.totals.inf_b} infinite"
        for t in tensors[:LISTED]
    ]
    more = len(tensors) - LISTED
    return ["", *lines, *([f"and {more} more tensors with such values"] if more > 0 else [])]


def _tensors(
    found: Diff, shown: Sequence[TensorDistance], changed: int, name: Name, *, narrow: bool
) -> list[str]:
    what = f"tensor ({len(shown)} of {changed})"
    head = ("of the change", "relative L2", "largest", "A", "B", "elements", what)
    rows = [
        (
            part(found.share(t)),
            figure(t.totals.relative),
            figure(t.totals.largest),
            *((f"{t.a.value:g}", f"{t.b.value:g}") if t.a and t.b else ("", "")),
            percent(t.totals.different, t.totals.elements),
            printable(name(t)),
        )
        for t in shown
    ]
    if not narrow:
        return _table(head, rows)
    spare = [(*row[:3], row[5], row[6]) for row in (head, *rows)]  # the name on a line of its own
    figures = _table((*spare[0][:-1], ""), [(*row[:-1], "") for row in spare[1:]])
    return [
        line
        for row, above in zip(spare, figures, strict=True)
        for line in (above.rstrip(), f"  {row[-1]}")
    ]

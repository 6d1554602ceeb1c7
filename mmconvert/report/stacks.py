"""A picture of places in a row: weight files, or the model chunks of one rank file."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from mmconvert.formats.contents import Box
from mmconvert.report.style import module_class
from mmconvert.report.svg import CHARACTER, Drawing, width_of
from mmconvert.words import amount, printable

# Pixels: around the picture, of one place, of the longest bar and the least that it may be.
EDGE, ROW, BAR, SHORTEST = 14, 26, 420, 180
LONGEST = 40  # characters of a file's name


def stacks_drawing(boxes: Sequence[Box], title: str, unit: str, width: int = 0) -> Drawing:
    """One bar for each place, as long as its bytes, divided into modules.

    Args:
        unit: what a place is, such as ``weight file``.
        width: pixels it may be wide; name, bar and words stand below each other where they do
            not fit on a line. 0: on a line, as wide as they are.
    """
    drawing = Drawing()
    drawing.text(EDGE, EDGE + 12, title, "ink big")
    y = _legend(drawing, boxes, width)
    names = [printable(box.name, LONGEST) for box in boxes]
    left = EDGE + max([width_of(name) for name in [*names, unit]]) + 12
    after = max((width_of(amount(b.nbytes) + _words(b)) for b in boxes), default=0) + 16
    bar = width - left - after - EDGE if width else BAR
    most = max((box.nbytes for box in boxes), default=0) or 1
    if bar < SHORTEST:
        for name, box in zip(names, boxes, strict=True):
            y = _stacked(drawing, name, box, y, most, width - 2 * EDGE)
    else:
        drawing.text(EDGE, y, unit, "dim bold")
        drawing.text(left, y, "bytes, and what it holds", "dim bold")
        for name, box in zip(names, boxes, strict=True):
            y += ROW
            drawing.text(EDGE, y, name)
            x = _bar(drawing, box, left, y, bar / most) + 8
            drawing.text(x, y, amount(box.nbytes), "ink bold")
            drawing.text(x + 8 + width_of(amount(box.nbytes)), y, _words(box), "dim")
    drawing.width = max(drawing.width + EDGE, width)
    drawing.height += EDGE
    return drawing


def _legend(drawing: Drawing, boxes: Sequence[Box], width: int) -> float:
    """The modules with their colours; returns where the next line is."""
    modules = {h.module: h for box in boxes for h in box.holdings}
    x, y = float(EDGE), EDGE + 36.0
    for module, holding in modules.items():
        word = printable(holding.word or module, LONGEST)
        if width and x > EDGE and x + 17 + width_of(word) > width - EDGE:
            x, y = EDGE, y + 19
        drawing.rect(x, y - 10, 11, 11, module_class(holding.colour))
        drawing.text(x + 17, y, word, "dim")
        x += 17 + width_of(word) + 18
    return y + 28


def _words(box: Box) -> str:
    return printable("; ".join(holding.words for holding in box.holdings) or "nothing")


def _stacked(drawing: Drawing, name: str, box: Box, y: float, most: int, room: float) -> float:
    """Name and bytes, the bar below, then what it holds; returns where the next place is."""
    beside = width_of(name) + width_of(amount(box.nbytes)) + 12 <= room
    drawing.text(EDGE, y, name)
    y += 0 if beside else 17
    drawing.text(EDGE + room, y, amount(box.nbytes), "ink bold", "end")
    _bar(drawing, box, EDGE, y + 19, room / most)
    y += 38
    for line in textwrap.wrap(_words(box), int(room / CHARACTER)):
        drawing.text(EDGE, y, line, "dim")
        y += 17
    return y + 12


def _bar(drawing: Drawing, box: Box, left: float, y: float, scale: float) -> float:
    """A bar of ``scale`` pixels a byte; returns where it ends."""
    x = left
    for holding in box.holdings:
        length = scale * holding.nbytes
        if length:
            hint = f"{holding.words}: {holding.tensors} tensors, {holding.nbytes:,} bytes"
            css = module_class(holding.colour)
            drawing.rect(x, y - 11, length - 1 if length > 2 else length, 15, css, hint)
        x += length
    return x

"""A picture of places in a row: weight files, or the model chunks of one rank file."""

from __future__ import annotations

from collections.abc import Sequence

from mmconvert.formats.contents import Box
from mmconvert.report.style import module_class
from mmconvert.report.svg import Drawing, width_of
from mmconvert.words import amount, printable

EDGE, ROW, BAR = 20, 26, 420  # pixels: around the picture, of one place, of the longest bar
LONGEST = 40  # characters of a file's name


def stacks_drawing(boxes: Sequence[Box], title: str, unit: str) -> Drawing:
    """One bar for each place, as long as its bytes, divided into modules.

    Args:
        unit: what a place is, such as ``weight file``.
    """
    drawing = Drawing()
    drawing.text(EDGE, EDGE + 12, title, "ink big")
    modules = {h.module: h for box in boxes for h in box.holdings}
    x = EDGE
    for module, holding in modules.items():
        word = printable(holding.word or module, LONGEST)
        drawing.rect(x, EDGE + 25, 11, 11, module_class(holding.colour))
        drawing.text(x + 17, EDGE + 35, word, "dim")
        x += 17 + width_of(word) + 18
    names = [printable(box.name, LONGEST) for box in boxes]
    left = EDGE + max([width_of(name) for name in [*names, unit]]) + 12
    most = max((box.nbytes for box in boxes), default=0) or 1
    y = EDGE + 62
    drawing.text(EDGE, y, unit, "dim bold")
    drawing.text(left, y, "bytes, and what it holds", "dim bold")
    for name, box in zip(names, boxes, strict=True):
        y += ROW
        drawing.text(EDGE, y, name)
        _bar(drawing, box, left, y, most)
    drawing.width += EDGE
    drawing.height += EDGE - 4
    return drawing


def _bar(drawing: Drawing, box: Box, left: float, y: float, most: int) -> None:
    x = left
    for holding in box.holdings:
        length = BAR * holding.nbytes / most
        if length:
            hint = f"{holding.words}: {holding.tensors} tensors, {holding.nbytes:,} bytes"
            drawing.rect(x, y - 11, max(1, length - 1), 15, module_class(holding.colour), hint)
        x += length
    words = "; ".join(holding.words for holding in box.holdings) or "nothing"
    drawing.text(x + 8, y, amount(box.nbytes), "ink bold")
    drawing.text(x + 16 + width_of(amount(box.nbytes)), y, words, "dim")

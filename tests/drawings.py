"""What a drawing shows, read from its SVG."""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple
from xml.etree import ElementTree

from mmconvert.report.svg import Drawing, width_of


class Words(NamedTuple):
    """Words of a picture with the room that they take at most."""

    text: str
    left: float
    right: float
    base: float


class Cell(NamedTuple):
    """A rectangle of a picture."""

    css: str
    left: float
    top: float
    right: float
    bottom: float


def parts(drawing: Drawing) -> tuple[list[Cell], list[Words]]:
    """What is drawn, all of it inside the picture."""
    root = ElementTree.fromstring(drawing.standalone("a picture"))
    space = "{http://www.w3.org/2000/svg}"
    cells = [
        Cell(
            r.attrib["class"],
            float(r.attrib["x"]),
            float(r.attrib["y"]),
            float(r.attrib["x"]) + float(r.attrib["width"]),
            float(r.attrib["y"]) + float(r.attrib["height"]),
        )
        for r in root.iter(f"{space}rect")
        if r.attrib["class"] != "ground"
    ]
    words: list[Words] = []
    for t in root.iter(f"{space}text"):
        x, width, text = float(t.attrib["x"]), width_of(t.text or ""), t.text or ""
        shift = {"middle": width / 2, "end": width}.get(t.attrib.get("text-anchor", ""), 0.0)
        words.append(Words(text, x - shift, x - shift + width, float(t.attrib["y"])))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for left, right, low in [(c.left, c.right, c.bottom) for c in cells] + [
        (w.left, w.right, w.base) for w in words
    ]:
        assert 0 <= left <= right <= width + 0.1
        assert low <= height
    for one, two in combinations(words, 2):
        apart = one.right <= two.left + 0.2 or two.right <= one.left + 0.2
        assert apart or abs(one.base - two.base) >= 13, f"{one} and {two} overlap"
    return cells, words

"""The picture of a layout: cells, bars by module on one scale, stripes, widths."""

from __future__ import annotations

import re
from itertools import combinations
from xml.etree import ElementTree

import pytest

from drawings import Cell, parts
from mmconvert.formats.contents import Box, Holding
from mmconvert.report.grid import layout_drawing
from mmconvert.report.style import WIDTHS, module_class
from mmconvert.sharding.layout import Chunk, Layout, Rank
from mmconvert.words import amount

COLOURS = {"vit": "encoder1", "audio": "encoder2", "llm": "decoder"}


def boxes_of(layout: Layout) -> list[Box]:
    """Chunks of a layout as an MM checkpoint holds them; a layer has 1,000 bytes on each rank."""
    found: list[Box] = []
    for rank in layout.ranks():
        for virtual in range(layout.vpp_size):
            stage = virtual * layout.pp_size + rank.pp
            holdings: list[Holding] = []
            for key, grid in layout.grids.items():
                counts = [n for row in grid for n in row]
                first = sum(counts[:stage])
                layers = tuple(range(first, first + counts[stage]))
                if layers:
                    ends = (layers[0] == 0, layers[-1] == sum(counts) - 1)
                    holding = Holding(key, layers, *ends, 1000 * len(layers), 5, key, COLOURS[key])
                    holdings.append(holding)
            found.append(Box("rank", tuple(holdings), Chunk(rank, virtual)))
    return found


LAYOUTS = {
    "one rank": Layout({"vit": 1, "llm": 1}, {"vit": ((32,),), "llm": ((28,),)}, decoder="llm"),
    "hetero": Layout(
        {"vit": 1, "audio": 2, "llm": 4},
        {"vit": ((32,),), "audio": ((32,),), "llm": ((28,),)},
        decoder="llm",
    ),
    "giant": Layout(
        {"vit": 8, "llm": 8},
        {
            "vit": ((3,) * 15 + (0,), (0,) * 16, (0,) * 16),
            "llm": ((0,) * 15 + (1,), (2,) * 16, (3,) * 16),
        },
        decoder="llm",
    ),
}


def ranks_of(cells: list[Cell]) -> list[Cell]:
    """The cells of ranks, in the order of reading: by lines, then from left to right."""
    return sorted((c for c in cells if c.css in {"cell", "none"}), key=lambda c: (c.top, c.left))


def in_reading_order(boxes: list[Box]) -> list[Box]:
    """Chunks as the picture shows them: stage by stage, in each its model chunks, then ranks."""
    placed = [(b.chunk.rank.pp, b.chunk.virtual, b.chunk.rank.tp, b) for b in boxes if b.chunk]
    return [box for *_, box in sorted(placed, key=lambda place: place[:3])]


def within(cell: Cell, others: list[Cell]) -> list[Cell]:
    """Those rectangles that lie in a cell, itself left out."""
    inside = [c for c in others if cell.left <= c.left and cell.top <= c.top and c != cell]
    return [c for c in inside if c.right <= cell.right + 0.1 and c.bottom <= cell.bottom]


@pytest.mark.parametrize("width", [0, *WIDTHS.values()])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_cell_says_what_it_holds(name: str, width: int) -> None:
    layout = LAYOUTS[name]
    boxes = boxes_of(layout)
    drawing = layout_drawing(layout, boxes, "a title", width)
    assert drawing.width == width or not width
    cells, words = parts(drawing)
    shown = ranks_of(cells)
    assert len(shown) == len(boxes)
    for one, two in combinations(shown, 2):
        beside = one.right <= two.left or two.right <= one.left
        assert beside or one.bottom <= two.top or two.bottom <= one.top
    mixed = len(set(layout.tp.values())) > 1
    order = in_reading_order(boxes)
    for cell, box in zip(shown, order, strict=True):
        assert box.chunk
        tp = box.chunk.rank.tp
        inside = [
            w
            for w in words
            if cell.left <= w.left <= cell.right and cell.top < w.base < cell.bottom
        ]
        assert all(w.right <= cell.right for w in inside)
        expected = [f"tp {tp}", amount(box.nbytes) if box.nbytes else "empty"]
        for h in box.holdings:
            size = layout.tp[h.module]
            expected.append(h.words + (f" · {tp % size + 1}/{size}" if mixed else ""))
        assert [w.text for w in inside] == expected


@pytest.mark.parametrize("name", LAYOUTS)
def test_bars_are_bytes_by_module_on_one_scale(name: str) -> None:
    layout = LAYOUTS[name]
    cells, _ = parts(layout_drawing(layout, boxes_of(layout), "a title"))
    scales: list[float] = []
    order = in_reading_order(boxes_of(layout))
    for cell, box in zip(ranks_of(cells), order, strict=True):
        inside = within(cell, cells)
        bars = [c for c in inside if c.css.startswith("m-") and "tint" not in c.css]
        assert [c.css for c in bars] == [module_class(h.colour) for h in box.holdings]
        tints = [c.css for c in inside if "tint" in c.css]
        assert tints == [f"{module_class(h.colour)} tint" for h in box.holdings]
        for bar, held in zip(bars, box.holdings, strict=True):
            scales.append((bar.right - bar.left) / held.nbytes)
        if bars:
            (track,) = [c for c in inside if c.css == "track"]
            assert bars[0].left == track.left
            assert bars[-1].right <= track.right + 0.1
    assert max(scales) == pytest.approx(min(scales), rel=0.01)


def test_modules_have_their_own_colours_and_the_legend_names_them() -> None:
    drawing = layout_drawing(LAYOUTS["hetero"], boxes_of(LAYOUTS["hetero"]), "a title")
    cells, words = parts(drawing)
    squares = [c for c in cells if c.bottom - c.top == c.right - c.left]
    named = {
        c.css: w.text
        for c in squares
        for w in words
        if 0 < w.left - c.right < 10 and (c.top < w.base <= c.bottom)
    }
    assert named == {"m-encoder1": "vit", "m-encoder2": "audio", "m-decoder": "llm"}


def test_parts_on_several_ranks_are_striped() -> None:
    """Vision at tp 1 and audio at tp 2 beside text at tp 4: both lie on several ranks."""
    layout = LAYOUTS["hetero"]
    drawing = layout_drawing(layout, boxes_of(layout), "a title", WIDTHS["wide"])
    cells, _ = parts(drawing)
    root = ElementTree.fromstring(drawing.standalone("a picture"))
    striped: list[Cell] = []
    for path in root.iter("{http://www.w3.org/2000/svg}path"):
        ends = [
            (float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path.attrib["d"])
        ]
        xs, ys = [x for x, _ in ends], [y for _, y in ends]
        (under,) = [
            c
            for c in cells
            if c.css.startswith("m-")
            and c.left - 0.1 <= min(xs)
            and max(xs) <= c.right + 0.1
            and c.top - 0.1 <= min(ys)
            and max(ys) <= c.bottom + 0.1
        ]
        striped.append(under)
    expected = ["m-encoder1", "m-encoder1 tint", "m-encoder2", "m-encoder2 tint"]
    assert sorted(c.css for c in striped) == sorted(expected * 4)
    same = Layout({"vit": 4, "llm": 4}, {"vit": ((2,),), "llm": ((2,),)}, decoder="llm")
    plain = layout_drawing(same, boxes_of(same), "a title").standalone("a picture")
    assert "<path" not in plain
    assert "Striped" not in plain


def test_ranks_are_chunks_of_their_layout() -> None:
    """The helper above numbers chunks as the layout does."""
    layout = LAYOUTS["giant"]
    assert {b.chunk for b in boxes_of(layout)} == {
        layout.chunk(tp, stage) for tp in range(8) for stage in range(48)
    }
    assert Chunk(Rank(7, 15), 2) in {b.chunk for b in boxes_of(layout)}

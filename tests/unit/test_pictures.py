"""Words, axes and drawings: nothing overlaps, leaves its picture or breaks its file."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmconvert.errors import OutputError
from mmconvert.formats.contents import Box, Holding
from mmconvert.report.chart import SPREAD, Bar, axis_for, bar_chart
from mmconvert.report.files import write_report
from mmconvert.report.grid import layout_drawing
from mmconvert.report.stacks import stacks_drawing
from mmconvert.report.svg import Drawing, width_of
from mmconvert.sharding.layout import Chunk, Layout, Rank
from mmconvert.words import amount, printable, ranges

NAMES = st.text(max_size=300)


# --------------------------------------------------------------------------------------- words
@pytest.mark.parametrize(
    ("nbytes", "words"),
    [(0, "0 B"), (999, "999 B"), (7100, "7.1 kB"), (12_340_000, "12.3 MB"), (4.42e9, "4.42 GB")],
)
def test_amounts(nbytes: float, words: str) -> None:
    assert amount(nbytes) == words


@given(st.sets(st.integers(0, 60)))
def test_ranges_name_the_numbers_and_no_others(numbers: set[int]) -> None:
    read: list[int] = []
    for run in ranges(numbers).split(",") if numbers else []:
        first, _, last = run.partition("-")
        read += range(int(first), int(last or first) + 1)
    assert read == sorted(numbers)


@given(NAMES)
def test_printable_names_can_be_shown_anywhere(name: str) -> None:
    shown = printable(name)
    assert shown.isprintable()
    shown.encode("utf-8")
    if name.isprintable() and len(name) <= 200:
        assert shown == name


@given(NAMES)
def test_a_drawing_with_any_name_is_xml(name: str) -> None:
    drawing = Drawing()
    drawing.text(0, 10, name)
    drawing.rect(0, 0, 5, 5, "m-vit", name)
    root = ElementTree.fromstring(drawing.standalone(name))
    assert root.attrib["aria-label"] == printable(name)


# --------------------------------------------------------------------------------------- axes
HEIGHTS = st.lists(st.one_of(st.just(0.0), st.floats(1e-30, 1e30)), min_size=1, max_size=40)


@given(HEIGHTS)
def test_bars_keep_their_order_and_stay_on_the_axis(values: list[float]) -> None:
    axis = axis_for(values)
    some = [v for v in values if v]
    assert bool(axis.low) == bool(some and max(some) / min(some) > SPREAD)
    shares = [axis.share(v) for v in sorted(values)]
    assert shares == sorted(shares)
    assert all(0 <= share <= 1 for share in shares)
    assert all((axis.share(v) > 0) == (v > 0) for v in values)
    assert 2 <= len(axis.ticks) <= 11
    assert axis.share(math.inf) == 1


# ----------------------------------------------------------------------------------- drawings
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
                    holdings.append(Holding(key, layers, *ends, 1000 * len(layers), 5))
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


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_cell_says_what_it_holds(name: str) -> None:
    layout = LAYOUTS[name]
    boxes = boxes_of(layout)
    cells, words = parts(layout_drawing(layout, boxes, "a title"))
    shaded = [c for c in cells if c.right - c.left > 60 and c.bottom - c.top > 30]
    assert len(shaded) == len(boxes)
    for one, two in combinations(shaded, 2):
        assert (
            one.right <= two.left
            or two.right <= one.left
            or one.bottom <= two.top
            or two.bottom <= one.top
        )
    mixed = len(set(layout.tp.values())) > 1
    columns = sorted({c.left for c in shaded})
    assert len(columns) == layout.tp_folders
    by_place = {(c.left, c.top): c for c in shaded}
    rows = sorted({c.top for c in shaded})
    for box in boxes:
        assert box.chunk
        row = rows[box.chunk.rank.pp * layout.vpp_size + box.chunk.virtual]
        cell = by_place[columns[box.chunk.rank.tp], row]
        inside = [
            w
            for w in words
            if cell.left <= w.left <= cell.right and cell.top < w.base < cell.bottom
        ]
        assert all(w.right <= cell.right for w in inside)
        want: list[str] = []
        for h in box.holdings:
            size = layout.tp[h.module]
            want.append(h.words + (f" · {box.chunk.rank.tp % size + 1}/{size}" if mixed else ""))
        assert [w.text for w in inside] == ([*want, amount(box.nbytes)] if want else ["empty"])


def test_more_bytes_are_a_darker_shade() -> None:
    layout = Layout({"llm": 1}, {"llm": ((1, 2, 4, 8),)}, decoder="llm")
    cells, _ = parts(layout_drawing(layout, boxes_of(layout), "a title"))
    shades = [c.css for c in cells if c.right - c.left > 60 and c.bottom - c.top > 30]
    assert shades == ["s0", "s1", "s3", "s5"]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(NAMES, st.integers(0, 10**12)), min_size=1, max_size=8))
def test_files_of_any_name_and_size(files: list[tuple[str, int]]) -> None:
    boxes: list[Box] = []
    for name, size in files:
        vision = Holding("vit", (0, 1), True, False, size, 3, "vision", "encoder1")
        boxes.append(Box(name, (vision, Holding("x" + name, (), False, False, 7, 1))))
    _, words = parts(stacks_drawing(boxes, "a title", "weight file"))
    assert [w for w in words if w.text.startswith("in, vision 0-1")]


@pytest.mark.parametrize("layers", [1, 2, 28, 80, 400])
def test_labels_below_bars_leave_room(layers: int) -> None:
    numbers = [Bar(str(i), 1.0 + i, "a layer") for i in range(layers)]
    drawing = Drawing()
    bars = [Bar("in", 1e-9, "before"), *numbers, Bar("out", math.inf, "after", "∞")]
    bar_chart(drawing, 0, "a module", bars, "m-llm", "relative L2")
    cells, words = parts(drawing)
    assert len(cells) == layers + 2
    assert {"in", "out", "∞", "0" if layers < 20 else "10"} <= {w.text for w in words}
    assert any("log scale" in w.text for w in words)


# -------------------------------------------------------------------------------------- files
def test_a_report_is_whole_or_not_there(tmp_path: Path) -> None:
    file = tmp_path / "r.svg"
    with pytest.raises(UnicodeEncodeError):
        write_report(file, "<svg>\ud800", overwrite=False)
    assert list(tmp_path.iterdir()) == []
    write_report(file, "<svg>1", overwrite=False)
    with pytest.raises(OutputError):
        write_report(file, "<svg>2", overwrite=False)
    assert file.read_text() == "<svg>1"
    link = tmp_path / "link.svg"
    link.symlink_to(file)
    write_report(link, "<svg>3", overwrite=True)
    assert (link.is_symlink(), file.read_text()) == (True, "<svg>3")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.svg", "r.svg"]


def test_a_file_that_is_no_report_stays(tmp_path: Path) -> None:
    file = tmp_path / "notes.html"
    file.write_text("my notes")
    with pytest.raises(OutputError, match="is no report"):
        write_report(file, "<svg>", overwrite=True)
    assert file.read_text() == "my notes"


def test_ranks_are_chunks_of_their_layout() -> None:
    """The helper above numbers chunks as the layout does."""
    layout = LAYOUTS["giant"]
    assert {b.chunk for b in boxes_of(layout)} == {
        layout.chunk(tp, stage) for tp in range(8) for stage in range(48)
    }
    assert Chunk(Rank(7, 15), 2) in {b.chunk for b in boxes_of(layout)}

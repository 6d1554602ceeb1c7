"""Words, axes and drawings: nothing overlaps, leaves its picture or breaks its file."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drawings import parts
from mmconvert.errors import OutputError
from mmconvert.formats.contents import Box, Holding
from mmconvert.report.chart import SPREAD, Bar, axis_for, bar_chart
from mmconvert.report.files import write_report
from mmconvert.report.stacks import stacks_drawing
from mmconvert.report.style import WIDTHS
from mmconvert.report.svg import Drawing
from mmconvert.words import amount, printable, ranges
from nights import examples

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
    assert (axis.low or 0.0, axis.high) == (axis.ticks[0], axis.ticks[-1])
    assert all(f"{tick:.0e}"[0] in "01" for tick in axis.ticks if axis.low)


# ----------------------------------------------------------------------------------- drawings
@examples(20, nightly=50)
@given(st.lists(st.tuples(NAMES, st.integers(0, 10**12)), min_size=1, max_size=8))
def test_files_of_any_name_and_size(files: list[tuple[str, int]]) -> None:
    boxes: list[Box] = []
    for name, size in files:
        vision = Holding("vit", (0, 1), True, False, size, 3, "vision", "encoder1")
        boxes.append(Box(name, (vision, Holding("x" + name, (), False, False, 7, 1))))
    for width in (0, *WIDTHS.values()):
        drawing = stacks_drawing(boxes, "a title", "weight file", width)
        _, words = parts(drawing)
        assert [w for w in words if w.text.startswith("in, vision 0-1")]
        assert drawing.width == pytest.approx(width) or not width


@pytest.mark.parametrize("layers", [1, 2, 28, 80, 400])
def test_labels_below_bars_leave_room(layers: int) -> None:
    numbers = [Bar(str(i), 1.0 + i, "a layer") for i in range(layers)]
    drawing = Drawing()
    bars = [Bar("in", 1e-9, "before"), *numbers, Bar("out", math.inf, "after", "∞")]
    axis = axis_for([bar.value for bar in bars])
    bar_chart(drawing, 0, "a module", bars, "m-decoder", "relative L2", axis, 736)
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
    with pytest.raises(OutputError, match="is not a report"):
        write_report(file, "<svg>", overwrite=True)
    assert file.read_text() == "my notes"

"""The integer maps: stage grids, shares, fuse and shard maps, names, coverage."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from mmconvert.errors import LayoutError, TensorError
from mmconvert.names import NO_EXPERT, NO_LAYER, NameTemplate, TemplateIndex
from mmconvert.plan.proof import Rect, covers
from mmconvert.sharding.spans import Concat, Interleave, Span, Split, divisors, share
from mmconvert.sharding.stages import (
    StageGrid,
    check_grids,
    check_order,
    first_stage,
    flat,
    last_stage,
    locate,
    parse_grid,
    show,
    total,
)
from nights import examples

FAST = examples(70, nightly=200)

COUNTS = st.integers(0, 12)


@st.composite
def grids(draw: st.DrawFn) -> StageGrid:
    pp, vpp = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    row = st.lists(COUNTS, min_size=pp, max_size=pp).map(tuple)
    return tuple(draw(st.lists(row, min_size=vpp, max_size=vpp)))


# ---------------------------------------------------------------------------- stage grids
@FAST
@given(grids())
def test_parse_and_show_are_inverses(grid: StageGrid) -> None:
    assert parse_grid(json.loads(show(grid)), "x") == grid
    assert parse_grid([list(row) for row in grid], "x") == grid


@FAST
@given(grids())
def test_locate_gives_each_layer_one_place(grid: StageGrid) -> None:
    """Stages in flat order, local numbers from 0, as many as the grid says."""
    places = locate(grid)
    counts = [0] * (len(grid) * len(grid[0]))
    for layer, (stage, local) in enumerate(places):
        assert local == counts[stage]
        assert layer == sum(counts)
        assert all(count == 0 for count in counts[stage + 1 :])
        counts[stage] += 1
    assert [counts[v * len(row) : (v + 1) * len(row)] for v, row in enumerate(grid)] == [
        list(row) for row in grid
    ]
    assert flat(grid) == counts
    assert total(grid) == len(places)
    if places:
        assert first_stage(grid) == places[0][0]
        assert last_stage(grid) == places[-1][0]


NO_GRIDS = [[], [[]], [1, [2]], [[1, 2], [3]], [-1], [True], [1.0], ["1"], "1", 1, None, [[[1]]]]


@pytest.mark.parametrize("value", NO_GRIDS, ids=repr)
def test_no_grids(value: object) -> None:
    with pytest.raises(LayoutError, match="llm_pp_layers"):
        parse_grid(value, "llm_pp_layers")


FLAGS = {"vit": "vit_pp_layers", "audio": "audio_pp_layers", "llm": "llm_pp_layers"}


def check_both(grids: dict[str, StageGrid]) -> None:
    check_grids(grids, FLAGS)
    check_order(grids, "llm", FLAGS)


@FAST
@given(st.integers(1, 4), st.integers(1, 3), st.data())
def test_grids_that_do_not_fit_each_other(pp: int, vpp: int, data: st.DataObject) -> None:
    """Accepted if and only if no text layer stands on an earlier stage than an encoder's layer."""
    row = st.lists(st.integers(0, 1), min_size=pp, max_size=pp).map(tuple)
    grid = st.lists(row, min_size=vpp, max_size=vpp).map(tuple)
    found: dict[str, StageGrid] = {key: data.draw(grid, key) for key in FLAGS}
    stages = {key: [s for s, n in enumerate(flat(g)) if n] for key, g in found.items()}
    encoders = [s for key in ("vit", "audio") for s in stages[key]]
    good = all(stages.values()) and all(s >= t for s in stages["llm"] for t in encoders)
    if good:
        check_both(found)
    else:
        with pytest.raises(LayoutError, match="pp_layers"):
            check_both(found)
    other = found | {"audio": tuple((*r, 0) for r in found["audio"])}
    with pytest.raises(LayoutError, match="differ in size"):
        check_grids(other, FLAGS)


# --------------------------------------------------------------------------------- shares
@FAST
@given(st.integers(0, 300), st.integers(1, 40))
def test_share_divides_into_neighbours_of_almost_equal_size(units: int, size: int) -> None:
    shares = [share(units, size, rank) for rank in range(size)]
    held = [list(range(first, first + count)) for first, count in shares]
    assert [unit for part in held for unit in part] == list(range(units))
    counts = [count for _, count in shares]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] - counts[-1] <= 1


@FAST
@given(st.integers(1, 500))
def test_divisors(number: int) -> None:
    found = divisors(number)
    assert all(number % d == 0 for d in found)
    every = [d for d in range(1, number + 1) if number % d == 0]
    assert found == every[:12]


# ---------------------------------------------------------------------------------- split
class Division:
    """A splittable axis: parts, units in each part, rows in each unit."""

    def __init__(self, parts: int, units: int, step: int, axis: int, uneven: bool) -> None:
        self.parts, self.units, self.step = parts, units, step
        self.length = parts * units * step
        self.split = Split(axis, parts, "some.units", uneven)
        self.dims = {"some.units": units}

    def spans(self, size: int) -> list[list[Span]]:
        return [self.split.spans(self.length, size, r, self.dims) for r in range(size)]

    def __repr__(self) -> str:
        return f"{self.split} of {self.length}, {self.dims}"


divisions = st.builds(
    Division,
    st.integers(1, 3),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(0, 1),
    st.booleans(),
)


def rows_of(spans: Sequence[Span]) -> list[int]:
    """The rows of the whole that a part holds, in the part's order."""
    length = sum(s.length for s in spans)
    held = [-1] * length
    for span in spans:
        for i in range(span.length):
            assert held[span.start + i] == -1, "two spans for one row of a part"
            held[span.start + i] = span.whole + i
    assert -1 not in held, "a row of a part without a span"
    return held


@FAST
@given(divisions, st.integers(1, 8))
def test_split_gives_each_rank_its_units_of_every_part(division: Division, size: int) -> None:
    """Against lists: each part's units are dealt to the ranks, and each rank keeps the order."""
    fits = division.units % size == 0 or (division.split.uneven and division.units >= size)
    if not fits:
        with pytest.raises(LayoutError):
            division.spans(size)
        return
    axis = np.arange(division.length).reshape(division.parts, division.units, division.step)
    dealt = np.array_split(axis, size, axis=1)  # the first ranks get one more, as in `share`
    for spans, mine in zip(division.spans(size), dealt, strict=True):
        assert rows_of(spans) == mine.ravel().tolist()


@FAST
@given(divisions, st.integers(1, 8))
def test_observed_is_what_spans_gave(division: Division, size: int) -> None:
    assume(division.units % size == 0 or (division.split.uneven and division.units >= size))
    expected = division.spans(size)
    lengths = [sum(s.length for s in spans) for spans in expected]
    assert division.split.observed(lengths) == expected


@FAST
@given(st.integers(2, 3), st.lists(st.integers(1, 20), min_size=1, max_size=4))
def test_observed_refuses_shards_without_equal_parts(parts: int, lengths: list[int]) -> None:
    split = Split(parts=parts)
    if all(length % parts == 0 for length in lengths):
        held = [row for spans in split.observed(lengths) for row in rows_of(spans)]
        assert sorted(held) == list(range(sum(lengths)))
    else:
        with pytest.raises(TensorError):
            split.observed(lengths)


@FAST
@given(st.integers(1, 60), st.integers(2, 8), st.integers(1, 3), st.integers(1, 8))
def test_split_refuses_what_would_lose_rows(length: int, size: int, parts: int, units: int) -> None:
    """Whatever the numbers: either an error, or every row of the whole is on exactly one rank."""
    split = Split(parts=parts, unit="units")
    try:
        spans = [split.spans(length, size, rank, {"units": units}) for rank in range(size)]
    except LayoutError:
        assert length % parts or (length // parts) % units or units % size
        return
    held = sorted(row for mine in spans for row in rows_of(mine))
    assert held == list(range(length))


# ----------------------------------------------------------------------------------- fuse
@FAST
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 8))
def test_interleave_is_a_bijection_in_the_right_order(steps: list[int], groups: int) -> None:
    """a1 b1 c1 a2 b2 c2 ...: against numpy, which puts the groups side by side."""
    lengths = [step * groups for step in steps]
    maps = Interleave("groups").maps(lengths, {"groups": groups})
    names = np.arange(sum(lengths))  # a number for each row of each source
    cuts = np.cumsum(lengths)[:-1]
    sources = [part.reshape(groups, -1) for part in np.split(names, cuts)]
    expected = np.concatenate(sources, axis=1).ravel().tolist()
    whole = [-1] * sum(lengths)
    for first, spans in zip([0, *cuts.tolist()], maps, strict=True):
        for row, place in enumerate(rows_of(spans)):
            assert whole[place] == -1, "two rows for one place"
            whole[place] = first + row
    assert whole == expected


@FAST
@given(st.integers(1, 6), st.integers(1, 8))
def test_interleaved_thirds(step: int, groups: int) -> None:
    """One source that is q, k, v below each other: as if they were three sources."""
    third = step * groups
    (spans,) = Interleave("groups", packed_qkv=True).maps([3 * third], {"groups": groups})
    three = Interleave("groups").maps([third] * 3, {"groups": groups})
    assert rows_of(spans) == [row for part in three for row in rows_of(part)]
    assert sorted(rows_of(spans)) == list(range(3 * third))


@FAST
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_concat_keeps_the_order(lengths: list[int]) -> None:
    maps = Concat().maps(lengths, {})
    assert [row for spans in maps for row in rows_of(spans)] == list(range(sum(lengths)))


@FAST
@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(2, 8))
def test_interleave_refuses_rows_that_are_no_groups(lengths: list[int], groups: int) -> None:
    assume(any(length % groups for length in lengths))
    with pytest.raises(TensorError):
        Interleave("groups").maps(lengths, {"groups": groups})
    with pytest.raises(TensorError):
        Interleave("groups", packed_qkv=True).maps([3 * groups + 1], {"groups": groups})


# ---------------------------------------------------------------------------------- names
WORD = st.text("abc_.019٣²", max_size=6)
NUMBERS = st.integers(0, 10**9 - 1)
NO_NUMBERS = ["", "00", "01", "007", "-1", "+1", " 1", "1 ", "1_0", "1e3", "0x1", "²", "٣", "１"]
NO_NUMBERS += ["1٣", "9" * 10, "9" * 5000, "1.", "a"]


@FAST
@given(WORD, WORD, NUMBERS)
def test_match_and_fill_are_inverses(head: str, tail: str, layer: int) -> None:
    template = NameTemplate(head + "{}" + tail)
    assert template.match(template.fill(layer)) == layer
    plain = NameTemplate(head + tail)
    assert plain.fill(layer) == head + tail
    assert plain.match(head + tail) == NO_LAYER
    assert plain.match(head + tail + "x") is None


@FAST
@given(WORD, WORD, st.text("abc_.019٣²", max_size=14))
def test_a_match_fills_to_the_same_name(head: str, tail: str, name: str) -> None:
    template = NameTemplate(head + "{}" + tail)
    for candidate in (name, head + name + tail):
        layer = template.match(candidate)
        assert layer is None or template.fill(layer) == candidate


@pytest.mark.parametrize("text", NO_NUMBERS, ids=lambda text: ascii(text[:12]))
def test_what_is_no_layer_number(text: str) -> None:
    template = NameTemplate("layers.{}.weight")
    assert template.match(f"layers.{text}.weight") is None
    assert TemplateIndex([(template.text, 1)]).find(f"layers.{text}.weight") is None
    assert template.match("layers.10.weight") == 10
    assert template.match("layers.weight") is None
    assert template.match("layers.1.weigh") is None


@FAST
@given(st.lists(st.sampled_from(["a", "b", "7", "{}"]), min_size=1, max_size=5), NUMBERS, NUMBERS)
def test_the_index_finds_what_the_template_matches(
    words: list[str], layer: int, expert: int
) -> None:
    text = ".".join(words)
    assume(text.count("{}") <= 2)
    experts = text.count("{}") == 2
    text = text.replace("{}", "{layer}", 1).replace("{}", "{expert}")
    template = NameTemplate(text)
    index = TemplateIndex([(text, "entry"), ("never.{}.here", "other")])
    name = template.fill(layer, expert)
    want = layer if "{layer}" in text else NO_LAYER
    assert index.find(name) == ("entry", want, expert if experts else NO_EXPERT)
    assert template.match(name) == want
    assert index.find(f"{name}.more") is None
    assert index.find("never.{}.here") is None


# ------------------------------------------------------------------------------- coverage
SIDE = st.integers(0, 5)
rects = st.builds(Rect, st.integers(-1, 5), st.integers(-1, 5), st.integers(0, 5), SIDE)


def painted(found: Sequence[Rect], rows: int, cols: int, *, once: bool) -> bool:
    """Coverage by counting how often each element is hit."""
    canvas = np.zeros((20, 20), int)
    for r in found:
        canvas[5 + r.row : 5 + r.row + r.rows, 5 + r.col : 5 + r.col + r.cols] += 1
    inside = canvas[5 : 5 + rows, 5 : 5 + cols]
    if inside.sum() != canvas.sum():
        return False
    return bool((inside == 1).all()) if once else bool((inside >= 1).all())


@FAST
@given(st.lists(rects, max_size=6), SIDE, SIDE, st.booleans())
@example([Rect(0, 0, 2, 2), Rect(0, 0, 2, 2)], 2, 2, True)
@example([Rect(-1, 0, 3, 2)], 2, 2, False)
@example([Rect(0, 0, 1, 2), Rect(1, 0, 1, 2)], 3, 2, True)
def test_covers_any_rectangles(found: list[Rect], rows: int, cols: int, once: bool) -> None:
    assert covers(found, rows, cols, once=once) == painted(found, rows, cols, once=once)


@st.composite
def tilings(draw: st.DrawFn) -> tuple[list[Rect], int, int]:
    """Rectangles that tile a matrix exactly, in any order."""
    rows, cols = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    pieces = [Rect(0, 0, rows, cols)]
    for _ in range(draw(st.integers(0, 6))):
        piece = pieces.pop(draw(st.integers(0, len(pieces) - 1)))
        if draw(st.booleans()) and piece.rows > 1:
            cut = draw(st.integers(1, piece.rows - 1))
            low = Rect(piece.row + cut, piece.col, piece.rows - cut, piece.cols)
            pieces += [piece._replace(rows=cut), low]
        elif piece.cols > 1:
            cut = draw(st.integers(1, piece.cols - 1))
            right = Rect(piece.row, piece.col + cut, piece.rows, piece.cols - cut)
            pieces += [piece._replace(cols=cut), right]
        else:
            pieces.append(piece)
    return draw(st.permutations(pieces)), rows, cols


@FAST
@given(tilings(), st.data())
def test_covers_accepts_a_tiling_and_notices_any_change(
    tiling: tuple[list[Rect], int, int], data: st.DataObject
) -> None:
    pieces, rows, cols = tiling
    assert covers(pieces, rows, cols, once=True)
    assert covers([*pieces, pieces[0]], rows, cols, once=False)
    number = data.draw(st.integers(0, len(pieces) - 1))
    without = pieces[:number] + pieces[number + 1 :]
    piece = pieces[number]
    down, right = data.draw(st.sampled_from([(1, 0), (-1, 0), (0, 1), (0, -1)]))
    moved = piece._replace(row=piece.row + down, col=piece.col + right)
    assert not covers(without, rows, cols, once=True)
    assert not covers(without, rows, cols, once=False)
    assert not covers([*pieces, piece], rows, cols, once=True)
    assert not covers([*without, moved], rows, cols, once=True)

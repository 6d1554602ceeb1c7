"""Two plans, one after the other, as one: where a byte that comes back was read."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from mmconvert.errors import MMConvertError
from mmconvert.plan.plan import Comparison, Copy, Plan
from mmconvert.plan.proof import Rect, covers, prove


def join_plans(there: Plan, back: Plan, number: Sequence[int]) -> Plan:
    """What two plans do one after the other, as one plan.

    Args:
        number: for each source of ``back``, which target of ``there`` it is.

    Raises:
        MMConvertError: bytes that ``back`` reads and ``there`` does not write.
    """
    copied: dict[int, list[Copy]] = defaultdict(list)
    for c in there.copies:
        copied[c.dst].append(c)
    written = defaultdict(lambda: _Written([]), {k: _Written(found) for k, found in copied.items()})
    filled: dict[int, list[Rect]] = defaultdict(list)
    for fill in there.fills:
        filled[fill.tensor].append(Rect(*fill[2:]))
    for zero in back.zeros:
        inside = [_cut(r, Rect(*zero[2:])) for r in filled[number[zero.tensor]]]
        if not covers([r for r in inside if r], zero.rows, zero.cols, once=False):
            raise MMConvertError(f"{zero.key.name()} holds values where zeros are expected")
    copies = [
        found
        for c in back.copies
        for found in _through(written[number[c.src]], c._replace(src=number[c.src]))
    ]
    replicas = [*there.replicas, *_replicas(written, back, number)]
    plan = Plan(there.sources, back.targets, copies, replicas)
    prove(plan)
    return plan


class _Written:
    """The copies into one tensor, found by place along the axis that divides it more."""

    def __init__(self, copies: Sequence[Copy]) -> None:
        rows, columns = ({c.dst_row for c in copies}, {c.dst_col for c in copies})
        self._copies, self._by_rows = copies, len(rows) >= len(columns)
        places = [(c.dst_row, c.rows) if self._by_rows else (c.dst_col, c.cols) for c in copies]
        self._longest = max((length for _, length in places), default=0)
        order = sorted((start, i) for i, (start, _) in enumerate(places))
        self._starts, self._order = [s for s, _ in order], [i for _, i in order]

    def near(self, read: Copy) -> Iterator[Copy]:
        """Those that a read may touch, in the order in which they were planned."""
        start, length = (read.src_row, read.rows) if self._by_rows else (read.src_col, read.cols)
        first = bisect_right(self._starts, start - self._longest)
        last = bisect_left(self._starts, start + length)
        return (self._copies[i] for i in sorted(self._order[first:last]))


def _through(written: _Written, read: Copy) -> Iterator[Copy]:
    """What a read of a written tensor reads in truth."""
    for w in written.near(read):
        row, col = max(w.dst_row, read.src_row), max(w.dst_col, read.src_col)
        rows = min(w.dst_row + w.rows, read.src_row + read.rows) - row
        cols = min(w.dst_col + w.cols, read.src_col + read.cols) - col
        if rows > 0 and cols > 0:
            yield Copy(
                w.src,
                w.src_row + row - w.dst_row,
                w.src_col + col - w.dst_col,
                read.dst,
                read.dst_row + row - read.src_row,
                read.dst_col + col - read.src_col,
                rows,
                cols,
            )


def _replicas(
    written: Mapping[int, _Written], back: Plan, number: Sequence[int]
) -> Iterator[Comparison]:
    """The comparisons of replicas that are not of one and the same bytes."""
    for key, c in back.replicas:
        for one in _through(written[number[c.src]], c._replace(src=number[c.src])):
            other = Copy(
                number[c.dst],
                one.dst_row,
                one.dst_col,
                one.src,
                one.src_row,
                one.src_col,
                one.rows,
                one.cols,
            )
            for both in _through(written[number[c.dst]], other):
                if both[:3] != both[3:6]:
                    yield Comparison(key, both)


def _cut(rect: Rect, frame: Rect) -> Rect | None:
    """The part of a rectangle inside a frame, seen from the frame's corner."""
    row, col = max(rect.row, frame.row), max(rect.col, frame.col)
    rows = min(rect.row + rect.rows, frame.row + frame.rows) - row
    cols = min(rect.col + rect.cols, frame.col + frame.cols) - col
    return Rect(row - frame.row, col - frame.col, rows, cols) if rows > 0 and cols > 0 else None

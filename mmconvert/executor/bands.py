"""Copies cut into bands of rows: what is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mmconvert.plan.plan import Copy


def steps(first: int, last: int, each: int, size: int) -> Iterator[tuple[int, int]]:
    """Rows ``first`` to ``last`` in steps of about ``size`` bytes, ``each`` bytes a row."""
    step = max(1, size // each)
    for top in range(first, last, step):
        yield top, min(top + step, last)


def cut(copies: Sequence[Copy], top: int, bottom: int, *, source: bool) -> list[Copy]:
    """The parts of copies that lie in rows ``top`` to ``bottom`` of the source or target."""
    found: list[Copy] = []
    for c in copies:
        row = c.src_row if source else c.dst_row
        begin, end = max(row, top), min(row + c.rows, bottom)
        if begin < end:
            skip = begin - row
            found.append(
                c._replace(src_row=c.src_row + skip, dst_row=c.dst_row + skip, rows=end - begin)
            )
    return found

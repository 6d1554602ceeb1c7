"""The proof of a plan: every element of every target written once, every source element used."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

from mmconvert.errors import MMConvertError
from mmconvert.plan.dtypes import cast_dtype
from mmconvert.plan.plan import Plan, matrix


def prove(plan: Plan) -> None:
    """Every element of every target is written once, every source element is used.

    Raises:
        MMConvertError: not so; a fault of mmconvert, reported before anything is written.
    """
    reads: dict[int, list[Rect]] = defaultdict(list)
    writes: dict[int, list[Rect]] = defaultdict(list)
    for c in plan.copies:
        reads[c.src].append(Rect(c.src_row, c.src_col, c.rows, c.cols))
        writes[c.dst].append(Rect(c.dst_row, c.dst_col, c.rows, c.cols))
        cast = "" if c.dst in plan.kept else plan.cast
        if plan.targets[c.dst].dtype != cast_dtype(plan.sources[c.src].dtype, cast):
            raise _unproven(f"{plan.targets[c.dst].name} would change its dtype")
    for check in plan.replicas:
        c = check.copy
        reads[c.src].append(Rect(c.src_row, c.src_col, c.rows, c.cols))
        reads[c.dst].append(Rect(c.dst_row, c.dst_col, c.rows, c.cols))
    for fill in plan.fills:
        writes[fill.tensor].append(Rect(*fill[2:]))
    for zero in plan.zeros:
        reads[zero.tensor].append(Rect(*zero[2:]))
    for i, target in enumerate(plan.targets):
        if not covers(writes[i], *matrix(target.shape), once=True):
            raise _unproven(f"not every element of {target.name} is written exactly once")
    for i, source in enumerate(plan.sources):
        if not covers(reads[i], *matrix(source.shape), once=False):
            raise _unproven(f"not every element of {source.name} is used")


def _unproven(what: str) -> MMConvertError:
    return MMConvertError(
        f"the plan is not complete: {what}",
        "a plan that accounts for every element",
        "please report this, with the command and the two config files",
    )


class Rect(NamedTuple):
    """A rectangle of a matrix."""

    row: int
    col: int
    rows: int
    cols: int


def covers(rects: Iterable[Rect], rows: int, cols: int, *, once: bool) -> bool:
    """Whether rectangles fill a matrix: without overlap if ``once``, in any case without gap
    and without reaching outside.
    """
    found = [r for r in rects if r.rows and r.cols]
    if not rows or not cols:
        return not found
    if len(found) == 1:  # most tensors are copied whole
        return found[0] == (0, 0, rows, cols)
    if any(r.row < 0 or r.col < 0 or r.row + r.rows > rows for r in found):
        return False
    cuts = sorted({0, cols, *(r.col for r in found), *(r.col + r.cols for r in found)})
    if cuts[-1] > cols:
        return False
    # Between two neighbouring cuts each rectangle is as wide as the strip: a problem of rows.
    for left, right in pairwise(cuts):
        end = 0
        for r in sorted(r for r in found if r.col <= left and r.col + r.cols >= right):
            if r.row > end or (once and r.row < end):
                return False
            end = max(end, r.row + r.rows)
        if end != rows:
            return False
    return True

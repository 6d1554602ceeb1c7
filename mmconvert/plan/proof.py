"""The proof of a plan: every element of every target written once, every source element used."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from mmconvert.errors import MMConvertError
from mmconvert.plan.dtypes import cast_dtype
from mmconvert.plan.plan import Plan, Term, matrix

MOST_KEPT = 64  # rectangles of a matrix that are remembered with what came of them


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
    for check in plan.replicas:
        c = check.copy
        reads[c.src].append(Rect(c.src_row, c.src_col, c.rows, c.cols))
        reads[c.dst].append(Rect(c.dst_row, c.dst_col, c.rows, c.cols))
    for fill in plan.fills:
        writes[fill.tensor].append(Rect(*fill[2:]))
    for zero in [*plan.zeros, *plan.replaced]:
        reads[zero.tensor].append(Rect(*zero[2:]))
    _prove_dtypes(plan)
    _prove_products(plan, reads)
    for i, target in enumerate(plan.targets):
        if not covers(writes[i], *matrix(target.shape), once=True):
            raise _unproven(f"not every element of {target.name} is written exactly once")
    for i, source in enumerate(plan.sources):
        if not covers(reads[i], *matrix(source.shape), once=False):
            raise _unproven(f"not every element of {source.name} is used")


def _prove_dtypes(plan: Plan) -> None:
    """No dtype changes but by the cast that was asked for."""
    for c in plan.copies:
        cast = "" if c.dst in plan.kept else plan.cast
        if c.src in plan.fitted:
            continue
        if plan.targets[c.dst].dtype != cast_dtype(plan.sources[c.src].dtype, cast):
            raise _unproven(f"{plan.targets[c.dst].name} would change its dtype")


def _prove_products(plan: Plan, reads: dict[int, list[Rect]]) -> None:
    """Every element of every product is added somewhere, and to no target twice.

    Args:
        reads: receives what the products are made of.
    """
    added: dict[int, list[Rect]] = defaultdict(list)
    once: dict[tuple[int, int], list[Rect]] = defaultdict(list)
    for c in plan.products:
        added[c.src].append(Rect(c.src_row, c.src_col, c.rows, c.cols))
        once[c.src, c.dst].append(Rect(c.dst_row, c.dst_col, c.rows, c.cols))
        rows, cols = matrix(plan.targets[c.dst].shape)
        if c.dst_row + c.rows > rows or c.dst_col + c.cols > cols:
            raise _unproven(f"a product reaches outside {plan.targets[c.dst].name}")
    for number, term in enumerate(plan.terms):
        if not covers(added[number], *term.shape, once=False):
            raise _unproven(f"not every element of the adapter of {term.name} is added")
        _prove_term(term, reads)
    for (_, target), rects in once.items():
        if overlap(rects):
            raise _unproven(f"a product is added to {plan.targets[target].name} twice")


def _prove_term(term: Term, reads: dict[int, list[Rect]]) -> None:
    """A and B are whole."""
    both = ((term.a, term.rank, term.cols), (term.b, term.rows, term.rank))
    for blocks, rows, cols in both if term.a else both[1:]:
        wholes = [Rect(b.whole_row, b.whole_col, b.rows, b.cols) for b in blocks]
        if not covers(wholes, rows, cols, once=True):
            raise _unproven(f"the adapter of {term.name} is not whole")
        for b in blocks:
            reads[b.tensor].append(Rect(b.row, b.col, b.rows, b.cols))
    if term.magnitude >= 0:
        reads[term.magnitude].append(Rect(0, 0, term.rows, 1))


def overlap(rects: list[Rect]) -> bool:
    """Whether two of some rectangles share an element."""
    listed = sorted(rects)
    tallest = max((r.rows for r in listed), default=0)
    for number, r in enumerate(listed):
        for other in listed[number + 1 :]:
            if other.row >= r.row + tallest:
                break
            below = other.row < r.row + r.rows
            if below and other.col < r.col + r.cols and r.col < other.col + other.cols:
                return True
    return False


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
    found = tuple([r for r in rects if r[2] and r[3]])
    if not rows or not cols:
        return not found
    if len(found) == 1:  # most tensors are copied whole
        return found[0] == (0, 0, rows, cols)
    if len(found) <= MOST_KEPT:
        return _covers_again(found, rows, cols, once)
    return _covers(found, rows, cols, once)


def _covers(found: tuple[Rect, ...], rows: int, cols: int, once: bool) -> bool:
    if any(r.row < 0 or r.col < 0 or r.row + r.rows > rows for r in found):
        return False
    cuts = sorted({0, cols, *(r.col for r in found), *(r.col + r.cols for r in found)})
    if cuts[-1] > cols:
        return False
    for strip in _strips(found, cuts):
        end = 0
        for r in sorted(strip):
            if r.row > end or (once and r.row < end):
                return False
            end = max(end, r.row + r.rows)
        if end != rows:
            return False
    return True


_covers_again = lru_cache(maxsize=256)(_covers)  # the layers of a model are alike


def _strips(rects: Sequence[Rect], cuts: Sequence[int]) -> list[list[Rect]]:
    """The rectangles between each two neighbouring cuts, where each is as wide as the strip: a
    problem of rows.
    """
    places = {cut: number for number, cut in enumerate(cuts)}
    strips: list[list[Rect]] = [[] for _ in cuts[1:]]
    for r in rects:
        for strip in strips[places[r.col] : places[r.col + r.cols]]:
            strip.append(r)
    return strips

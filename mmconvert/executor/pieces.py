"""Targets that do not lie in one run of their file, cut into pieces that do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from mmconvert.plan.plan import Copy, Plan, Zeros, matrix
from mmconvert.plan.proof import prove
from mmconvert.stored import StoredTensor, Target

if TYPE_CHECKING:
    from mmconvert.formats.containers.ckpt_layout import Rectangle


class Pieces(NamedTuple):
    """A plan whose targets are plain, and where each lies."""

    plan: Plan
    places: Sequence[StoredTensor]


def in_pieces(plan: Plan, places: Sequence[StoredTensor]) -> Pieces:
    """The same bytes to the same places, as a plan of targets that lie in one run each.

    Args:
        places: where each of the plan's targets lies, in their order.

    Raises:
        MMConvertError: the pieces do not tile the targets; a fault of mmconvert.
    """
    if not any(place.extents for place in places):
        return Pieces(plan, places)
    from mmconvert.formats.containers.ckpt_layout import rectangles  # of MindSpore's files alone

    targets: list[Target] = []
    plain: list[StoredTensor] = []
    cuts: list[list[tuple[int, Rectangle]]] = []
    for target, place in zip(plan.targets, places, strict=True):
        cut = rectangles(place)
        cuts.append([(len(plain) + i, piece) for i, piece in enumerate(cut)])
        plain += [piece.stored for piece in cut]
        targets += [target._replace(shape=piece.stored.shape) for piece in cut]
    copies: list[Copy] = []
    for copy in plan.copies:
        whole = (copy.dst_row, copy.dst_col, copy.rows, copy.cols)
        for number, row, col, rows, cols, down, right in _meet(cuts[copy.dst], whole):
            src = (copy.src_row + down, copy.src_col + right)
            copies.append(Copy(copy.src, *src, number, row, col, rows, cols))
    fills = [
        Zeros(fill.key, *found[:5])
        for fill in plan.fills
        for found in _meet(cuts[fill.tensor], fill[2:])
    ]
    cut_plan = replace(plan, targets=targets, copies=copies, fills=fills)
    prove(cut_plan)
    return Pieces(cut_plan, plain)


def _meet(
    cuts: Sequence[tuple[int, Rectangle]], expected: Sequence[int]
) -> list[tuple[int, int, int, int, int, int, int]]:
    """Where a rectangle of a target meets its pieces.

    Returns:
        for each piece met: its number, row and column in it, rows, columns, and how far down and
        right of the rectangle's own corner that is.
    """
    row, col, rows, cols = expected
    found: list[tuple[int, int, int, int, int, int, int]] = []
    for number, piece in cuts:
        height, width = matrix(piece.stored.shape)
        top, left = max(row, piece.row), max(col, piece.col)
        bottom = min(row + rows, piece.row + height)
        right = min(col + cols, piece.col + width)
        if top < bottom and left < right:
            inside = (top - piece.row, left - piece.col)
            size = (bottom - top, right - left)
            found.append((number, *inside, *size, top - row, left - col))
    return found

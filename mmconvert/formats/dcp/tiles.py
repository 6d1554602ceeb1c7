"""Whether pieces of a tensor, rectangles of any number of dimensions, fill it exactly once."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from mmconvert.plan.proof import Rect, covers

Tile = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes


def tile(pieces: Sequence[Tile], shape: tuple[int, ...]) -> bool:
    """Whether pieces fill a shape exactly once.

    What is cut along at most two dimensions is a matrix of these. Cut along more, every piece must
    be one cell of a grid, as tensor-parallel layers stacked in one tensor are.
    """
    if not all(
        start + size <= length
        for offsets, sizes in pieces
        for start, size, length in zip(offsets, sizes, shape, strict=True)
    ):
        return False
    pieces = [piece for piece in pieces if prod(piece[1])]
    if sum(prod(sizes) for _, sizes in pieces) != prod(shape):
        return False
    cut = [d for d, n in enumerate(shape) if any(sizes[d] != n for _, sizes in pieces)]
    if len(cut) <= 2:
        rows, cols = (*cut, -1, -1)[:2]
        rects = [_rect(piece, rows, cols) for piece in pieces]
        return covers(rects, _at(shape, rows, 1), _at(shape, cols, 1), once=True)
    steps: list[dict[int, int]] = [{} for _ in shape]
    for offsets, sizes in pieces:
        for found, start, size in zip(steps, offsets, sizes, strict=True):
            if found.setdefault(start, size) != size:
                return False
    cells = prod(len(found) for found in steps)
    return len({offsets for offsets, _ in pieces}) == len(pieces) == cells


def _rect(piece: Tile, rows: int, cols: int) -> Rect:
    offsets, sizes = piece
    return Rect(
        _at(offsets, rows, 0), _at(offsets, cols, 0), _at(sizes, rows, 1), _at(sizes, cols, 1)
    )


def _at(values: tuple[int, ...], dim: int, default: int) -> int:
    return values[dim] if dim >= 0 else default

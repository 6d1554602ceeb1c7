"""Sides whose tensors are stored in rectangles of their own: blocks lead to these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import prod

from mmconvert.plan.build import join
from mmconvert.plan.plan import Block, Side, Whole, matrix
from mmconvert.stored import StoredTensor


def in_parts(side: Side) -> Side:
    """The side with the parts of its tensors in their place; see ``StoredTensor.parts``."""
    if not any(tensor.parts for tensor in side.stored):
        return side
    stored: list[StoredTensor] = []
    blocks: list[list[Block]] = []
    for tensor in side.stored:
        blocks.append(_blocks(tensor, len(stored)))
        stored += [part.tensor for part in tensor.parts] or [tensor]
    wholes = {
        key: replace(whole, copies=[_through(copy, blocks) for copy in whole.copies])
        for key, whole in side.wholes.items()
    }
    return replace(side, stored=stored, wholes=wholes)


def whole_of(tensor: StoredTensor, first: int) -> Whole:
    """A tensor as a whole by itself; its parts, or itself, are numbered from ``first``."""
    return Whole(tensor.shape, tensor.dtype, [_blocks(tensor, first)])


def _blocks(tensor: StoredTensor, first: int) -> list[Block]:
    """The parts of a tensor, numbered, as rectangles of it."""
    if not tensor.parts:
        return [Block(first, 0, 0, 0, 0, *matrix(tensor.shape))]
    return [
        block
        for number, (start, part) in enumerate(tensor.parts, first)
        for block in _rectangles(tensor.shape, start, part.shape, number)
    ]


def _rectangles(
    shape: tuple[int, ...], start: tuple[int, ...], sizes: tuple[int, ...], number: int
) -> Iterator[Block]:
    """A part as rectangles of rows and columns: one, unless it is cut behind the second dimension,
    as layers in one tensor are that are each divided by columns.
    """
    if len(shape) < 2:
        yield Block(number, 0, 0, start[0] if start else 0, 0, *matrix(sizes))
        return
    cut = [d for d in range(1, len(shape)) if sizes[d] != shape[d]]
    last = cut[-1] if cut else 1
    width = prod(sizes[last:])
    for place, inner in enumerate(product(*map(range, sizes[1:last]))):
        column = 0
        for at, begin, length in zip((*inner, 0), start[1:], shape[1:], strict=False):
            column = column * length + begin + at
        column *= prod(shape[last + 1 :])
        yield Block(number, 0, place * width, start[0], column, sizes[0], width)


def _through(copy: list[Block], blocks: list[list[Block]]) -> list[Block]:
    """Blocks on tensors as blocks on the parts of these."""
    found: list[Block] = []
    for block in copy:
        # The rectangle of the tensor is where the two meet, as a whole is between two sides.
        seen = Block(block.tensor, block.whole_row, block.whole_col, *block[1:3], *block[5:])
        found += [
            Block(c.src, c.src_row, c.src_col, c.dst_row, c.dst_col, c.rows, c.cols)
            for c in join(blocks[block.tensor], [seen])
        ]
    return found

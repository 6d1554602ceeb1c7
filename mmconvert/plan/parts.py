"""Sides whose tensors are stored in rectangles of their own: blocks lead to these."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from mmconvert.errors import TensorError
from mmconvert.plan.plan import Block, Side, Whole, join, matrix
from mmconvert.stored import StoredTensor


def in_parts(side: Side) -> Side:
    """The side with the parts of its tensors in their place; see ``StoredTensor.parts``.

    Raises:
        TensorError: a part that is no rectangle of rows and columns.
    """
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
    found: list[Block] = []
    for number, (start, part) in enumerate(tensor.parts, first):
        if part.shape[2:] != tensor.shape[2:]:
            raise TensorError(
                f"{tensor.name} {list(tensor.shape)} is divided along dimension 2 or a later one",
                "pieces that are whole from the third dimension on",
                "save it in other pieces",
            )
        row = start[0] if start else 0
        col = start[1] * prod(tensor.shape[2:]) if len(start) > 1 else 0
        found.append(Block(number, 0, 0, row, col, *matrix(part.shape)))
    return found


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

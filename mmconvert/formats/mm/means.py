"""Copies of an adapter's matrices that differ between ranks, and their mean.

Training with sequence parallelism may leave them so: each rank learns from its own part of the
sequence, and nothing sums the gradients of what is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mmconvert.executor.compare import compare
from mmconvert.executor.differences import in_words
from mmconvert.plan.build import join
from mmconvert.plan.plan import (
    Block,
    Comparison,
    Key,
    Scaled,
    Side,
    Term,
    UnstoredBlock,
    Whole,
    matrix,
)


def differing(side: Side) -> dict[Key, str]:
    """The wholes whose copies differ, and how, in words."""
    found: dict[Key, str] = {}
    for key, whole in side.wholes.items():
        original, *others = whole.copies
        pairs = [Comparison(key, c) for blocks in others for c in join(original, blocks)]
        differences = compare(pairs, side.stored, side.stored, 1) if pairs else []
        if differences:
            found[key] = in_words(differences[0])
    return found


def mean_note(found: dict[Key, str]) -> list[str]:
    """A warning that means were taken."""
    if not found:
        return []
    more = f"; {len(found) - 1} more tensors differ" if len(found) > 1 else ""
    first = next(iter(found.values()))
    return [f"warning: copies of one tensor differ: {first}{more}; their mean is taken"]


def averaged(side: Side) -> tuple[Side, list[str]]:
    """A side in which copies that differ are one whole, their mean in float32; and a note of it."""
    found = differing(side)
    new = replace(side, wholes=dict(side.wholes), scaled=list(side.scaled))
    for key in found:
        whole = side.wholes[key]
        for blocks in whole.copies:
            new.scaled += [_part(key, side, b, len(whole.copies)) for b in blocks]
        new.wholes[key] = _empty(whole, whole.copies[0])
    return new, mean_note(found)


def _part(key: Key, side: Side, block: Block, count: int) -> Scaled:
    """One rectangle of a copy, by its share in the mean."""
    rows, cols = matrix(side.stored[block.tensor].shape)
    name = side.stored[block.tensor].name
    term = Term(
        name, (), (Block(block.tensor, 0, 0, 0, 0, rows, cols),), cols, rows, cols, 1 / count
    )
    return Scaled(key, term, [block])


def _empty(whole: Whole, blocks: Sequence[Block]) -> Whole:
    zeros = [UnstoredBlock(b.whole_row, b.whole_col, b.rows, b.cols) for b in blocks]
    return replace(whole, copies=[[]], zeros=[*whole.zeros, *zeros])

"""Experts of an MM checkpoint: transposed ones, and those that stand twice."""

from __future__ import annotations

from mmconvert.errors import TensorError
from mmconvert.formats.faults import Collected
from mmconvert.formats.mm.source import TRANSPOSED
from mmconvert.names import number, summarise


def told_as_one(found: Collected) -> None:
    """Puts one fault in the place of those of all experts that stand the other way round."""
    each = [error for error in found.errors if error.cause == TRANSPOSED]
    if len(each) < 2:
        return
    names = [name for error in each for name in error.tensors]
    fault = TensorError(
        f"{number(names, 'tensor')} of experts are transposed, as the reference's converter "
        f"writes stacks of transformers 5: {summarise(names)}",
        each[0].expected,
        each[0].fix,
        cause=TRANSPOSED,
        path=each[0].path,
        tensors=names,
    )
    found.errors[:] = [fault, *(error for error in found.errors if error not in each)]

"""The flat buffers of Megatron's distributed optimizer: where each parameter lies in them.

A buffer holds the parameters of one dtype in reverse order, each from a multiple of 64 elements on.
It is cut into buckets that begin at multiples of 128; in the file they follow each other without
that padding. Source: ``_ParamAndGradBuffer`` and ``get_parameter_state_dp_zero`` of Megatron-Core
0.12.1. How many data-parallel ranks share a buffer makes no difference to the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from mmconvert.formats.mm.optimizer.state import Buckets

PARAMETER, BUCKET = 64, 128  # elements
USUAL_BUCKET = 40_000_000  # elements, up to 40 data-parallel ranks
MOST_GUESSES = 6  # places where a bucket may or may not end, of which all combinations are tried


class BufferPlaces(NamedTuple):
    """Where parameters begin in the file, in elements, and how many elements that has."""

    starts: tuple[int, ...]
    total: int


def padded(number: int, divisor: int) -> int:
    """The next multiple."""
    return -(-number // divisor) * divisor


def places(sizes: Sequence[int], shared: Sequence[bool], buckets: Buckets) -> BufferPlaces:
    """Where a run with these buckets has its parameters.

    Args:
        sizes: elements of each parameter, in the order of the buffer.
        shared: whether each is an embedding that two stages share.
    """
    starts: list[int] = []
    base = 0  # where the bucket begins in the file
    begin = at = 0  # where the bucket and the parameter begin in the buffer
    filled = False
    for size, alone in zip(sizes, shared, strict=True):
        at = padded(at, PARAMETER)
        alone = alone and buckets.shared
        if alone and filled:
            base += at - begin
            at = begin = padded(at, BUCKET)
        starts.append(base + at - begin)
        at, filled = at + size, True
        if alone or (buckets.size and at - begin >= buckets.size):
            base += at - begin
            at = begin = padded(at, BUCKET)
            filled = False
    return BufferPlaces(tuple(starts), base + at - begin)


def observed(
    starts: Sequence[int], sizes: Sequence[int], shared: Sequence[bool], total: int
) -> list[BufferPlaces]:
    """Where parameters lie in the file, by where they begin in the buffer itself.

    A bucket certainly ends where the next parameter begins later than it could; where it may, both
    are tried. It ends with its last parameter, but before a shared embedding where that could
    begin.

    Args:
        starts: of each parameter in the buffer, in elements.
        total: what the file must have; what does not is left out.
    """
    cuts: list[tuple[int, ...]] = []  # what each gap may take away
    guesses = 0
    for start, size, after, alone in zip(starts, sizes, starts[1:], shared[1:], strict=False):
        end = start + size
        near = padded(end, PARAMETER)
        gaps = {0} if after == near else {after - end, after - near} if alone else {after - end}
        if after == near != end and after % BUCKET == 0 and not alone and guesses < MOST_GUESSES:
            gaps |= {after - end}
            guesses += 1
        cuts.append(tuple(sorted(gaps)))
    found: dict[BufferPlaces, None] = {}
    for chosen in product(*cuts):
        gone, mine = starts[0], [0]
        for start, cut in zip(starts[1:], chosen, strict=True):
            gone += cut
            mine.append(start - gone)
        made = BufferPlaces(tuple(mine), mine[-1] + sizes[-1])
        if made.total == total:
            found[made] = None
    return list(found)

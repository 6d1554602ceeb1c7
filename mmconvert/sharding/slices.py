"""How MindSpore slices a tensor over devices: integers only.

Devices form a matrix, such as [data parallel, model parallel]; a rank's coordinates in it are
those of its number in row-major order. Each dimension of a tensor is split over one axis of
that matrix, over several, or over none; the optimizer may split the first dimension once more
over the devices that would hold the same slice. Sources: ``mindspore/parallel/_tensor.py`` and
``_parallel_serialization.py`` of MindSpore 2.7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import NamedTuple

from mmconvert.errors import LayoutError
from mmconvert.sharding.spans import Span

WHOLE = -1  # in a tensor map: the dimension is not split; as optimizer size: all repetitions


@dataclass(frozen=True)
class Slicing:
    """How one tensor is sliced.

    Attributes:
        devices: the device matrix.
        axes: for each dimension of the tensor the axes of the matrix over which it is split,
            outermost first, counted from the last axis of the matrix (0); none: not split.
        optimizer: over how many devices the first dimension of a slice is split once more: 0 or
            1 for none, -1 for all that hold the same slice.
    """

    devices: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    optimizer: int = 0

    @property
    def ranks(self) -> int:
        """Number of devices."""
        return prod(self.devices)

    def check(self, rank: int, name: str) -> None:
        """Raises LayoutError unless this is a way to slice a tensor of ``rank`` dimensions."""
        used = [axis for axes in self.axes for axis in axes]
        if not self.devices or any(size < 1 for size in self.devices):
            raise LayoutError(f"{name}: the device matrix is {list(self.devices)}", "sizes from 1")
        if any(not 0 <= axis < len(self.devices) for axis in used) or len(set(used)) < len(used):
            raise LayoutError(
                f"{name}: the tensor map names the axes {used} of {len(self.devices)}",
                "each axis of the device matrix at most once",
            )
        if len(self.axes) != rank and (used or rank):
            raise LayoutError(
                f"{name} has {rank} dimensions, its tensor map {len(self.axes)}",
                "a strategy file of this model",
            )
        if self.optimizer < WHOLE or self.repeated % max(self.optimizer, 1):
            raise LayoutError(
                f"{name}: the optimizer splits over {self.optimizer} devices, and "
                f"{self.repeated} hold the same slice",
                f"a number that divides {self.repeated}",
            )

    def parts(self, dim: int) -> int:
        """Into how many parts the tensor map splits a dimension."""
        return prod(self.devices[-1 - axis] for axis in self.axes[dim])

    @property
    def repeated(self) -> int:
        """How many devices hold the same slice, before the optimizer splits it."""
        return self.ranks // prod(self.parts(dim) for dim in range(len(self.axes)))

    @property
    def optimizer_parts(self) -> int:
        """Into how many parts the optimizer splits the first dimension of a slice."""
        if not self.axes:
            return 1
        return self.repeated if self.optimizer == WHOLE else max(self.optimizer, 1)

    @property
    def copies(self) -> int:
        """How many devices hold the same slice in the end."""
        return self.repeated // self.optimizer_parts

    def box(self, shape: Sequence[int], rank: int, name: str = "tensor") -> tuple[Span, ...]:
        """What a rank holds of a tensor: a span of each dimension.

        Args:
            shape: of the whole tensor.
            rank: number of the device; only its remainder by the number of devices counts.
            name: of the tensor, for messages.

        Raises:
            LayoutError: a dimension that does not divide, or a slicing that cannot be.
        """
        self.check(len(shape), name)
        places = self._coordinates(rank % self.ranks)
        found: list[Span] = []
        for dim, length in enumerate(shape):
            parts, index = self.parts(dim), 0
            for axis in self.axes[dim]:
                index = index * self.devices[-1 - axis] + places[-1 - axis]
            if dim == 0 and self.optimizer_parts > 1:
                index = index * self.optimizer_parts + self._repetition(places)
                parts *= self.optimizer_parts
            if length % parts:
                raise LayoutError(
                    f"{name}: dimension {dim} of {list(shape)} does not divide into {parts} parts",
                    f"a layout whose sizes divide {length}",
                )
            step = length // parts
            found.append(Span(0, index * step, step))
        return tuple(found)

    def _coordinates(self, rank: int) -> list[int]:
        found: list[int] = []
        for size in reversed(self.devices):
            rank, place = divmod(rank, size)
            found.insert(0, place)
        return found

    def _repetition(self, places: Sequence[int]) -> int:
        """Which part of its slice the optimizer gives to these coordinates: the axes that the
        tensor does not use, the last one fastest.
        """
        used = {len(self.devices) - 1 - axis for axes in self.axes for axis in axes}
        index = 0
        for number, (size, place) in enumerate(zip(self.devices, places, strict=True)):
            if number not in used:
                index = index * size + place
        return index % self.optimizer_parts


class SlicePart(NamedTuple):
    """Columns of a slice beside the columns of the whole that they are, both as matrices: all
    ``rows`` rows of the slice are those of the whole from ``whole_row`` on.
    """

    col: int
    whole_row: int
    whole_col: int
    rows: int
    cols: int


def slice_parts(box: Sequence[Span], shape: Sequence[int]) -> list[SlicePart]:
    """A slice of a tensor as rectangles, both seen as matrices (rows: the first dimension).

    One rectangle, unless a dimension behind the second one is split.
    """
    if not shape:
        return [SlicePart(0, 0, 0, 1, 1)]
    inner, sizes = list(box[1:]), list(shape[1:])
    whole = len(inner)  # from this dimension on nothing is split
    while whole and inner[whole - 1].length == sizes[whole - 1]:
        whole -= 1
    # The last split dimension makes runs together with everything behind it.
    split = max(whole - 1, 0)
    tail = prod(sizes[split + 1 :])
    run = (inner[split].length if inner else 1) * tail
    offset = (inner[split].whole if inner else 0) * tail
    strides = [prod(sizes[i + 1 :]) for i in range(split)]
    found: list[SlicePart] = []
    for place in product(*(range(s.whole, s.whole + s.length) for s in inner[:split])):
        start = offset + sum(p * s for p, s in zip(place, strides, strict=True))
        found.append(SlicePart(len(found) * run, box[0].whole, start, box[0].length, run))
    return found

"""Where a tensor lies, or is to lie: what all formats share with the plan and the executor."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

from mmconvert.errors import TensorError
from mmconvert.sharding.layout import Chunk

# Bytes per element, by the safetensors spelling of a dtype (safetensors format documentation).
ITEM_SIZE: dict[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}
# In a plan alone: F8_E4M3 with a scale for each block, which is written as another dtype only.
SCALED = "F8_E4M3*"
ITEM_SIZE[SCALED] = 1


TRANSPOSED = ".T"  # behind the name of a matrix that is seen the other way round
FLOATS = frozenset({"F16", "BF16", "F32", "F64"})  # what a cast may change


class Extent(NamedTuple):
    """A run of a tensor's bytes that lies in one piece of its file.

    Attributes:
        start: of the tensor's bytes in row-major order, the first one that lies here.
        offset: absolute byte offset in the file where it lies.
        nbytes: length of the run.
    """

    start: int
    offset: int
    nbytes: int


class Scales(NamedTuple):
    """The scales of a tensor in fp8: one for each block of its last two dimensions.

    Attributes:
        tensor: the scales, with the dimensions of what they scale.
        rows, cols: of a block; those at the ends may be smaller.
    """

    tensor: StoredTensor
    rows: int
    cols: int


class StoredPart(NamedTuple):
    """A rectangle of a tensor that is stored in several, which may lie in different files.

    Attributes:
        start: index of its first element in the tensor, one number for each dimension.
        tensor: as it is stored.
    """

    start: tuple[int, ...]
    tensor: StoredTensor


class StoredTensor(NamedTuple):
    """One tensor as it is stored.

    Attributes:
        name: the tensor's name in its checkpoint.
        dtype: safetensors spelling, a key of :data:`ITEM_SIZE`.
        shape: the tensor's shape; ``()`` for a scalar.
        path: the file that holds the data.
        offset: absolute byte offset in the file of element ``[0, 0, ...]``.
        strides: strides in *elements*, or None for a contiguous (row-major) tensor.
        extents: where the bytes lie, in order and without gaps, if the file holds them in
            several pieces, which may be cut anywhere; else empty. Such a tensor has the strides
            of a contiguous one, not None: its bytes are not one run of the file.
        scales: of a tensor whose dtype is SCALED.
        parts: what it is made of, if it is no tensor of any file but several that tile it; it
            has no bytes of its own then.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    strides: tuple[int, ...] | None = None
    extents: tuple[Extent, ...] = ()
    scales: Scales | None = None
    parts: tuple[StoredPart, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's elements (not of the storage behind a view)."""
        return prod(self.shape) * ITEM_SIZE[self.dtype]


def transpose(tensor: StoredTensor) -> StoredTensor:
    """A matrix seen the other way round: the same bytes, rows and columns exchanged. Its name
    says so, as places in it are told by row and column.

    Raises:
        TensorError: no matrix.
    """
    if len(tensor.shape) != 2:
        raise TensorError(
            f"{tensor.name} in {tensor.path} has the shape {list(tensor.shape)}", "two dimensions"
        )
    rows, cols = tensor.shape
    down, right = tensor.strides or (cols, 1)
    seen = tensor.name.endswith(TRANSPOSED)
    name = tensor.name.removesuffix(TRANSPOSED) if seen else tensor.name + TRANSPOSED
    strides = None if (right, down) == (rows, 1) and not tensor.extents else (right, down)
    scales = tensor.scales and Scales(
        transpose(tensor.scales.tensor), tensor.scales.cols, tensor.scales.rows
    )
    parts = tuple(StoredPart(part.start[::-1], transpose(part.tensor)) for part in tensor.parts)
    return tensor._replace(
        name=name, shape=(cols, rows), strides=strides, scales=scales, parts=parts
    )


def transpose_each(tensor: StoredTensor) -> StoredTensor:
    """A stack of matrices, each seen the other way round."""
    count, rows, cols = tensor.shape
    outer, down, right = tensor.strides or (rows * cols, cols, 1)
    parts = tuple(StoredPart((s[0], s[2], s[1]), transpose_each(part)) for s, part in tensor.parts)
    return tensor._replace(shape=(count, cols, rows), strides=(outer, right, down), parts=parts)


def expert_of(tensor: StoredTensor, expert: int) -> StoredTensor:
    """One expert of a tensor that stacks them along its first dimension; its name says which."""
    strides = tensor.strides or tuple(prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape)))
    return tensor._replace(
        name=f"{tensor.name}[{expert}]",
        shape=tensor.shape[1:],
        offset=tensor.offset + expert * strides[0] * ITEM_SIZE[tensor.dtype],
        strides=None if tensor.strides is None else strides[1:],
        scales=tensor.scales
        and tensor.scales._replace(tensor=expert_of(tensor.scales.tensor, expert)),
        parts=tuple(
            StoredPart(start[1:], expert_of(part, expert - start[0]))
            for start, part in tensor.parts
            if start[0] <= expert < start[0] + part.shape[0]
        ),
    )


def below(first: StoredTensor, second: StoredTensor) -> StoredTensor:
    """Two tensors as one, the second below the first, under the name of the first.

    Raises:
        TensorError: of different widths or dtypes.
    """
    if first.dtype != second.dtype or first.shape[1:] != second.shape[1:] or not first.shape:
        raise TensorError(
            f"{first.name} is {first.dtype} {list(first.shape)}, {second.name} {second.dtype} "
            f"{list(second.shape)}",
            "two parts of one tensor",
        )
    parts: list[StoredPart] = []
    for tensor, top in ((first, 0), (second, first.shape[0])):
        own = (StoredPart((0,) * len(tensor.shape), tensor),)
        for start, part in tensor.parts or own:
            parts.append(StoredPart((top + start[0], *start[1:]), part))
    shape = (first.shape[0] + second.shape[0], *first.shape[1:])
    return StoredTensor(first.name, first.dtype, shape, first.path, 0, parts=tuple(parts))


def rows_of(tensor: StoredTensor, first: int, count: int) -> StoredTensor:
    """Some rows of a tensor, under its own name."""
    strides = tensor.strides or (prod(tensor.shape[1:]),)
    last = first + count
    parts = [
        StoredPart(
            (max(start[0] - first, 0), *start[1:]),
            rows_of(part, max(first - start[0], 0), _overlap(first, last, start[0], part)),
        )
        for start, part in tensor.parts
        if _overlap(first, last, start[0], part) > 0
    ]
    return tensor._replace(
        shape=(count, *tensor.shape[1:]),
        offset=tensor.offset + first * strides[0] * ITEM_SIZE[tensor.dtype],
        parts=tuple(parts),
    )


def _overlap(first: int, last: int, start: int, part: StoredTensor) -> int:
    return min(last, start + part.shape[0]) - max(first, start)


def stacked(tensor: StoredTensor, count: int) -> StoredTensor:
    """A matrix that holds ``count`` equal matrices one below the other, as a stack of them."""
    rows, cols = tensor.shape[0] // count, tensor.shape[1]
    strides = None
    if tensor.strides is not None:
        strides = (rows * tensor.strides[0], *tensor.strides)
    parts = [
        StoredPart((number, max(start[0] - number * rows, 0), start[1]), one)
        for start, part in tensor.parts
        for number, one in _cut(part, start[0], rows)
    ]
    return tensor._replace(shape=(count, rows, cols), strides=strides, parts=tuple(parts))


def _cut(part: StoredTensor, start: int, rows: int) -> Iterator[tuple[int, StoredTensor]]:
    """The rows of a part, from row ``start`` of the whole on, by the matrix that they are of."""
    for number in range(start // rows, (start + part.shape[0] - 1) // rows + 1):
        first, last = max(number * rows, start), min((number + 1) * rows, start + part.shape[0])
        one = rows_of(part, first - start, last - first)
        strides = None if one.strides is None else (0, *one.strides)
        yield number, one._replace(shape=(1, *one.shape), strides=strides)


class Target(NamedTuple):
    """A tensor to be written.

    Attributes:
        name, dtype, shape: as a plan sees it.
        chunk: its place in an MM checkpoint; None in HF.
        stack: its shape in the file, if that stacks experts along a first dimension; ``shape``
            then has their rows one below the other. Else empty.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunk: Chunk | None = None
    stack: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * ITEM_SIZE[self.dtype]

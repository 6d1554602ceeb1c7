"""Where a tensor lies, or is to lie: what all formats share with the plan and the executor."""

from __future__ import annotations

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
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    strides: tuple[int, ...] | None = None
    extents: tuple[Extent, ...] = ()
    scales: Scales | None = None

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
    return tensor._replace(name=name, shape=(cols, rows), strides=strides, scales=scales)


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
    )


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

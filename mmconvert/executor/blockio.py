"""Rectangles of stored tensors, read into buffers: rows and columns, whatever the strides."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Literal, NamedTuple

from mmconvert.errors import CheckpointError
from mmconvert.executor.fileio import BUFFERS, Files, read_pieces
from mmconvert.plan.plan import matrix
from mmconvert.stored import ITEM_SIZE, StoredTensor, Target

DIRECT_ROW = 64 << 10  # bytes; row pieces at least this long are read on their own
MOST_SKIPPED = 16  # times the bytes expected that are read along with them rather than seeked over
# The memoryview format that holds the bits of one element, by its size.
INTEGER: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}


class Region(NamedTuple):
    """Rows and columns of a stored tensor, seen as a matrix."""

    row: int
    col: int
    rows: int
    cols: int


class Window(NamedTuple):
    """Where rows lie in a buffer: the first at byte ``at``, each next one ``stride`` bytes on."""

    buffer: memoryview
    at: int
    stride: int

    def row(self, number: int, width: int) -> memoryview:
        """The first ``width`` bytes of one row."""
        at = self.at + number * self.stride
        return self.buffer[at : at + width]

    def pieces(self, rows: int, width: int) -> list[memoryview]:
        """The first ``width`` bytes of each row; one piece where the rows lie in one."""
        if self.stride == width or rows == 1:
            return [self.row(0, rows * width)]
        return [self.row(r, width) for r in range(rows)]


def read_compact(files: Files, tensor: StoredTensor, region: Region, use: str) -> memoryview:
    """The region's bits row by row, in this thread's buffer of that ``use``."""
    width = region.cols * ITEM_SIZE[tensor.dtype]
    buffer = BUFFERS.get(use, region.rows * width)
    read_region(files, tensor, region, Window(buffer, 0, width))
    return buffer


def read_region(files: Files, tensor: StoredTensor, region: Region, window: Window) -> None:
    """Reads a region of a stored tensor into the rows of a window.

    Raises:
        CheckpointError: the file cannot be read, ends before, or holds a view too scattered.
    """
    row, col, rows, cols = region
    if not rows or not cols:
        return
    item = ITEM_SIZE[tensor.dtype]
    row_step, col_step = matrix_strides(tensor)
    start = (row * row_step + col * col_step) * item
    width, step = cols * item, row_step * item
    if col_step != 1 and cols > 1:
        _read_columns(files, tensor, start, region, window)
    elif step == width or rows == 1:
        _read_bytes(files, tensor, start, window.pieces(rows, width))
    elif step < width or width >= DIRECT_ROW or step > MOST_SKIPPED * width:
        for r in range(rows):
            _read_bytes(files, tensor, start + r * step, [window.row(r, width)])
    else:  # one run of the file: each row's piece, then what lies between it and the next
        skipped = BUFFERS.get("skipped", step - width)
        pieces = [p for r in range(rows) for p in (window.row(r, width), skipped)]
        _read_bytes(files, tensor, start, pieces[:-1])


def _read_bytes(
    files: Files, tensor: StoredTensor, start: int, pieces: Sequence[memoryview]
) -> None:
    """Fills buffers with the bytes of a tensor's storage from its byte ``start`` on."""
    if not tensor.extents:
        read_pieces(files, tensor.path, tensor.offset + start, pieces)
        return
    number = bisect_right(tensor.extents, start, key=lambda extent: extent.start) - 1
    for piece in pieces:
        done = 0
        while done < len(piece):
            extent = tensor.extents[number]
            skip = start - extent.start
            size = min(len(piece) - done, extent.nbytes - skip)
            read_pieces(files, tensor.path, extent.offset + skip, [piece[done : done + size]])
            done, start = done + size, start + size
            number += skip + size == extent.nbytes


def _read_columns(
    files: Files, tensor: StoredTensor, start: int, region: Region, window: Window
) -> None:
    """A transposed view: each of its columns is one run of the file."""
    item = ITEM_SIZE[tensor.dtype]
    row_step, col_step = matrix_strides(tensor)
    rows = region.rows
    span = (rows - 1) * row_step + 1
    if span > MOST_SKIPPED * rows:
        raise CheckpointError(
            f"{tensor.name} in {tensor.path} is a view with strides {list(tensor.strides or ())}",
            "a contiguous or a transposed tensor",
            "save it with .contiguous()",
        )
    raw = memoryview(bytearray(span * item))
    elements = raw.cast(INTEGER[item])
    out = window.buffer.cast(INTEGER[item])
    first, stride = window.at // item, window.stride // item
    for c in range(region.cols):
        _read_bytes(files, tensor, start + c * col_step * item, [raw])
        column = out[first + c : first + c + (rows - 1) * stride + 1 : stride]
        if row_step:
            column[:] = elements[::row_step]
        else:  # one value, expanded over all rows
            for r in range(rows):
                column[r] = elements[0]


def matrix_strides(tensor: StoredTensor) -> tuple[int, int]:
    """Row and column stride, in elements, of a tensor seen as a matrix.

    Raises:
        CheckpointError: a view whose inner dimensions do not lie at one distance.
    """
    if tensor.strides is None:
        return matrix(tensor.shape)[1], 1
    inner = [(n, s) for n, s in zip(tensor.shape[1:], tensor.strides[1:], strict=True) if n != 1]
    for (_, outer), (n, s) in pairwise(inner):
        if outer != n * s:
            raise CheckpointError(
                f"{tensor.name} in {tensor.path} is a view with strides {list(tensor.strides)}",
                "a tensor whose rows lie in one piece",
                "save it with .contiguous()",
            )
    return (tensor.strides[0] if tensor.strides else 1), (inner[-1][1] if inner else 1)


def is_plain(tensor: StoredTensor) -> bool:
    """Whether the tensor's elements lie one after the other."""
    return tensor.strides is None


def is_turned(tensor: StoredTensor) -> bool:
    """Whether the elements of a row do not lie one after the other, as in a transposed view."""
    return tensor.strides is not None and matrix_strides(tensor)[1] != 1


def rect_offset(tensor: StoredTensor, row: int, col: int) -> int:
    """Absolute byte offset of an element of a plain tensor."""
    return tensor.offset + (row * matrix(tensor.shape)[1] + col) * ITEM_SIZE[tensor.dtype]


def row_bytes(tensor: StoredTensor | Target) -> int:
    """Bytes of one row of the tensor, as it is seen as a matrix."""
    return max(1, prod(tensor.shape[1:])) * ITEM_SIZE[tensor.dtype]

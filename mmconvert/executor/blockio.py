"""Rectangles of stored tensors, read into buffers: rows and columns, whatever the strides."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Literal, NamedTuple

from mmconvert.errors import CheckpointError
from mmconvert.executor.fileio import BUFFERS, ByteRange, Files, Run, read_pieces
from mmconvert.plan.plan import matrix
from mmconvert.stored import ITEM_SIZE, StoredTensor, Target

DIRECT_ROW = 64 << 10  # bytes; row pieces at least this long are read on their own
NARROW_ROW = 64  # bytes; shorter row pieces are picked from the run that holds them
PICKED = 32 << 20  # bytes of such a run that are in memory at a time
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
    """Where rows lie in a buffer: the first at byte ``at``, each next one ``stride`` bytes on.

    ``use`` names the buffer, if it is one of this thread's ``BUFFERS``.
    """

    buffer: memoryview
    at: int
    stride: int
    use: str = ""

    def row(self, number: int, width: int) -> memoryview:
        """The first ``width`` bytes of one row."""
        at = self.at + number * self.stride
        return self.buffer[at : at + width]

    def pieces(self, rows: int, width: int) -> list[memoryview]:
        """The first ``width`` bytes of each row; one piece where the rows lie in one."""
        if self.stride == width or rows == 1:
            return [self.row(0, rows * width)]
        return self.rows(rows, width)

    def rows(self, rows: int, width: int) -> list[memoryview]:
        """The first ``width`` bytes of each row, one by one."""
        if self.use:
            return BUFFERS.rows(self.use, self.at, self.stride, rows, width)
        return [self.row(r, width) for r in range(rows)]

    def fill_column(self, bits: memoryview, rows: int, item: int) -> None:
        """Puts one element into each row."""
        out, first, step = self.buffer.cast(INTEGER[item]), self.at // item, self.stride // item
        out[first : first + (rows - 1) * step + 1 : step] = bits.cast(INTEGER[item])


def read_compact(files: Files, tensor: StoredTensor, region: Region, use: str) -> memoryview:
    """The region's bits row by row, in this thread's buffer of that ``use``."""
    width = region.cols * ITEM_SIZE[tensor.dtype]
    buffer = BUFFERS.get(use, region.rows * width)
    read_region(files, tensor, region, Window(buffer, 0, width, use))
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
    narrow = width <= NARROW_ROW < step * rows and step != width and step <= DIRECT_ROW
    if rows > 1 and (narrow or (min(row_step, col_step) > 1 and cols > 1)):
        _read_picked(files, tensor, start, region, window)
    elif col_step != 1 and cols > 1:
        _read_columns(files, tensor, start, region, window)
    elif step == width or rows == 1:
        _read_bytes(files, tensor, start, window.pieces(rows, width))
    elif step < width or width >= DIRECT_ROW or step > MOST_SKIPPED * width:
        for r in range(rows):
            _read_bytes(files, tensor, start + r * step, [window.row(r, width)])
    else:  # one run of the file: each row's piece, then what lies between it and the next
        skipped = BUFFERS.get("skipped", step - width)
        pieces = [p for row in window.rows(rows, width) for p in (row, skipped)]
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


def _read_picked(
    files: Files, tensor: StoredTensor, start: int, region: Region, window: Window
) -> None:
    """Elements that lie apart, such as an expert's columns among those of all: the run that holds
    them is read, in parts, and each is picked.
    """
    item = ITEM_SIZE[tensor.dtype]
    steps, counts = matrix_strides(tensor), (region.rows, region.cols)
    down = steps[0] >= steps[1]  # rows lie further apart than columns
    (outer, inner), (lines, each) = (steps, counts) if down else (steps[::-1], counts[::-1])
    between = (each - 1) * inner + 1
    if between > max(outer, MOST_SKIPPED * each) or between * item > 8 * PICKED:
        raise CheckpointError(
            f"{tensor.name} in {tensor.path} is a view with strides {list(tensor.strides or ())}",
            "a contiguous or a transposed tensor",
            "save it with .contiguous()",
        )
    out = window.buffer.cast(INTEGER[item])
    at, stride = window.at // item, window.stride // item
    out_outer, out_inner = (stride, 1) if down else (1, stride)
    most = max(1, PICKED // (outer * item))
    for first in range(0, lines, most):
        count = min(most, lines - first)
        span = (count - 1) * outer
        size = (span + between) * item
        whole = count * outer * item
        raw = _run(files, tensor, start + first * outer * item, size, whole).cast(INTEGER[item])
        for i in range(each):
            to = at + first * out_outer + i * out_inner
            there = slice(to, to + (count - 1) * out_outer + 1, out_outer)
            out[there] = raw[i * inner : i * inner + span + 1 : outer]


def _run(files: Files, tensor: StoredTensor, start: int, nbytes: int, whole: int) -> memoryview:
    """A run of a tensor's storage from its byte ``start`` on, kept for the next view into it.

    Args:
        whole: bytes from there on that other views may ask for.
    """
    if tensor.extents:
        raw = memoryview(bytearray(nbytes))
        _read_bytes(files, tensor, start, [raw])
        return raw
    begin, known = tensor.offset + start, files.run
    if known is not None and known.where.path == tensor.path:
        skip = begin - known.where.start
        if skip >= 0 and skip + nbytes <= known.where.nbytes:
            return known.data[skip : skip + nbytes]
    there = os.fstat(files.fd(tensor.path)).st_size - begin
    where = ByteRange(tensor.path, begin, max(nbytes, min(whole, there)))
    data = memoryview(bytearray(where.nbytes))
    read_pieces(files, tensor.path, begin, [data])
    files.run = Run(where, data)
    return data[:nbytes]


def _read_columns(
    files: Files, tensor: StoredTensor, start: int, region: Region, window: Window
) -> None:
    """A transposed view: each of its columns is one run of the file."""
    item = ITEM_SIZE[tensor.dtype]
    row_step, col_step = matrix_strides(tensor)
    rows = region.rows
    if row_step == 1:
        _read_transposed(files, tensor, region, window)
        return
    span = (rows - 1) * row_step + 1
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


def _read_transposed(files: Files, tensor: StoredTensor, region: Region, window: Window) -> None:
    """The same, of elements without gaps: read as they lie, and exchanged in memory."""
    from mmconvert.executor.values import exchange  # numpy: only where tensors are transposed

    row, col, rows, cols = region
    height, width = matrix(tensor.shape)
    item = ITEM_SIZE[tensor.dtype]
    as_it_lies = tensor._replace(shape=(width, height), strides=(matrix_strides(tensor)[1], 1))
    raw = BUFFERS.get("columns", rows * cols * item)
    read_region(files, as_it_lies, Region(col, row, cols, rows), Window(raw, 0, rows * item))
    exchange(raw, (cols, rows), item, window.buffer, (window.at, window.stride))


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
                "a tensor whose rows are contiguous",
                "save it with .contiguous()",
            )
    return (tensor.strides[0] if tensor.strides else 1), (inner[-1][1] if inner else 1)


def is_plain(tensor: StoredTensor) -> bool:
    """Whether the tensor's elements lie one after the other."""
    return tensor.strides is None


def is_transposed(tensor: StoredTensor) -> bool:
    """Whether the elements of a row do not lie one after the other, as in a transposed view."""
    return tensor.strides is not None and matrix_strides(tensor)[1] != 1


def rect_offset(tensor: StoredTensor, row: int, col: int) -> int:
    """Absolute byte offset of an element of a plain tensor."""
    return tensor.offset + (row * matrix(tensor.shape)[1] + col) * ITEM_SIZE[tensor.dtype]


def rows_range(tensor: StoredTensor, row: int, rows: int) -> tuple[ByteRange, ...]:
    """Where some rows of a tensor lie, if they lie in one run of a file; else nothing."""
    if not is_plain(tensor):
        return ()
    return (ByteRange(tensor.path, rect_offset(tensor, row, 0), rows * row_bytes(tensor)),)


def row_bytes(tensor: StoredTensor | Target) -> int:
    """Bytes of one row of the tensor, as it is seen as a matrix."""
    return max(1, prod(tensor.shape[1:])) * ITEM_SIZE[tensor.dtype]

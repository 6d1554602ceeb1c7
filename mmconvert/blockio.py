"""Positioned reads and writes of rectangles of stored tensors, through small buffers.

Files are read and written with large positioned calls, never through mmap: on network file
systems page faults are orders of magnitude slower.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np

from mmconvert.errors import CheckpointError, MMConvertError, OutputError
from mmconvert.plan import matrix
from mmconvert.stored import ITEM_SIZE, StoredTensor

# Bytes that one buffer holds. Measured: what is written while it is still in the processor's
# cache costs no more than a copy inside the kernel; with 8 MiB it costs a third more.
BAND = 1 << 20
PAGE = 4096
KERNEL_PIECE = 8 << 20  # bytes that one call inside the kernel copies
DIRECT_ROW = 64 << 10  # bytes; row pieces at least this long are read on their own

Bytes = np.ndarray  # of unsigned integers as wide as the dtype: the bits, never interpreted

# What copy_file_range answers where a file system or kernel does not offer it.
_NOT_HERE = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


def bits(dtype: str) -> np.dtype:
    """The unsigned integer type that holds a dtype's bits."""
    return np.dtype(f"<u{ITEM_SIZE[dtype]}")


class Files:
    """File descriptors of one job, opened when first needed."""

    def __init__(self) -> None:
        self._open: dict[tuple[Path, int], int] = {}

    def fd(self, path: Path, mode: int = os.O_RDONLY) -> int:
        """A descriptor for ``path``."""
        key = (path, mode)
        if key not in self._open:
            try:
                self._open[key] = os.open(path, mode | getattr(os, "O_CLOEXEC", 0))
            except OSError as error:
                raise _failed(path, error, writing=mode != os.O_RDONLY) from error
        return self._open[key]

    def close(self) -> None:
        """Closes them all."""
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()


@contextmanager
def open_files() -> Iterator[Files]:
    """Descriptors for the length of one job."""
    files = Files()
    try:
        yield files
    finally:
        files.close()


def _failed(path: Path, error: OSError, *, writing: bool) -> MMConvertError:
    if not writing:
        return CheckpointError(f"{path}: cannot be read: {error.strerror}", "a readable file")
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputError(
            f"{path}: the disk takes no more ({error.strerror})",
            "room for the whole checkpoint; nothing is left under the final name",
            "free some space, or write to another disk, and run the command again",
        )
    return OutputError(f"{path}: cannot be written: {error.strerror}", "a writable folder")


class Buffers(threading.local):
    """Reusable buffers of one thread: fresh ones would cost page faults each time."""

    def __init__(self) -> None:
        self._held: dict[str, np.ndarray] = {}

    def get(self, use: str, nbytes: int) -> np.ndarray:
        """At least ``nbytes`` bytes for one use; valid until the next call for that use."""
        held = self._held.get(use)
        if held is None or held.nbytes < nbytes:
            held = self._held[use] = np.empty(max(nbytes, BAND), np.uint8)
        return held[:nbytes]


BUFFERS = Buffers()

# One writer per file at a time: the kernel would make the others spin on the file's lock.
_WRITING: dict[Path, threading.Lock] = defaultdict(threading.Lock)


def _raw(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array; numpy's own cast refuses empty ones."""
    return array.data.cast("B") if array.size else memoryview(bytearray())


def read_into(fd: int, out: np.ndarray, offset: int, path: Path) -> None:
    """Fills a contiguous array from ``offset`` on.

    Raises:
        CheckpointError: the file cannot be read, or ends before.
    """
    view = _raw(out)
    done = 0
    while done < len(view):
        try:
            got = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise _failed(path, error, writing=False) from error
        if not got:
            raise CheckpointError(
                f"{path}: ends at byte {offset + done}, {len(view) - done} bytes too early",
                "a file that does not change during the conversion",
            )
        done += got


def write_from(fd: int, data: np.ndarray, offset: int, path: Path) -> None:
    """Writes a contiguous array at ``offset``.

    Raises:
        OutputError: the disk is full, or the file cannot be written.
    """
    view = _raw(data)
    done = 0
    with _WRITING[path]:
        while done < len(view):
            try:
                done += os.pwrite(fd, view[done:], offset + done)
            except OSError as error:
                raise _failed(path, error, writing=True) from error


def copy_range(files: Files, source: Path, start: int, target: Path, at: int, nbytes: int) -> None:
    """Copies bytes between files, inside the kernel where that is faster."""
    src, dst = files.fd(source), files.fd(target, os.O_WRONLY)
    done = 0
    if _kernel_copies(src, dst, start - at):
        while done < nbytes:
            try:
                with _WRITING[target]:
                    got = os.copy_file_range(
                        src, dst, min(KERNEL_PIECE, nbytes - done), start + done, at + done
                    )
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise _failed(target, error, writing=True) from error
                break
            if not got:  # some file systems answer 0; a real end of file shows below
                break
            done += got
    while done < nbytes:
        buffer = BUFFERS.get("copy", min(BAND, nbytes - done))
        read_into(src, buffer, start + done, source)
        write_from(dst, buffer, at + done, target)
        done += buffer.nbytes


def _kernel_copies(src: int, dst: int, shift: int) -> bool:
    """Whether ``copy_file_range`` beats reading and writing.

    It does where file systems copy without moving bytes (network and copy-on-write ones: their
    devices have no major number), and where both sides lie alike within memory pages. Else the
    kernel copies page by page, each into two: measured 1.4 times the time of a small buffer.
    """
    if not hasattr(os, "copy_file_range"):
        return False
    return shift % PAGE == 0 or (
        os.fstat(src).st_dev == os.fstat(dst).st_dev and os.major(os.fstat(dst).st_dev) == 0
    )


def matrix_strides(tensor: StoredTensor) -> tuple[int, int]:
    """Row and column stride, in elements, of a tensor seen as a matrix.

    Raises:
        CheckpointError: a view whose inner dimensions do not lie at one distance.
    """
    rows, cols = matrix(tensor.shape)
    del rows
    if tensor.strides is None:
        return cols, 1
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


def read_rect(
    files: Files,
    tensor: StoredTensor,
    row: int,
    col: int,
    rows: int,
    cols: int,
    use: str = "read",
) -> Bytes:
    """A rectangle of a stored tensor as a (rows, cols) array of bits.

    The array is a view of this thread's buffer of that ``use``: valid until the next such read.
    """
    item = ITEM_SIZE[tensor.dtype]
    row_step, col_step = matrix_strides(tensor)
    fd = files.fd(tensor.path)
    start = tensor.offset + (row * row_step + col * col_step) * item
    kind = bits(tensor.dtype)
    if col_step == 1 and (row_step == cols or rows == 1):
        raw = BUFFERS.get(use, rows * cols * item)
        read_into(fd, raw, start, tensor.path)
        return raw.view(kind).reshape(rows, cols)
    out = BUFFERS.get(use, rows * cols * item).view(kind).reshape(rows, cols)
    if col_step == 1 and cols * item < DIRECT_ROW and row_step <= 16 * cols:
        step = max(1, BAND // (row_step * item))
        for r in range(0, rows, step):
            n = min(step, rows - r)
            raw = BUFFERS.get("wide", ((n - 1) * row_step + cols) * item)
            read_into(fd, raw, start + r * row_step * item, tensor.path)
            wide = np.lib.stride_tricks.as_strided(
                raw.view(kind), (n, cols), (row_step * item, item)
            )
            out[r : r + n] = wide
    elif col_step == 1:
        for r in range(rows):
            read_into(fd, out[r], start + r * row_step * item, tensor.path)
    else:
        _read_columns(fd, tensor, out, start, (row_step, col_step))
    return out


def _read_columns(
    fd: int, tensor: StoredTensor, out: Bytes, start: int, steps: tuple[int, int]
) -> None:
    """A transposed view: each of its columns is read as one run, or element by element."""
    item = out.itemsize
    rows, cols = out.shape
    row_step, col_step = steps
    span = (rows - 1) * row_step + 1
    if span > 16 * rows:
        raise CheckpointError(
            f"{tensor.name} in {tensor.path} is a view with strides {list(tensor.strides or ())}",
            "a contiguous or a transposed tensor",
            "save it with .contiguous()",
        )
    raw = np.empty(span, out.dtype)
    for c in range(cols):
        read_into(fd, raw, start + c * col_step * item, tensor.path)
        out[:, c] = raw[::row_step] if row_step else raw[0]


def rect_offset(tensor: StoredTensor, row: int, col: int) -> int:
    """Absolute byte offset of an element of a plain tensor."""
    return tensor.offset + (row * matrix(tensor.shape)[1] + col) * ITEM_SIZE[tensor.dtype]


def row_bytes(tensor: StoredTensor) -> int:
    """Bytes of one row of the tensor, as it is seen as a matrix."""
    return max(1, prod(tensor.shape[1:])) * ITEM_SIZE[tensor.dtype]

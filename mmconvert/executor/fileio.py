"""Positioned reads and writes of bytes, through small buffers; a file server may copy its own.

Files are read and written with large positioned calls, never through mmap: on network file
systems page faults are orders of magnitude slower.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from mmconvert import positioned
from mmconvert.disks import on_local_disk
from mmconvert.errors import CheckpointError, MMConvertError, cannot_read, cannot_write

# Bytes that one buffer holds: what is written while it is still in the processor's cache costs
# less than a copy inside the kernel, which allocates smaller pieces of page cache.
BAND = 1 << 20
KERNEL_PIECE = 8 << 20  # bytes that one call inside the kernel copies
IOV_MAX = 1024  # buffers of one vectored call, on Linux and macOS

# What copy_file_range answers where a file system or kernel does not offer it.
_NOT_HERE = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


class ByteRange(NamedTuple):
    """A run of a file's bytes."""

    path: Path
    start: int
    nbytes: int


class Run(NamedTuple):
    """Bytes of a file that are in memory."""

    where: ByteRange
    data: memoryview


class Files:
    """File descriptors of one job, opened when first needed.

    Attributes:
        run: what was read last for several views that share it.
    """

    def __init__(self) -> None:
        self._open: dict[tuple[Path, int], int] = {}
        self.run: Run | None = None

    def fd(self, path: Path, mode: int = os.O_RDONLY) -> int:
        """A descriptor for ``path``."""
        key = (path, mode)
        if key not in self._open:
            try:
                self._open[key] = os.open(path, mode | positioned.BINARY)
            except OSError as error:
                raise _failed(path, error, writing=mode != os.O_RDONLY) from error
        return self._open[key]

    def close(self) -> None:
        """Closes them all."""
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()
        self.run = None


@contextmanager
def open_files() -> Generator[Files]:
    """Descriptors for the length of one job."""
    files = Files()
    try:
        yield files
    finally:
        files.close()


class Buffers(threading.local):
    """Reusable buffers of one thread: fresh ones would cost page faults each time."""

    def __init__(self) -> None:
        self._held: dict[str, memoryview] = {}

    def get(self, use: str, nbytes: int) -> memoryview:
        """``nbytes`` bytes for one use; valid until the next call for that use."""
        held = self._held.get(use)
        if held is None or held.nbytes < nbytes:
            held = self._held[use] = memoryview(bytearray(max(nbytes, BAND)))
        return held[:nbytes]


BUFFERS = Buffers()

# One writer per file at a time: the kernel would make the others spin on the file's lock.
_WRITING: dict[Path, threading.Lock] = defaultdict(threading.Lock)


def expect(files: Files, spans: Sequence[ByteRange]) -> None:
    """Asks the system to fetch bytes that will be read soon: advice, so nothing if it cannot."""
    if not hasattr(os, "posix_fadvise"):
        return
    for span in spans:
        with suppress(OSError):
            fd = files.fd(span.path)
            os.posix_fadvise(fd, span.start, span.nbytes, os.POSIX_FADV_WILLNEED)


def read_pieces(files: Files, path: Path, offset: int, pieces: Sequence[memoryview]) -> None:
    """Fills buffers, one after the other, with one run of a file's bytes from ``offset`` on.

    Raises:
        CheckpointError: the file cannot be read, or ends before.
    """
    fd = files.fd(path)
    for batch, left in _batches(pieces):
        while left:
            try:
                done = positioned.preadv(fd, batch, offset)
            except OSError as error:
                raise _failed(path, error, writing=False) from error
            if not done:
                raise CheckpointError(
                    f"{path}: ends at byte {offset}, {left} bytes too early",
                    "a file that does not change during the conversion",
                )
            offset, left = offset + done, left - done
            batch = _after(batch, done) if left else batch


def write_pieces(files: Files, path: Path, offset: int, pieces: Sequence[memoryview]) -> None:
    """Writes buffers, one after the other, as one run of a file's bytes from ``offset`` on.

    Raises:
        OutputError: the disk is full, or the file cannot be written.
    """
    fd = files.fd(path, os.O_WRONLY)
    for batch, left in _batches(pieces):
        while left:
            try:
                with _WRITING[path]:
                    done = positioned.pwritev(fd, batch, offset)
            except OSError as error:
                raise _failed(path, error, writing=True) from error
            offset, left = offset + done, left - done
            batch = _after(batch, done) if left else batch


def _batches(pieces: Sequence[memoryview]) -> Iterator[tuple[list[memoryview], int]]:
    """As many buffers as one call takes, and their bytes."""
    for first in range(0, len(pieces), IOV_MAX):
        batch = list(pieces[first : first + IOV_MAX])
        yield batch, sum(map(len, batch))


def _after(batch: list[memoryview], done: int) -> list[memoryview]:
    """What is left of a batch when the kernel has taken only its first bytes."""
    for number, piece in enumerate(batch):
        if done < len(piece):
            return [piece[done:], *batch[number + 1 :]]
        done -= len(piece)
    return []


def copy_range(files: Files, source: Path, start: int, target: Path, at: int, nbytes: int) -> None:
    """Copies bytes between files.

    On local disks through a buffer that stays in the processor's cache. Elsewhere inside the
    kernel or the file server where it can (``copy_file_range``).

    Raises:
        CheckpointError: the source cannot be read, or ends before.
        OutputError: the disk is full, or the target cannot be written.
    """
    done = _copied_elsewhere(files, ByteRange(source, start, nbytes), target, at)
    while done < nbytes:
        buffer = BUFFERS.get("copy", min(BAND, nbytes - done))
        read_pieces(files, source, start + done, [buffer])
        write_pieces(files, target, at + done, [buffer])
        done += len(buffer)


def _copied_elsewhere(files: Files, span: ByteRange, target: Path, at: int) -> int:
    """Bytes, from the first on, that a file server or the kernel has copied.

    A file server may copy without sending the bytes here. A local disk gains
    nothing: the kernel would copy in pieces of 64 KiB, and writes of ``BAND`` bytes take a third
    less of its work (measured: Linux 6.18, ext4).
    """
    src, dst = files.fd(span.path), files.fd(target, os.O_WRONLY)
    done = 0
    if not hasattr(os, "copy_file_range") or on_local_disk(dst):
        return done
    while done < span.nbytes:
        size = min(KERNEL_PIECE, span.nbytes - done)
        try:
            with _WRITING[target]:
                got = os.copy_file_range(src, dst, size, span.start + done, at + done)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise _failed(target, error, writing=True) from error
            break
        if not got:  # some file systems answer 0; a real end of file shows when it is read
            break
        done += got
    return done


def _failed(path: Path, error: OSError, *, writing: bool) -> MMConvertError:
    if not writing:
        return cannot_read(path, error)
    return cannot_write(path, error)

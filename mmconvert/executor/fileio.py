"""Positioned reads and writes of bytes, through small buffers or straight from the page cache.

What lies in this machine's memory or on its disks is copied once: the source is mapped, and the
kernel writes from there. Across a network, page faults are orders of magnitude slower, so both
sides are read and written with large positioned calls, or the file server copies by itself.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from mmconvert import positioned
from mmconvert.disks import is_far, is_near
from mmconvert.errors import CheckpointError, MMConvertError, cannot_read, cannot_write

BAND = 512 << 10  # bytes that one buffer holds, in the processor's cache
CALL = 1 << 20  # bytes that one call moves across a network
# Bytes that one call writes, up to a multiple of them in the file: the kernel allocates page cache
# in pieces of that size. Where the machine owns its memory the larger one is a tenth faster; on a
# virtual machine whose host takes free memory back, which it does in large pieces, the smaller one
# is up to three times faster (measured on Linux 6.18, ext4). So both are tried, and timed.
LARGE, SMALL = 256 << 10, 64 << 10
WORTH = 1.25  # times that the small one must be faster: less is chance
TRIAL = 16  # each so many windows, the size that was slower gets another chance
WINDOW = 2 << 20  # bytes of a source that one thread has mapped at a time
KERNEL_PIECE = 8 << 20  # bytes that one call inside the kernel copies
IOV_MAX = 1024  # buffers of one vectored call, on Linux and macOS
MOST_PIECES = 8192  # of buffers that one thread keeps, of 184 bytes each
MOST_OPEN = 16  # descriptors that one thread keeps for its next job
_POPULATE = 22  # MADV_POPULATE_READ, madvise(2): one call in the place of a fault for each page


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
    """File descriptors of one thread, opened when first needed.

    Attributes:
        run: what was read last for several views that share it.
    """

    def __init__(self) -> None:
        self._open: dict[tuple[Path, int], int] = {}
        self._near: dict[Path, bool] = {}
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

    def most(self, path: Path) -> int:
        """Bytes that one call should write into a file."""
        if path not in self._near:
            self._near[path] = is_near(path)
        return PACE.best if self._near[path] else CALL

    def close(self) -> None:
        """Closes them all."""
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()
        self.run = None

    def trim(self) -> None:
        """After a job: forgets what was read, and closes them all if they are many."""
        self.run = None
        if len(self._open) > MOST_OPEN:
            self.close()


@contextmanager
def open_files() -> Generator[Files]:
    """Descriptors that are closed at the end."""
    files = Files()
    try:
        yield files
    finally:
        files.close()


class Pace(threading.local):
    """How fast one thread writes in pieces of each size."""

    def __init__(self) -> None:
        self._cost = {LARGE: 0.0, SMALL: 0.0}  # seconds for each byte, recent ones count most
        self._turn = 0

    @property
    def best(self) -> int:
        """The size that was faster of late."""
        return SMALL if self._cost[SMALL] * WORTH < self._cost[LARGE] else LARGE

    def next(self) -> int:
        """The size for the next window."""
        self._turn += 1
        return self.best if self._turn % TRIAL else LARGE + SMALL - self.best

    def took(self, size: int, seconds: float, nbytes: int) -> None:
        """Writing a window in pieces of this size took so long."""
        known = self._cost[size] or seconds / nbytes
        self._cost[size] = known + (seconds / nbytes - known) / 4


PACE = Pace()


class Buffers(threading.local):
    """Reusable buffers of one thread: fresh ones would cost page faults each time."""

    def __init__(self) -> None:
        self._held: dict[str, memoryview] = {}
        self._rows: dict[tuple[str, int, int, int], list[memoryview]] = {}

    def get(self, use: str, nbytes: int) -> memoryview:
        """``nbytes`` bytes for one use; valid until the next call for that use."""
        held = self._held.get(use)
        if held is None or held.nbytes < nbytes:
            self._rows.clear()
            held = self._held[use] = memoryview(bytearray(max(nbytes, BAND)))
        return held[:nbytes]

    def rows(self, use: str, at: int, stride: int, rows: int, width: int) -> list[memoryview]:
        """Pieces of ``width`` bytes of a buffer, made once for all tensors of one shape: the first
        at byte ``at``, each next one ``stride`` bytes on.
        """
        key = (use, at, stride, width)
        found = self._rows.get(key, [])
        if len(found) < rows:
            if sum(map(len, self._rows.values())) + rows > MOST_PIECES:
                self._rows.clear()
            held = self._held[use]
            starts = range(at, at + rows * stride, stride)
            found = self._rows[key] = [held[start : start + width] for start in starts]
        return found if len(found) == rows else found[:rows]


BUFFERS = Buffers()


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
    for batch in _calls(pieces, offset, files.most(path)):
        left = sum(map(len, batch))
        while left:
            try:
                done = positioned.pwritev(fd, batch, offset)
            except OSError as error:
                raise _failed(path, error, writing=True) from error
            offset, left = offset + done, left - done
            batch = _after(batch, done) if left else batch


def _calls(pieces: Sequence[memoryview], offset: int, most: int) -> Iterator[list[memoryview]]:
    """Buffers, as many as one call writes; one of its own is cut at multiples of ``most``."""
    if len(pieces) == 1:
        piece = pieces[0]
        first = most - offset % most
        yield [piece[:first]]
        for start in range(first, len(piece), most):
            yield [piece[start : start + most]]
        return
    width = len(pieces[0]) if pieces else 0
    count = min(IOV_MAX, max(1, most // max(1, width)))
    for start in range(0, len(pieces), count):
        yield list(pieces[start : start + count])


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
    """Copies bytes between files, whichever way costs least; a way that fails is no error, since
    reading and writing what it has left tells what is wrong.

    Raises:
        CheckpointError: the source cannot be read, or ends before.
        OutputError: the disk is full, or the target cannot be written.
    """
    span, done = ByteRange(source, start, nbytes), 0
    if is_near(source) and is_near(target):
        done = _copied_from_memory(files, span, target, at)
    elif is_far(source) and is_far(target):
        done = _copied_elsewhere(files, span, target, at)
    size = CALL if is_far(source) or is_far(target) else BAND
    while done < nbytes:
        buffer = BUFFERS.get("copy", min(size - (at + done) % size, nbytes - done))
        read_pieces(files, source, start + done, [buffer])
        write_pieces(files, target, at + done, [buffer])
        done += len(buffer)


def _copied_from_memory(files: Files, span: ByteRange, target: Path, at: int) -> int:
    """Bytes, from the first on, that the kernel has written from the page cache of the source.

    Only the kernel touches the mapping: where the source ends early, the call fails.
    """
    dst, done = files.fd(target, os.O_WRONLY), 0
    begin = span.start - span.start % mmap.ALLOCATIONGRANULARITY
    skip = span.start - begin
    try:
        mapped = mmap.mmap(
            files.fd(span.path), skip + span.nbytes, prot=mmap.PROT_READ, offset=begin
        )
    except (OSError, ValueError):
        return 0
    with closing(mapped), memoryview(mapped) as view, suppress(OSError):
        while done < span.nbytes:
            size = min(WINDOW - (at + done) % WINDOW, span.nbytes - done)
            first = (skip + done) // mmap.PAGESIZE * mmap.PAGESIZE
            pages = first, skip + done + size - first
            with suppress(OSError):  # older than Linux 5.14
                mapped.madvise(_POPULATE, *pages)
            end, began, piece = done + size, time.perf_counter(), PACE.next()
            while done < end:
                part = min(piece - (at + done) % piece, end - done)
                done += os.pwrite(dst, view[skip + done : skip + done + part], at + done)
            PACE.took(piece, time.perf_counter() - began, size)
            mapped.madvise(mmap.MADV_DONTNEED, *pages)
    return done


def _copied_elsewhere(files: Files, span: ByteRange, target: Path, at: int) -> int:
    """Bytes, from the first on, that a file server has copied without sending them here."""
    src, dst, done = files.fd(span.path), files.fd(target, os.O_WRONLY), 0
    with suppress(OSError):
        while hasattr(os, "copy_file_range") and done < span.nbytes:
            size = min(KERNEL_PIECE, span.nbytes - done)
            got = os.copy_file_range(src, dst, size, span.start + done, at + done)
            if not got:  # some file systems answer 0; a real end of file shows when it is read
                break
            done += got
    return done


def _failed(path: Path, error: OSError, *, writing: bool) -> MMConvertError:
    if not writing:
        return cannot_read(path, error)
    return cannot_write(path, error)

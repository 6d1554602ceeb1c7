"""Positioned reads and writes of bytes, and the descriptors and buffers that they use."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from mmconvert import positioned
from mmconvert.disks import is_near
from mmconvert.errors import CheckpointError, MMConvertError, cannot_read, cannot_write

# Bytes that one buffer holds: in the processor's cache, enough to fill whole calls with, and below
# 100 MiB for sixteen threads that hold some each.
BAND = 1 << 20
FAR_CALL = 1 << 20  # bytes that one call moves across a network
# Bytes that one call writes here, up to a multiple of them in the file: the kernel allocates its
# pages in one piece. Larger pieces may not be at hand where memory is in use; smaller ones cost a
# quarter more.
NEAR_CALL = 256 << 10
IOV_MAX = 1024  # buffers of one vectored call, on Linux and macOS
MOST_PIECES = 8192  # of buffers that one thread keeps, of 184 bytes each
MOST_OPEN = 16  # descriptors that one thread keeps for its next job


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
        self._near: dict[Path, bool | None] = {}
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

    def near(self, path: Path) -> bool | None:
        """See :func:`mmconvert.disks.is_near`, which is asked once for each file."""
        if path not in self._near:
            self._near[path] = is_near(path)
        return self._near[path]

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


def expect(files: Files, reads: Iterable[Sequence[ByteRange]]) -> None:
    """Asks the system to fetch bytes that will be read soon: advice, so nothing if it cannot."""
    if not hasattr(os, "posix_fadvise"):
        return
    for span in chain.from_iterable(reads):
        with suppress(OSError):
            fd = files.fd(span.path)
            if not _in_memory(fd, span.start + span.nbytes - 1):  # else each page is looked at
                os.posix_fadvise(fd, span.start, span.nbytes, os.POSIX_FADV_WILLNEED)


def _in_memory(fd: int, at: int) -> bool:
    """Whether a byte is there without the disk; False also where the system does not tell."""
    try:
        return os.preadv(fd, [bytearray(1)], at, os.RWF_NOWAIT) > 0
    except (AttributeError, OSError):
        return False


def read_pieces(files: Files, path: Path, offset: int, pieces: Sequence[memoryview]) -> None:
    """Fills buffers, one after the other, with one run of a file's bytes from ``offset`` on.

    Raises:
        CheckpointError: the file cannot be read, or ends before.
    """
    fd = files.fd(path)
    for start in range(0, len(pieces), IOV_MAX):
        batch = list(pieces[start : start + IOV_MAX])
        left = sum(map(len, batch))
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
    """Writes buffers, all of one length, as one run of a file's bytes from ``offset`` on.

    Raises:
        OutputError: the disk is full, or the file cannot be written.
    """
    fd, most = files.fd(path, os.O_WRONLY), NEAR_CALL if files.near(path) else FAR_CALL
    try:
        for batch in _calls(pieces, offset, most):
            left = sum(map(len, batch))
            while left:
                done = positioned.pwritev(fd, batch, offset)
                offset, left = offset + done, left - done
                batch = _after(batch, done) if left else batch
    except OSError as error:
        raise _failed(path, error, writing=True) from error


def _calls(pieces: Sequence[memoryview], offset: int, most: int) -> Iterator[list[memoryview]]:
    """Buffers of one length, cut into calls that end at multiples of ``most`` bytes of the file."""
    width, done = len(pieces[0]) if pieces else 0, 0
    while done < width * len(pieces):
        size = min(most - (offset + done) % most, width * len(pieces) - done, width * (IOV_MAX - 1))
        (first, skipped), (last, kept) = divmod(done, width), divmod(done + size, width)
        batch = list(pieces[first : last + bool(kept)])
        if kept:
            batch[-1] = batch[-1][:kept]
        batch[0] = batch[0][skipped:]
        yield batch
        done += size


def _after(batch: list[memoryview], done: int) -> list[memoryview]:
    """What is left of a batch when the kernel has taken only its first bytes."""
    for number, piece in enumerate(batch):
        if done < len(piece):
            return [piece[done:], *batch[number + 1 :]]
        done -= len(piece)
    return []


def _failed(path: Path, error: OSError, *, writing: bool) -> MMConvertError:
    if not writing:
        return cannot_read(path, error)
    return cannot_write(path, error)

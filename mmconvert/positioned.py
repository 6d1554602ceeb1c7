"""Reads and writes at an offset, also where the system has no such calls: Windows has none, and
older systems of the BSD family none for several buffers.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager

# A file's bytes as they are: Windows would change line ends. Not left to programs that are started.
BINARY = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)

_SEEKING = threading.Lock()  # the position of a descriptor is shared by all threads


@contextmanager
def _at(fd: int, offset: int) -> Generator[None]:
    """A descriptor at another position, which nobody notices afterwards."""
    with _SEEKING:
        before = os.lseek(fd, 0, os.SEEK_CUR)
        os.lseek(fd, offset, os.SEEK_SET)
        try:
            yield
        finally:
            os.lseek(fd, before, os.SEEK_SET)


def pread(fd: int, nbytes: int, offset: int) -> bytes:
    """At most ``nbytes`` bytes from ``offset`` on.

    Raises:
        OSError: the file cannot be read.
    """
    if hasattr(os, "pread"):
        return os.pread(fd, nbytes, offset)
    with _at(fd, offset):
        return os.read(fd, nbytes)


def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Fills buffers, or the first of them, from ``offset`` on; the number of bytes.

    Raises:
        OSError: the file cannot be read.
    """
    if hasattr(os, "preadv"):
        return os.preadv(fd, buffers, offset)
    data = pread(fd, len(buffers[0]), offset)
    buffers[0][: len(data)] = data
    return len(data)


def pwrite(fd: int, data: memoryview | bytes, offset: int) -> int:
    """Writes bytes at ``offset``; the number of those that were written.

    Raises:
        OSError: the file cannot be written.
    """
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    with _at(fd, offset):
        return os.write(fd, data)


def pwritev(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Writes buffers, or the first of them, at ``offset``; the number of bytes.

    Raises:
        OSError: the file cannot be written.
    """
    if hasattr(os, "pwritev"):
        return os.pwritev(fd, buffers, offset)
    return pwrite(fd, buffers[0], offset)

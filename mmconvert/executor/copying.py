"""Runs of bytes from file to file, through small buffers or inside the kernel.

What lies in this machine's memory or on its disks is copied once: the pages that hold the source
are handed to a pipe, and written from there. Across a network both sides are read and written with
large positioned calls, or the file server copies by itself.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmconvert.executor.fileio import (
    BAND,
    BUFFERS,
    FAR_CALL,
    NEAR_CALL,
    ByteRange,
    Files,
    read_pieces,
    write_pieces,
)

# Bytes: what a call writes may begin in the middle of a page, and takes one more.
PIPE = 2 * NEAR_CALL
KERNEL_PIECE = 8 << 20  # bytes that one call inside the kernel copies


def copy_range(files: Files, source: Path, start: int, target: Path, at: int, nbytes: int) -> None:
    """Copies bytes between files, whichever way costs least; a way that fails is no error, since
    reading and writing what it has left tells what is wrong.

    Raises:
        CheckpointError: the source cannot be read, or ends before.
        OutputError: the disk is full, or the target cannot be written.
    """
    span, done = ByteRange(source, start, nbytes), 0
    src, dst = files.near(source), files.near(target)
    if src and dst and hasattr(os, "splice"):
        done = _spliced(files, span, target, at)
    elif src is False and dst is False:
        done = _copied_elsewhere(files, span, target, at)
    size = FAR_CALL if False in (src, dst) else BAND
    while done < nbytes:
        buffer = BUFFERS.get("copy", min(size - (at + done) % size, nbytes - done))
        read_pieces(files, source, start + done, [buffer])
        write_pieces(files, target, at + done, [buffer])
        done += len(buffer)


def _spliced(files: Files, span: ByteRange, target: Path, at: int) -> int:
    """Bytes, from the first on, that the kernel has written from where it holds the source."""
    src, dst, done = files.fd(span.path), files.fd(target, os.O_WRONLY), 0
    with suppress(OSError), _pipe() as (outlet, inlet):
        while done < span.nbytes:
            size = min(NEAR_CALL - (at + done) % NEAR_CALL, span.nbytes - done)
            held = os.splice(src, inlet, size, offset_src=span.start + done)
            if not held:  # a real end of file shows when it is read
                return done
            while held:
                wrote = os.splice(outlet, dst, held, offset_dst=at + done)
                if not wrote:
                    return done
                held, done = held - wrote, done + wrote
    return done


@contextmanager
def _pipe() -> Generator[tuple[int, int]]:
    """Both ends of a pipe, which holds all that one call writes if the system allows so much."""
    import fcntl  # not on Windows

    ends = os.pipe()
    try:
        with suppress(OSError):  # the pipes of this user hold too much already
            fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, PIPE)
        yield ends
    finally:
        for end in ends:
            os.close(end)


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

"""Runs of bytes from file to file, through small buffers or straight from the page cache.

What lies in this machine's memory or on its disks is copied once: the source is mapped, and the
kernel writes from there. Across a network, page faults are orders of magnitude slower, so both
sides are read and written with large positioned calls, or the file server copies by itself.
"""

from __future__ import annotations

import mmap
import os
import time
from contextlib import closing, suppress
from pathlib import Path

from mmconvert.executor.fileio import (
    BAND,
    BUFFERS,
    CALL,
    ByteRange,
    Files,
    read_pieces,
    write_pieces,
    write_run,
)
from mmconvert.executor.pace import PACE

WINDOW = 2 << 20  # bytes of a source that one thread has mapped at a time
KERNEL_PIECE = 8 << 20  # bytes that one call inside the kernel copies
_POPULATE = 22  # MADV_POPULATE_READ, madvise(2): one call in the place of a fault for each page


def copy_range(files: Files, source: Path, start: int, target: Path, at: int, nbytes: int) -> None:
    """Copies bytes between files, whichever way costs least; a way that fails is no error, since
    reading and writing what it has left tells what is wrong.

    Raises:
        CheckpointError: the source cannot be read, or ends before.
        OutputError: the disk is full, or the target cannot be written.
    """
    span, done = ByteRange(source, start, nbytes), 0
    src, dst = files.near(source), files.near(target)
    if src and dst:
        done = _copied_from_memory(files, span, target, at)
    elif src is False and dst is False:
        done = _copied_elsewhere(files, span, target, at)
    size = CALL if False in (src, dst) else BAND
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
            began, piece = time.perf_counter(), PACE.next()
            with view[skip + done : skip + done + size] as part:  # released before the mapping
                write_run(dst, part, at + done, piece)
            PACE.took(piece, time.perf_counter() - began, size)
            done += size
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

"""Runs a plan: in place, in parallel, in bounded memory, each byte read and written once.

Three kinds of jobs, whichever reads and writes in the largest pieces:

    stream   whole rows to whole rows: bytes go from file to file inside the kernel
    scatter  column blocks of one source (cutting a row-parallel weight): the source is read
             once, in bands of rows, and each block is written to its target in one piece
    gather   column blocks into one target (joining one), and everything small: the target is
             put together in a band and written in one piece
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np

from mmconvert.blockio import (
    BAND,
    BUFFERS,
    Files,
    bits,
    copy_range,
    is_plain,
    open_files,
    read_into,
    read_rect,
    rect_offset,
    row_bytes,
    write_from,
)
from mmconvert.formats.stored import ITEM_SIZE, StoredTensor
from mmconvert.plan import Copy, Plan, matrix

STREAM_MIN = 64 << 10  # bytes; shorter runs are gathered
STREAM_PIECE = 64 << 20  # bytes of one stream job: large enough for speed, small enough to share
BATCH = 8 << 20  # bytes of small targets that make one job

Progress = Callable[[int], None]


class Job(NamedTuple):
    """Work for one thread: ``run`` moves ``nbytes``; ``place`` orders jobs along the files."""

    place: tuple[str, int]
    nbytes: int
    run: Callable[[Files], None]


class Stopped(Exception):  # noqa: N818 - not an error: another job has failed
    """Raised inside workers once the run is to end."""


def default_workers() -> int:
    """One thread for each core that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def execute(
    plan: Plan, targets: Sequence[StoredTensor], workers: int, progress: Progress | None = None
) -> None:
    """Moves every byte of a plan.

    Args:
        targets: where each of the plan's targets lies, in their order; files exist already.
        workers: number of threads.
        progress: called with the number of bytes moved since the last call, from any thread.

    Raises:
        MMConvertError: a file that cannot be read or written; the rest is not run.
    """
    run_jobs(sorted(_jobs(plan, targets), key=lambda job: job.place), workers, progress)


def run_jobs(jobs: Sequence[Job], workers: int, progress: Progress | None = None) -> None:
    """Runs jobs over threads; the first failure ends all and is raised."""
    stop = threading.Event()

    def work(job: Job) -> None:
        if stop.is_set():
            raise Stopped
        with open_files() as files:
            job.run(files)
        if progress:
            progress(job.nbytes)

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            failed = [e for f in done if (e := f.exception())]
            if failed:
                raise next((e for e in failed if not isinstance(e, Stopped)), failed[0])
        finally:  # also after Ctrl-C: no job outlives this call
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def _jobs(plan: Plan, targets: Sequence[StoredTensor]) -> Iterator[Job]:
    by_target: dict[int, list[Copy]] = defaultdict(list)
    for copy in plan.copies:
        by_target[copy.dst].append(copy)
    scattered: dict[int, list[Copy]] = defaultdict(list)
    small: list[tuple[StoredTensor, list[Copy]]] = []
    for number, copies in by_target.items():
        target = targets[number]
        runs = _linear_runs(plan, target, copies)
        if runs is not None and (len(runs) == 1 or target.nbytes >= STREAM_MIN * len(runs)):
            if target.nbytes >= STREAM_MIN:
                yield from _streams(target, runs)
                continue
        if target.nbytes <= STREAM_MIN * 16:
            small.append((target, copies))
        elif all(_whole_rows(c, target) and is_plain(plan.sources[c.src]) for c in copies):
            for copy in copies:
                scattered[copy.src].append(copy)
        else:
            yield from _gathers(plan.sources, target, copies)
    for number, copies in scattered.items():
        yield from _scatters(plan.sources[number], targets, copies)
    yield from _batches(plan.sources, small)


# -------------------------------------------------------------------------------------- stream


class Run(NamedTuple):
    """Bytes that lie in one piece on both sides; offsets are absolute."""

    source: StoredTensor
    start: int
    at: int
    nbytes: int


def _whole_rows(copy: Copy, tensor: StoredTensor) -> bool:
    return copy.cols == matrix(tensor.shape)[1]


def _linear_runs(plan: Plan, target: StoredTensor, copies: Sequence[Copy]) -> list[Run] | None:
    """The copies as runs, neighbouring ones joined; None if some copy is a column block."""
    runs: list[Run] = []
    for c in sorted(copies, key=lambda c: c.dst_row):
        source = plan.sources[c.src]
        if not (_whole_rows(c, target) and _whole_rows(c, source) and is_plain(source)):
            return None
        start, at = rect_offset(source, c.src_row, 0), rect_offset(target, c.dst_row, 0)
        nbytes = c.rows * row_bytes(target)
        if runs:
            last = runs[-1]
            joined = last.start + last.nbytes == start and last.at + last.nbytes == at
            if joined and last.source.path == source.path:
                runs[-1] = Run(last.source, last.start, last.at, last.nbytes + nbytes)
                continue
        runs.append(Run(source, start, at, nbytes))
    return runs


def _streams(target: StoredTensor, runs: Sequence[Run]) -> Iterator[Job]:
    batch: list[Run] = []
    for run in runs:
        for done in range(0, run.nbytes, STREAM_PIECE):
            size = min(STREAM_PIECE, run.nbytes - done)
            batch.append(Run(run.source, run.start + done, run.at + done, size))
            if sum(r.nbytes for r in batch) >= STREAM_PIECE:
                yield _stream_job(target, batch)
                batch = []
    if batch:
        yield _stream_job(target, batch)


def _stream_job(target: StoredTensor, runs: list[Run]) -> Job:
    def run(files: Files) -> None:
        for r in runs:
            copy_range(files, r.source.path, r.start, target.path, r.at, r.nbytes)

    return Job((str(target.path), runs[0].at), sum(r.nbytes for r in runs), run)


# ------------------------------------------------------------------------------------- scatter


def _scatters(
    source: StoredTensor, targets: Sequence[StoredTensor], copies: Sequence[Copy]
) -> Iterator[Job]:
    step = max(1, BAND // row_bytes(source))
    first = min(c.src_row for c in copies)
    last = max(c.src_row + c.rows for c in copies)
    for top in range(first, last, step):
        band = _cut(copies, top, min(top + step, last), source=True)
        if band:
            yield _scatter_job(source, targets, band, top, min(top + step, last))


def _cut(copies: Sequence[Copy], top: int, bottom: int, *, source: bool) -> list[Copy]:
    """The parts of copies that lie in rows ``top`` to ``bottom`` of the source or target."""
    found: list[Copy] = []
    for c in copies:
        row = c.src_row if source else c.dst_row
        begin, end = max(row, top), min(row + c.rows, bottom)
        if begin < end:
            skip = begin - row
            found.append(
                c._replace(src_row=c.src_row + skip, dst_row=c.dst_row + skip, rows=end - begin)
            )
    return found


def _scatter_job(
    source: StoredTensor, targets: Sequence[StoredTensor], copies: list[Copy], top: int, bottom: int
) -> Job:
    def run(files: Files) -> None:
        width = matrix(source.shape)[1]
        raw = BUFFERS.get("band", (bottom - top) * row_bytes(source))
        read_into(files.fd(source.path), raw, rect_offset(source, top, 0), source.path)
        band = raw.view(bits(source.dtype)).reshape(bottom - top, width)
        for c in copies:
            target = targets[c.dst]
            block = band[c.src_row - top : c.src_row - top + c.rows, c.src_col : c.src_col + c.cols]
            out = BUFFERS.get("block", block.nbytes).view(band.dtype).reshape(block.shape)
            np.copyto(out, block)
            fd = files.fd(target.path, os.O_WRONLY)
            write_from(fd, out, rect_offset(target, c.dst_row, c.dst_col), target.path)

    nbytes = sum(c.rows * c.cols for c in copies) * ITEM_SIZE[source.dtype]
    return Job((str(source.path), rect_offset(source, top, 0)), nbytes, run)


# -------------------------------------------------------------------------------------- gather


def _gathers(
    sources: Sequence[StoredTensor], target: StoredTensor, copies: Sequence[Copy]
) -> Iterator[Job]:
    rows = matrix(target.shape)[0]
    step = max(1, BAND // row_bytes(target))
    for top in range(0, rows, step):
        bottom = min(top + step, rows)
        band = _cut(copies, top, bottom, source=False)
        nbytes = (bottom - top) * row_bytes(target)

        def run(files: Files, top: int = top, bottom: int = bottom, band=band) -> None:  # noqa: ANN001 - bound now, list[Copy]
            _gather(files, sources, target, band, top, bottom)

        yield Job((str(target.path), rect_offset(target, top, 0)), nbytes, run)


def _gather(
    files: Files,
    sources: Sequence[StoredTensor],
    target: StoredTensor,
    copies: Sequence[Copy],
    top: int,
    bottom: int,
) -> None:
    width = matrix(target.shape)[1]
    raw = BUFFERS.get("band", (bottom - top) * width * ITEM_SIZE[target.dtype])
    band = raw.view(bits(target.dtype)).reshape(bottom - top, width)
    for c in copies:
        block = read_rect(files, sources[c.src], c.src_row, c.src_col, c.rows, c.cols)
        row = c.dst_row - top
        band[row : row + c.rows, c.dst_col : c.dst_col + c.cols] = block
    fd = files.fd(target.path, os.O_WRONLY)
    write_from(fd, band, rect_offset(target, top, 0), target.path)


def _batches(
    sources: Sequence[StoredTensor], small: list[tuple[StoredTensor, list[Copy]]]
) -> Iterator[Job]:
    """Small targets of one file, put together into jobs that are worth starting."""
    small.sort(key=lambda item: (str(item[0].path), item[0].offset))
    batch: list[tuple[StoredTensor, list[Copy]]] = []
    size = 0
    for target, copies in small:
        if batch and (size >= BATCH or batch[0][0].path != target.path):
            yield _batch_job(sources, batch, size)
            batch, size = [], 0
        batch.append((target, copies))
        size += target.nbytes
    if batch:
        yield _batch_job(sources, batch, size)


def _batch_job(
    sources: Sequence[StoredTensor], batch: list[tuple[StoredTensor, list[Copy]]], size: int
) -> Job:
    def run(files: Files) -> None:
        for target, copies in batch:
            _gather(files, sources, target, copies, 0, matrix(target.shape)[0])

    return Job((str(batch[0][0].path), batch[0][0].offset), size, run)

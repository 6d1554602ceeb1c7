"""Runs a plan: in place, in parallel, in bounded memory, each byte read and written once.

Three kinds of jobs, whichever reads and writes in the largest pieces:

    stream   whole rows to whole rows: long runs of bytes go from file to file
    scatter  column blocks of one source (cutting a row-parallel weight): the source is read
             once, in bands of rows, and each block is written to its target in one piece
    gather   column blocks into one target (joining one), and everything small: the target is
             put together in a band and written in one piece
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mmconvert.executor.bands import cut, steps
from mmconvert.executor.blockio import (
    Region,
    Window,
    is_plain,
    is_transposed,
    read_compact,
    rect_offset,
    row_bytes,
    rows_range,
)
from mmconvert.executor.copying import copy_range
from mmconvert.executor.fileio import BAND, ByteRange, Files, write_pieces
from mmconvert.executor.gather import Origin, batches, gathers
from mmconvert.executor.jobs import Job, job_size, load_numpy
from mmconvert.executor.replicas import Pairs, on_the_way
from mmconvert.plan.plan import Copy, Plan, matrix
from mmconvert.stored import ITEM_SIZE, StoredTensor

STREAM_MIN = 1 << 20  # bytes; shorter runs are gathered


def jobs_of(plan: Plan, targets: Sequence[StoredTensor]) -> list[Job]:
    """The jobs that move every byte of a plan; the same plan gives the same jobs.

    Args:
        targets: where each of the plan's targets lies, in their order; files exist when the jobs
            run.
    """
    counted = any(source.scales or is_transposed(source) for source in plan.sources)
    if plan.cast or plan.products or plan.fitted or counted:
        load_numpy()  # before threads ask for it at once
    return list(_jobs(plan, targets))


def _jobs(plan: Plan, targets: Sequence[StoredTensor]) -> Iterator[Job]:
    by_target: dict[int, list[Copy]] = defaultdict(list)
    for copy in plan.copies:
        by_target[copy.dst].append(copy)
    added: dict[int, list[Copy]] = defaultdict(list)
    for product in plan.products:
        added[product.dst].append(product)
    scattered: dict[int, list[Copy]] = defaultdict(list)
    size = job_size(plan.nbytes)
    small: list[tuple[StoredTensor, list[Copy]]] = []
    repeats = _repeats(plan.copies) if plan.cast or plan.replicas else Pairs()
    replicas, comparisons = on_the_way(plan, repeats)
    yield from comparisons
    origin = Origin(plan.sources, repeats, replicas)
    by_target.update({f.tensor: by_target[f.tensor] for f in plan.fills})  # all of it may be zeros
    for number, copies in by_target.items():
        target = targets[number]
        if number in added:
            from mmconvert.executor.products import merges

            yield from merges(plan, target, copies, added[number])
            continue
        compared = any(c.src in replicas.passing for c in copies)
        runs = None if compared else _linear_runs(plan, target, copies)
        if runs and target.nbytes >= STREAM_MIN * len(runs):
            yield from _streams(target, runs, size)
            continue
        if target.nbytes <= STREAM_MIN:
            small.append((target, copies))
        elif not compared and all(_scatters_to(plan.sources[c.src], target, c) for c in copies):
            for copy in copies:
                scattered[copy.src].append(copy)
        else:
            yield from gathers(origin, target, copies, size)
    for number, copies in scattered.items():
        yield from _scatters(plan.sources[number], targets, copies, size)
    yield from batches(origin, small, size)


# -------------------------------------------------------------------------------------- stream


class Stretch(NamedTuple):
    """Bytes that lie in one piece on both sides; offsets are absolute."""

    source: StoredTensor
    start: int
    at: int
    nbytes: int


def _same_bits(source: StoredTensor, target: StoredTensor) -> bool:
    return is_plain(source) and source.dtype == target.dtype


def _scatters_to(source: StoredTensor, target: StoredTensor, copy: Copy) -> bool:
    return copy.cols == matrix(target.shape)[1] and _same_bits(source, target)


def _linear_runs(plan: Plan, target: StoredTensor, copies: Sequence[Copy]) -> list[Stretch] | None:
    """The copies as runs, neighbouring ones joined; None if some copy is no run, or is cast."""
    runs: list[Stretch] = []
    width, line = matrix(target.shape)[1], row_bytes(target)
    for c in sorted(copies, key=lambda c: c.dst_row):
        source = plan.sources[c.src]
        if not (c.cols == width == matrix(source.shape)[1] and _same_bits(source, target)):
            return None
        start, at = source.offset + c.src_row * line, target.offset + c.dst_row * line
        nbytes = c.rows * line
        if runs:
            last = runs[-1]
            joined = last.start + last.nbytes == start and last.at + last.nbytes == at
            if joined and last.source.path == source.path:
                runs[-1] = Stretch(last.source, last.start, last.at, last.nbytes + nbytes)
                continue
        runs.append(Stretch(source, start, at, nbytes))
    return runs


def _streams(target: StoredTensor, runs: Sequence[Stretch], most: int) -> Iterator[Job]:
    batch: list[Stretch] = []
    for run in runs:
        done = 0
        while done < run.nbytes:  # up to a multiple of the size: the kernel likes whole pages
            size = min(most - (run.at + done) % most, run.nbytes - done)
            batch.append(Stretch(run.source, run.start + done, run.at + done, size))
            done += size
            if sum(r.nbytes for r in batch) >= most // 2:
                yield _stream_job(target, batch)
                batch = []
    if batch:
        yield _stream_job(target, batch)


def _stream_job(target: StoredTensor, runs: list[Stretch]) -> Job:
    def run(files: Files) -> None:
        for r in runs:
            copy_range(files, r.source.path, r.start, target.path, r.at, r.nbytes)

    path = str(target.path)
    reads = tuple(ByteRange(r.source.path, r.start, r.nbytes) for r in runs)
    return Job((path,), (path, runs[0].at), sum(r.nbytes for r in runs), run, reads)


# ------------------------------------------------------------------------------------- scatter


def _scatters(
    source: StoredTensor, targets: Sequence[StoredTensor], copies: Sequence[Copy], size: int
) -> Iterator[Job]:
    first = min(c.src_row for c in copies)
    last = max(c.src_row + c.rows for c in copies)
    for top, bottom in steps(first, last, row_bytes(source), size):
        part = cut(copies, top, bottom, source=True)
        if part:
            yield _scatter_job(source, targets, part, top, bottom)


def _scatter_job(
    source: StoredTensor, targets: Sequence[StoredTensor], copies: list[Copy], top: int, bottom: int
) -> Job:
    def run(files: Files) -> None:
        width, line = matrix(source.shape)[1], row_bytes(source)
        item = ITEM_SIZE[source.dtype]
        for begin, end in steps(top, bottom, line, BAND):
            band = read_compact(files, source, Region(begin, 0, end - begin, width), "band")
            for c in cut(copies, begin, end, source=True):
                block = Window(band, (c.src_row - begin) * line + c.src_col * item, line, "band")
                target = targets[c.dst]
                at = rect_offset(target, c.dst_row, c.dst_col)
                write_pieces(files, target.path, at, block.pieces(c.rows, c.cols * item))

    nbytes = sum(c.rows * c.cols for c in copies) * ITEM_SIZE[source.dtype]
    writes = tuple(sorted({str(targets[c.dst].path) for c in copies}))
    reads = rows_range(source, top, bottom - top)
    return Job(writes, (str(source.path), reads[0].start), nbytes, run, reads, mixed=True)


def _repeats(copies: Sequence[Copy]) -> Pairs:
    first: dict[tuple[int, ...], int] = {}
    return frozenset(
        (c.src, c.dst)
        for c in copies
        if first.setdefault((c.src, c.src_row, c.src_col, c.rows, c.cols), c.dst) != c.dst
    )

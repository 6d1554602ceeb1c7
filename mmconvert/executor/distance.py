"""Distances of whole tensors of two checkpoints: streaming, over threads, in bounded memory.

The work is cut the same way whatever the number of threads, and sums are added in the order of
the cuts: the same two checkpoints always give the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from mmconvert.errors import TensorError
from mmconvert.executor.blockio import Region, read_compact
from mmconvert.executor.fileio import BAND, Files
from mmconvert.executor.jobs import JOB_SIZE, Job, run_jobs
from mmconvert.plan.build import join, zeros_of
from mmconvert.plan.plan import Copy, Key, Side, Whole, matrix
from mmconvert.stored import ITEM_SIZE, StoredTensor

NOTHING = -1  # the tensor of a side that stores nothing there: its elements are zero


class Totals(NamedTuple):
    """What is known of one whole tensor, or of many together.

    Attributes:
        elements: number of elements compared.
        different: how many differ as numbers.
        square_gap, square_a: sums of the squares of a - b and of a.
        largest: the largest absolute difference.
        nan_a, inf_a, nan_b, inf_b: elements that are NaN or infinite; they are in no sum.
    """

    elements: int = 0
    different: int = 0
    square_gap: float = 0.0
    square_a: float = 0.0
    largest: float = 0.0
    nan_a: int = 0
    inf_a: int = 0
    nan_b: int = 0
    inf_b: int = 0

    @property
    def gap(self) -> float:
        """L2 norm of a - b."""
        return self.square_gap**0.5

    @property
    def relative(self) -> float:
        """L2 norm of a - b over that of a: 0 if they are equal; infinite if only a is zero, or if
        float64 cannot hold a sum.
        """
        if not self.square_gap:
            return 0.0
        if not self.square_a or math.isinf(self.square_a + self.square_gap):
            return math.inf
        return self.square_gap**0.5 / self.square_a**0.5

    @property
    def odd(self) -> int:
        """How many values, of both sides together, are NaN or infinite."""
        return self.nan_a + self.inf_a + self.nan_b + self.inf_b

    def plus(self, other: Totals) -> Totals:
        """Both together."""
        return Totals(
            self.elements + other.elements,
            self.different + other.different,
            self.square_gap + other.square_gap,
            self.square_a + other.square_a,
            max(self.largest, other.largest),
            self.nan_a + other.nan_a,
            self.inf_a + other.inf_a,
            self.nan_b + other.nan_b,
            self.inf_b + other.inf_b,
        )


class WorstPlace(NamedTuple):
    """Where the largest difference is: (row, column) in the stored tensors seen as matrices.

    A tensor number is NOTHING where that side stores nothing: its value there is zero.
    """

    tensor_a: int
    index_a: tuple[int, int]
    tensor_b: int
    index_b: tuple[int, int]
    a: float
    b: float


class Distance(NamedTuple):
    """How far apart one whole tensor is."""

    totals: Totals
    place: WorstPlace | None


Overlaps = dict[Key, list[Copy]]


def pieces_of(a: Side, b: Side, keys: Sequence[Key]) -> Overlaps:
    """What must be compared of each whole: its first copy on both sides, element by element.

    Raises:
        TensorError: the pieces do not cover a whole exactly.
    """
    found: Overlaps = {}
    for key in keys:
        left, right = a.wholes[key], b.wholes[key]
        blocks_a, blocks_b = left.copies[0], right.copies[0]
        pieces = join(blocks_a, blocks_b)
        pieces += [
            Copy(z.tensor, z.row, z.col, NOTHING, 0, 0, z.rows, z.cols)
            for z in zeros_of(key, right, blocks_a)
        ]
        pieces += [
            Copy(NOTHING, 0, 0, z.tensor, z.row, z.col, z.rows, z.cols)
            for z in zeros_of(key, left, blocks_b)
        ]
        _check_cover(key, left, right, pieces)
        found[key] = pieces
    return found


def _check_cover(key: Key, a: Whole, b: Whole, pieces: Sequence[Copy]) -> None:
    rows, cols = matrix(a.shape)
    stored_nowhere = set(a.zeros) & set(b.zeros)
    covered = sum(p.rows * p.cols for p in pieces) + sum(
        gap.rows * gap.cols for gap in stored_nowhere
    )
    if covered != rows * cols:
        raise TensorError(
            f"{key.name()}: {covered} of {rows * cols} elements are in the tensors that hold it",
            "every element once in both checkpoints",
        )


def distances(
    pieces: Overlaps,
    a: Sequence[StoredTensor],
    b: Sequence[StoredTensor],
    workers: int,
    progress: Callable[[int], None] | None = None,
) -> dict[Key, Distance]:
    """The distance of every whole in ``pieces``, in their order."""
    batches = list(_batches(pieces, a, b))
    results: list[dict[Key, Distance]] = [{} for _ in batches]

    def job(number: int, nbytes: int, batch: Sequence[tuple[Key, Copy]]) -> Job:
        def run(files: Files) -> tuple[int, dict[Key, Distance]]:
            return number, _look(files, batch, a, b)

        return Job((), ("", 0), nbytes, run)

    def finished(job: Job, result: tuple[int, dict[Key, Distance]]) -> None:
        results[result[0]] = result[1]
        if progress:
            progress(job.nbytes)

    jobs = [job(number, nbytes, batch) for number, (nbytes, batch) in enumerate(batches)]
    run_jobs(jobs, workers, finished)
    found = dict.fromkeys(pieces, Distance(Totals(), None))
    for result in results:
        for key, distance in result.items():
            found[key] = _both(found[key], distance)
    return found


def nbytes_of(pieces: Overlaps, a: Sequence[StoredTensor], b: Sequence[StoredTensor]) -> int:
    """Bytes of one side that are compared: what progress counts."""
    return sum(_nbytes(copy, a, b) for copies in pieces.values() for copy in copies)


def _nbytes(copy: Copy, a: Sequence[StoredTensor], b: Sequence[StoredTensor]) -> int:
    tensor = b[copy.dst] if copy.src == NOTHING else a[copy.src]
    return copy.rows * copy.cols * ITEM_SIZE[tensor.dtype]


def _batches(
    pieces: Overlaps, a: Sequence[StoredTensor], b: Sequence[StoredTensor]
) -> Iterator[tuple[int, list[tuple[Key, Copy]]]]:
    """The work in portions of about JOB_SIZE bytes."""
    batch: list[tuple[Key, Copy]] = []
    size = 0
    for key, copies in pieces.items():
        for copy in copies:
            for part in cut(copy, JOB_SIZE // max(1, _item(copy, a, b))):
                batch.append((key, part))
                size += _nbytes(part, a, b)
                if size >= JOB_SIZE:
                    yield size, batch
                    batch, size = [], 0
    if batch:
        yield size, batch


def _item(copy: Copy, a: Sequence[StoredTensor], b: Sequence[StoredTensor]) -> int:
    """Bytes of the larger element of the two tensors."""
    sizes = [ITEM_SIZE[a[copy.src].dtype]] if copy.src != NOTHING else []
    return max(sizes + ([ITEM_SIZE[b[copy.dst].dtype]] if copy.dst != NOTHING else []))


def cut(copy: Copy, most: int) -> Iterator[Copy]:
    """The copy in rectangles of at most ``most`` elements: bands of rows, or parts of one row."""
    cols = max(1, min(copy.cols, most))
    rows = max(1, most // cols)
    for row in range(0, copy.rows, rows):
        for col in range(0, copy.cols, cols):
            yield Copy(
                copy.src,
                copy.src_row + row,
                copy.src_col + col,
                copy.dst,
                copy.dst_row + row,
                copy.dst_col + col,
                min(rows, copy.rows - row),
                min(cols, copy.cols - col),
            )


def _look(
    files: Files,
    batch: Sequence[tuple[Key, Copy]],
    a: Sequence[StoredTensor],
    b: Sequence[StoredTensor],
) -> dict[Key, Distance]:
    found: dict[Key, Distance] = {}
    for key, copy in batch:
        for part in cut(copy, BAND // _item(copy, a, b)):
            distance = _measured(files, part, a, b)
            found[key] = _both(found[key], distance) if key in found else distance
    return found


def _measured(
    files: Files, c: Copy, a: Sequence[StoredTensor], b: Sequence[StoredTensor]
) -> Distance:
    from mmconvert.executor.measure import (
        measure,  # numpy: a tenth of a second that other tools save
    )

    # Where one side stores nothing, its zeros have the dtype of the other.
    ours = a[c.src] if c.src != NOTHING else b[c.dst]
    theirs = b[c.dst] if c.dst != NOTHING else ours
    here, there = (c.src_row, c.src_col), (c.dst_row, c.dst_col)
    left = _read(files, ours, here, c, "left") if c.src != NOTHING else _zeros(ours, c)
    right = _read(files, theirs, there, c, "right") if c.dst != NOTHING else _zeros(theirs, c)
    m = measure(left, right, (ours.dtype, theirs.dtype))
    totals = Totals(
        c.rows * c.cols,
        *(m.different, m.square_gap, m.square_a, m.largest, m.nan_a, m.inf_a, m.nan_b, m.inf_b),
    )
    if m.place < 0:
        return Distance(totals, None)
    row, col = divmod(m.place, c.cols)
    index_a, index_b = (c.src_row + row, c.src_col + col), (c.dst_row + row, c.dst_col + col)
    return Distance(totals, WorstPlace(c.src, index_a, c.dst, index_b, m.a, m.b))


def _read(files: Files, tensor: StoredTensor, at: tuple[int, int], c: Copy, use: str) -> memoryview:
    return read_compact(files, tensor, Region(*at, c.rows, c.cols), use)


def _zeros(like: StoredTensor, c: Copy) -> memoryview:
    return memoryview(bytes(c.rows * c.cols * ITEM_SIZE[like.dtype]))


def _both(first: Distance, second: Distance) -> Distance:
    """Two parts of one whole; of equally large differences the first one's place counts."""
    later = second.place is not None and (
        first.place is None or second.totals.largest > first.totals.largest
    )
    return Distance(first.totals.plus(second.totals), second.place if later else first.place)

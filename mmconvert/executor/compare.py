"""Compares regions of stored tensors: replicas of one checkpoint, or two checkpoints.

Bits are compared as bits; only where they differ are they read as numbers (``values``).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

from mmconvert.executor.blockio import Region, read_compact
from mmconvert.executor.differences import TensorDifference
from mmconvert.executor.fileio import BAND, Files, open_files
from mmconvert.executor.jobs import JOB_SIZE, Job, run_jobs
from mmconvert.plan.plan import Comparison, Key, Zeros, matrix
from mmconvert.stored import ITEM_SIZE, StoredTensor


def compare(
    comparisons: Sequence[Comparison],
    a: Sequence[StoredTensor],
    b: Sequence[StoredTensor],
    workers: int,
    progress: Callable[[int], None] | None = None,
    cast: str = "",
) -> list[TensorDifference]:
    """The differences, one for each pair of tensors at most, in the order of the tensors.

    Args:
        cast: the dtype in which tensors of two dtypes are compared; "" takes the narrower one.
    """
    found: dict[tuple[int, int], TensorDifference] = {}
    lock = threading.Lock()

    def look(files: Files, pieces: Sequence[Comparison]) -> None:
        for piece in pieces:
            c = piece.copy
            region = Region(c.src_row, c.src_col, c.rows, c.cols)
            left = read_compact(files, a[c.src], region, "left")
            region = Region(c.dst_row, c.dst_col, c.rows, c.cols)
            right = read_compact(files, b[c.dst], region, "right")
            one, other = a[c.src], b[c.dst]
            if one.dtype != other.dtype:
                left, right, dtype = _alike(left, right, (one.dtype, other.dtype), cast)
                one, other = one._replace(dtype=dtype), other._replace(dtype=dtype)
            if not _equal(left, right):
                difference = _describe(piece, one, other, left, right)
                with lock:
                    known = found.get((c.src, c.dst))
                    found[c.src, c.dst] = _first(known, difference)

    jobs: list[Job] = []
    batch: list[Comparison] = []
    size = 0
    for piece in _pieces(comparisons, a):
        batch.append(piece)
        size += piece.copy.rows * piece.copy.cols * ITEM_SIZE[a[piece.copy.src].dtype]
        if size >= JOB_SIZE:
            jobs.append(_job(look, batch, size))
            batch, size = [], 0
    if batch:
        jobs.append(_job(look, batch, size))
    run_jobs(jobs, workers, (lambda job, _: progress(job.nbytes)) if progress else None)
    return [found[pair] for pair in sorted(found)]


def _alike(
    left: memoryview, right: memoryview, dtypes: tuple[str, str], cast: str
) -> tuple[memoryview, memoryview, str]:
    """Values of two floating-point dtypes in one, which is told too."""
    from mmconvert.executor import values  # numpy: see _describe

    sizes = [ITEM_SIZE[dtype] for dtype in dtypes]
    narrower = "F32" if sizes[0] == sizes[1] else dtypes[sizes.index(min(sizes))]
    dtype = cast or narrower
    one, other = (
        data if old == dtype else values.cast(data, old, dtype).bits
        for data, old in zip((left, right), dtypes, strict=True)
    )
    return one, other, dtype


def _equal(left: memoryview, right: memoryview) -> bool:
    # Two memoryviews are compared element by element; a bytearray in one go.
    return bytearray(left) == right  # pyright: ignore[reportUnnecessaryComparison] - they do


def _job(
    look: Callable[[Files, Sequence[Comparison]], None], batch: list[Comparison], size: int
) -> Job:
    def run(files: Files) -> None:
        look(files, batch)

    return Job((), ("", 0), size, run)


def _pieces(comparisons: Sequence[Comparison], a: Sequence[StoredTensor]) -> list[Comparison]:
    """The comparisons, cut into bands of rows that fit a buffer."""
    pieces: list[Comparison] = []
    for comparison in comparisons:
        c = comparison.copy
        step = max(1, BAND // max(1, c.cols * ITEM_SIZE[a[c.src].dtype]))
        for row in range(0, c.rows, step):
            part = c._replace(
                src_row=c.src_row + row, dst_row=c.dst_row + row, rows=min(step, c.rows - row)
            )
            pieces.append(Comparison(comparison.key, part))
    return pieces


def _describe(
    piece: Comparison, a: StoredTensor, b: StoredTensor, left: memoryview, right: memoryview
) -> TensorDifference:
    from mmconvert.executor.values import (
        gaps,  # numpy: a tenth of a second that equality need not pay
    )

    c = piece.copy
    found = gaps(left, right, (a.dtype, b.dtype), c.cols)
    return TensorDifference(
        piece.key,
        a,
        b,
        (c.src_row + found.row, c.src_col + found.col),
        (c.dst_row + found.row, c.dst_col + found.col),
        found.left,
        found.right,
        found.largest,
        found.elements,
    )


def _first(known: TensorDifference | None, new: TensorDifference) -> TensorDifference:
    if known is None:
        return new
    first, other = (known, new) if known.a_index <= new.a_index else (new, known)
    return first._replace(
        largest=_larger(first.largest, other.largest),
        elements=first.elements + other.elements,
    )


def _larger(a: float, b: float) -> float:
    return b if math.isnan(a) else a if math.isnan(b) else max(a, b)


def not_zero(zeros: Sequence[Zeros], tensors: Sequence[StoredTensor]) -> list[TensorDifference]:
    """Regions that should hold zeros and do not, each as a difference from zero."""
    found: list[TensorDifference] = []
    with open_files() as files:
        for zero in zeros:
            tensor = tensors[zero.tensor]
            region = Region(zero.row, zero.col, zero.rows, zero.cols)
            data = read_compact(files, tensor, region, "left")
            if _equal(data, memoryview(bytes(len(data)))):
                continue
            from mmconvert.executor.values import nonzero  # see _describe

            gap = nonzero(data, tensor.dtype, zero.cols)
            if gap is None:
                continue
            index = (zero.row + gap.row, zero.col + gap.col)
            none = tensor._replace(name="zero")
            found.append(
                TensorDifference(
                    *(zero.key, tensor, none, index, index),
                    *(gap.left, 0.0, gap.largest, gap.elements),
                )
            )
    return found


def is_zero(tensor: StoredTensor) -> bool:
    """Whether all values of a tensor are zero."""
    return not not_zero([Zeros(Key("", -1), 0, 0, 0, *matrix(tensor.shape))], [tensor])


def same_bytes(a: StoredTensor, b: StoredTensor) -> bool | None:
    """Whether two tensors hold the same bytes; None if ``a`` is one value throughout."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    rows, cols = matrix(a.shape)
    item = ITEM_SIZE[a.dtype]
    step = max(1, BAND // max(1, cols * item))
    first: bytes = b""
    varies = False
    with open_files() as files:
        for row in range(0, rows, step):
            region = Region(row, 0, min(step, rows - row), cols)
            left = read_compact(files, a, region, "left")
            first = first or bytes(left[:item])
            varies = varies or not _equal(left, memoryview(first * (len(left) // item)))
            if not _equal(left, read_compact(files, b, region, "right")):
                return False
    return True if varies else None


def comparison_bytes(comparisons: Sequence[Comparison], tensors: Sequence[StoredTensor]) -> int:
    """Bytes of one side of the comparisons."""
    return sum(
        c.copy.rows * c.copy.cols * ITEM_SIZE[tensors[c.copy.src].dtype] for c in comparisons
    )

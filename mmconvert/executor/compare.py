"""Compares regions of stored tensors: replicas of one checkpoint, or two checkpoints.

Bits are compared as bits; only where they differ are they read as numbers (``values``).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache

from mmconvert.executor.bands import steps
from mmconvert.executor.blockio import Region, read_compact, rows_range
from mmconvert.executor.differences import TensorDifference
from mmconvert.executor.fileio import BAND, BUFFERS, Files, open_files
from mmconvert.executor.jobs import Job, job_size, run_jobs
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

    def finished(job: Job, result: list[TensorDifference]) -> None:
        _add(found, result)
        if progress:
            progress(job.nbytes)

    run_jobs(comparison_jobs((a, b, cast), comparisons), workers, finished)
    return [found[pair] for pair in sorted(found)]


Sides = tuple[Sequence[StoredTensor], Sequence[StoredTensor], str]  # a, b and the dtype to cast to


def comparison_jobs(sides: Sides, comparisons: Sequence[Comparison]) -> list[Job]:
    """The jobs that look for differences and return them; the same comparisons give the same."""
    a = sides[0]
    most = job_size(comparison_bytes(comparisons, a))
    batches: list[list[Comparison]] = [[]]
    size = 0
    for piece in _pieces(comparisons, a, most):
        if size >= most:
            batches.append([])
            size = 0
        batches[-1].append(piece)
        size += comparison_bytes([piece], a)
    return [_job(sides, batch, number) for number, batch in enumerate(batches) if batch]


class Differences:
    """What one job finds that differs between tensors ``a`` and ``b``."""

    def __init__(
        self, a: Sequence[StoredTensor], b: Sequence[StoredTensor], cast: str = ""
    ) -> None:
        """For ``cast`` see :func:`compare`."""
        self.a, self.b = a, b
        self._cast = cast
        self._found: dict[tuple[int, int], TensorDifference] = {}

    def listed(self) -> list[TensorDifference]:
        """One for each pair of tensors at most."""
        return list(self._found.values())

    def look(self, files: Files, piece: Comparison) -> None:
        """Compares rectangles of both."""
        c = piece.copy
        region = Region(c.src_row, c.src_col, c.rows, c.cols)
        self.look_at(files, piece, read_compact(files, self.a[c.src], region, "left"))

    def look_at(self, files: Files, piece: Comparison, left: memoryview) -> None:
        """Compares a rectangle of ``a`` that is read already."""
        c = piece.copy
        one, other = self.a[c.src], self.b[c.dst]
        region = Region(c.dst_row, c.dst_col, c.rows, c.cols)
        right = read_compact(files, other, region, "right")
        if one.dtype != other.dtype:
            left, right, dtype = _alike(left, right, (one.dtype, other.dtype), self._cast)
            one, other = one._replace(dtype=dtype), other._replace(dtype=dtype)
        if not _equal(left, right):
            _add(self._found, [_describe(piece, one, other, left, right)])


def _add(found: dict[tuple[int, int], TensorDifference], more: Sequence[TensorDifference]) -> None:
    for difference in more:
        pair = difference.pair
        found[pair] = _first(found.get(pair), difference)


def _alike(
    left: memoryview, right: memoryview, dtypes: tuple[str, str], cast: str
) -> tuple[memoryview, memoryview, str]:
    """Values of two floating-point dtypes in one, which is told too."""
    sizes = [ITEM_SIZE[dtype] for dtype in dtypes]
    narrower = "F32" if sizes[0] == sizes[1] else dtypes[sizes.index(min(sizes))]
    dtype = cast or narrower
    one, other = (
        data if old == dtype else _rounded(data, old, dtype)
        for data, old in zip((left, right), dtypes, strict=True)
    )
    return one, other, dtype


def _rounded(data: memoryview, old: str, new: str) -> memoryview:
    """Values in another dtype."""
    from mmconvert.executor import rounding  # numpy: see _describe

    if (old, new) == ("F32", "BF16"):  # masters and weights, which may be all that there is
        out = BUFFERS.get("rounded", len(data) // 2)
        if rounding.rounded(data, out):
            return out
    return rounding.cast(data, old, new).bits


def _equal(left: memoryview, right: memoryview) -> bool:
    """Whether bits in writable buffers are equal, compared while other threads run."""
    if len(left) != len(right) or not left:
        return len(left) == len(right)
    return _compare()(left, right)


@cache
def _compare() -> Callable[[memoryview, memoryview], bool]:
    """Whether bits of one length are equal, by the C library's memcmp, which needs no interpreter:
    Python would compare views item by item.
    """
    from ctypes import CDLL, byref, c_char, c_int, c_size_t, c_void_p  # where something is compared

    memcmp = CDLL("msvcrt" if os.name == "nt" else None).memcmp
    memcmp.argtypes, memcmp.restype = (c_void_p, c_void_p, c_size_t), c_int
    at = c_char.from_buffer

    def equal(left: memoryview, right: memoryview) -> bool:
        return not memcmp(byref(at(left)), byref(at(right)), len(left))

    return equal


def _job(sides: Sides, batch: list[Comparison], number: int) -> Job:
    a, b, _ = sides

    def run(files: Files) -> list[TensorDifference]:
        found = Differences(*sides)
        for piece in _pieces(batch, a, BAND):
            found.look(files, piece)
        return found.listed()

    met: dict[tuple[int, int], tuple[int, int]] = {}  # rows by side and tensor: pieces adjoin
    for _, c in batch:
        for tensor, row in (((0, c.src), c.src_row), ((1, c.dst), c.dst_row)):
            first, last = met.get(tensor, (row, row))
            met[tensor] = min(first, row), max(last, row + c.rows)
    reads = tuple(
        r
        for (side, tensor), (first, last) in met.items()
        for r in rows_range((a, b)[side][tensor], first, last - first)
    )
    return Job((), ("comparisons", number), comparison_bytes(batch, a), run, reads)


def _pieces(
    comparisons: Iterable[Comparison], a: Sequence[StoredTensor], size: int
) -> Iterator[Comparison]:
    """The comparisons, cut into bands of rows of about so many bytes."""
    for key, c in comparisons:
        for top, bottom in steps(0, c.rows, max(1, c.cols * ITEM_SIZE[a[c.src].dtype]), size):
            rows = (c.src_row + top, c.dst_row + top, bottom - top)
            yield Comparison(key, c._replace(src_row=rows[0], dst_row=rows[1], rows=rows[2]))


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
        (c.src, c.dst),
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
            if _equal(data, memoryview(bytearray(len(data)))):
                continue
            from mmconvert.executor.values import nonzero  # see _describe

            gap = nonzero(data, tensor.dtype, zero.cols)
            if gap is None:
                continue
            index = (zero.row + gap.row, zero.col + gap.col)
            none = tensor._replace(name="zero")
            found.append(
                TensorDifference(
                    *(zero.key, (zero.tensor, zero.tensor), tensor, none, index, index),
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
            varies = varies or not _equal(left, memoryview(bytearray(first) * (len(left) // item)))
            if not _equal(left, read_compact(files, b, region, "right")):
                return False
    return True if varies else None


def comparison_bytes(comparisons: Sequence[Comparison], tensors: Sequence[StoredTensor]) -> int:
    """Bytes of one side of the comparisons."""
    return sum(
        c.copy.rows * c.copy.cols * ITEM_SIZE[tensors[c.copy.src].dtype] for c in comparisons
    )

"""Adds the products of adapters to bands of a weight: in float32, rounded once.

As PEFT's merge does it by default: ``scale * (B @ A)`` in float32, added in float32, and the sum
rounded to the dtype of the weight. Each element of ``B @ A`` is summed rank by rank with fused
multiply-adds by the BLAS that numpy has, as by torch's; so a band, a tensor-parallel part and the
whole have the same bits.
"""

# numpy's own types are written for a newer Python than the oldest that is served here.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mmconvert.errors import TensorError
from mmconvert.executor.bands import cut, steps
from mmconvert.executor.blockio import Region, read_compact, rect_offset, row_bytes
from mmconvert.executor.fileio import BUFFERS, Files, write_pieces
from mmconvert.executor.jobs import JOB_SIZE, Job
from mmconvert.executor.rounding import floats, from_floats, narrow, small, widen
from mmconvert.executor.values import Array
from mmconvert.plan.plan import Block, Copy, Plan, Term, matrix
from mmconvert.stored import StoredTensor

# OpenBLAS multiplies matrices of fewer multiplications than this by other kernels, which sum in
# another order; they are made larger with rows of zeros.
SMALL = 1_100_000
ELEMENTS = 1 << 19  # of a weight that are merged at a time: its buffers stay in the cache


def merges(
    plan: Plan, target: StoredTensor, copies: Sequence[Copy], products: Sequence[Copy]
) -> Iterator[Job]:
    """The jobs that write a weight to which products of adapters are added."""
    for top, bottom in steps(0, matrix(target.shape)[0], row_bytes(target), JOB_SIZE):
        base = cut(copies, top, bottom, source=False)
        added = cut(products, top, bottom, source=False)
        yield _job(plan, target, base, added, top, bottom)


def _job(
    plan: Plan,
    target: StoredTensor,
    copies: Sequence[Copy],
    products: Sequence[Copy],
    top: int,
    bottom: int,
) -> Job:
    def run(files: Files) -> None:
        for begin, bits in merged_bands(files, plan, target, copies, products, (top, bottom)):
            write_pieces(files, target.path, rect_offset(target, begin, 0), [bits])

    path = str(target.path)
    nbytes = (bottom - top) * row_bytes(target)
    return Job((path,), (path, rect_offset(target, top, 0)), nbytes, run, mixed=True)


def merged_bands(
    files: Files,
    plan: Plan,
    target: StoredTensor,
    copies: Sequence[Copy],
    products: Sequence[Copy],
    within: tuple[int, int] | None = None,
) -> Iterator[tuple[int, memoryview]]:
    """The bits of a merged weight, in bands: the first row of each, and its bits.

    Args:
        within: the rows that are asked for; None for all.

    Raises:
        TensorError: NaN or infinity in the sum.
    """
    adapters = Products(plan.sources, plan.terms)
    rows, width = matrix(target.shape)
    top, bottom = within or (0, rows)
    for begin, end in steps(top, bottom, width, ELEMENTS):
        band = _base(files, plan.sources, target, copies, begin, end)
        with np.errstate(all="ignore"):  # what is not finite is an error below
            adapters.add(files, band, begin, cut(products, begin, end, source=False))
        yield begin, _rounded(band, target, begin)


def _scratch(use: str, kind: str, rows: int, cols: int) -> Array:
    """A matrix in this thread's buffer of that ``use``: fresh memory would cost page faults."""
    item = np.dtype(kind).itemsize
    return np.frombuffer(BUFFERS.get(use, rows * cols * item), kind).reshape(rows, cols)


def _base(
    files: Files,
    sources: Sequence[StoredTensor],
    target: StoredTensor,
    copies: Sequence[Copy],
    top: int,
    bottom: int,
) -> Array:
    """A band of the base model's weight, in float32 or wider."""
    kind = "<f8" if target.dtype == "F64" else "<f4"
    band = _scratch("sum", kind, bottom - top, matrix(target.shape)[1])
    found = cut(copies, top, bottom, source=False)
    if sum(c.rows * c.cols for c in found) < band.size:
        band[:] = 0
    for c in found:
        source = sources[c.src]
        data = read_compact(files, source, Region(c.src_row, c.src_col, c.rows, c.cols), "base")
        at = c.dst_row - top
        part = band[at : at + c.rows, c.dst_col : c.dst_col + c.cols]
        if source.dtype == "BF16" and kind == "<f4":
            widen(data, part)
        else:
            part[:] = floats(data, source.dtype).reshape(c.rows, c.cols)
    return band


class Products:
    """The products of one job; what each term needs is read once.

    Args:
        sources: the plan's.
        terms: the plan's.
    """

    def __init__(self, sources: Sequence[StoredTensor], terms: Sequence[Term]) -> None:
        self._sources, self._terms = sources, terms
        self._a: dict[int, Array] = {}

    def add(self, files: Files, band: Array, top: int, copies: Sequence[Copy]) -> None:
        """Adds rectangles of products to a band of a target.

        Args:
            band: its values, in float32 or wider.
            top: the target's row that is the band's first.
            copies: rectangles of terms within the band.
        """
        for c in copies:
            term = self._terms[c.src]
            row, col, rows, cols = c.src_row, c.src_col, c.rows, c.cols
            if term.transposed:
                row, col, rows, cols = col, row, cols, rows
            product = matrix_of(files, self._sources, term.b, Region(row, 0, rows, term.rank))
            if term.a:
                product = multiply(product, self._whole_a(files, c.src)[:, col : col + cols])
            if term.scale != 1:
                np.multiply(product, np.float32(term.scale), out=product)
            first, last = c.dst_row - top, c.dst_row - top + c.rows
            band[first:last, c.dst_col : c.dst_col + c.cols] += (
                product.T if term.transposed else product
            )
            if term.magnitude >= 0:
                band[first:last] *= self._factors(files, term, band[first:last], row)

    def _factors(self, files: Files, term: Term, rows: Array, first: int) -> Array:
        """What DoRA multiplies whole rows with: their magnitude over their norm.

        Source: PEFT's ``DoraLinearVariant``; the norm is summed in float64 here.
        """
        source = self._sources[term.magnitude]
        region = Region(first, 0, len(rows), 1)
        magnitudes = floats(read_compact(files, source, region, "adapter"), source.dtype)
        norms = np.sqrt((rows.astype(np.float64) ** 2).sum(axis=1)).astype(np.float32)
        return (magnitudes.astype(np.float32) / norms)[:, None]

    def _whole_a(self, files: Files, number: int) -> Array:
        if number not in self._a:
            term = self._terms[number]
            whole = Region(0, 0, term.rank, term.cols)
            self._a[number] = matrix_of(files, self._sources, term.a, whole)
        return self._a[number]


def multiply(b: Array, a: Array) -> Array:
    """``b @ a`` in float32; the same bits for every part of a product."""
    rows, rank = b.shape
    least = -(-SMALL // max(1, rank * a.shape[1]))
    if rows < least:
        b = np.concatenate([b, np.zeros((least - rows, rank), b.dtype)])
    product = _scratch("product", "<f4", len(b), a.shape[1])
    return np.matmul(np.ascontiguousarray(b), np.ascontiguousarray(a), out=product)[:rows]


def matrix_of(
    files: Files, sources: Sequence[StoredTensor], blocks: Sequence[Block], region: Region
) -> Array:
    """A region of a matrix that blocks form, in float32."""
    found: Array = np.zeros((region.rows, region.cols), np.float32)
    for b in blocks:
        first = max(b.whole_row, region.row)
        last = min(b.whole_row + b.rows, region.row + region.rows)
        left = max(b.whole_col, region.col)
        right = min(b.whole_col + b.cols, region.col + region.cols)
        if first >= last or left >= right:
            continue
        source = sources[b.tensor]
        inside = Region(
            b.row + first - b.whole_row, b.col + left - b.whole_col, last - first, right - left
        )
        values = floats(read_compact(files, source, inside, "adapter"), source.dtype)
        found[first - region.row : last - region.row, left - region.col : right - region.col] = (
            values.reshape(last - first, right - left)
        )
    return found


def _rounded(band: Array, target: StoredTensor, top: int) -> memoryview:
    """The bits of a band in the dtype of its target, each value rounded once.

    Raises:
        TensorError: NaN or infinity among the values.
    """
    if target.dtype == "BF16" and small(band):
        return narrow(
            band, _scratch("rounding", "<u4", *band.shape), BUFFERS.get("rounded", band.size * 2)
        )
    bits, values = from_floats(band, target.dtype)
    bad = ~np.isfinite(values)
    if bad.any():
        row, col = (int(x) for x in np.argwhere(bad.reshape(band.shape))[0])
        raise TensorError(
            f"{target.name}: the merged value in row {top + row}, column {col} is "
            f"{values.reshape(band.shape)[row, col]}; {int(bad.sum())} such values in this part",
            "finite numbers in base model, adapter and their sum",
            "look for NaN and infinity with doctor; a scaling that is too large overflows fp16",
        )
    return bits

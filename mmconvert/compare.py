"""Compares rectangles of stored tensors: replicas of one checkpoint, or two checkpoints."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mmconvert.blockio import BAND, Bytes, Files, open_files, read_rect
from mmconvert.jobs import JOB_SIZE, Job, Progress, run_jobs
from mmconvert.plan import Comparison, Copy, Key, Zeros, matrix
from mmconvert.stored import ITEM_SIZE, StoredTensor


class Difference(NamedTuple):
    """Two stored tensors that should be equal and are not.

    Attributes:
        key: the whole tensor.
        a, b: the two tensors.
        a_index, b_index: (row, column) of the first difference in each, seen as matrices.
        a_value, b_value: the values there.
        largest: the largest absolute difference in the rectangles compared.
        elements: number of elements that differ there.
    """

    key: Key
    a: StoredTensor
    b: StoredTensor
    a_index: tuple[int, int]
    b_index: tuple[int, int]
    a_value: float
    b_value: float
    largest: float
    elements: int


def compare(
    comparisons: Sequence[Comparison],
    a: Sequence[StoredTensor],
    b: Sequence[StoredTensor],
    workers: int,
    progress: Progress | None = None,
) -> list[Difference]:
    """The differences, one for each pair of tensors at most, in the order of the tensors."""
    found: dict[tuple[int, int], Difference] = {}
    lock = threading.Lock()

    def look(files: Files, pieces: Sequence[Comparison]) -> None:
        for piece in pieces:
            c = piece.copy
            left = read_rect(files, a[c.src], c.src_row, c.src_col, c.rows, c.cols)
            right = read_rect(files, b[c.dst], c.dst_row, c.dst_col, c.rows, c.cols, "other")
            if not np.array_equal(left, right):
                difference = _describe(piece, a[c.src], b[c.dst], left, right)
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
    run_jobs(jobs, workers, progress)
    return [found[pair] for pair in sorted(found)]


def _job(look, batch: list[Comparison], size: int) -> Job:  # noqa: ANN001 - the closure above
    return Job(("", 0), size, lambda files: look(files, batch))


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
    piece: Comparison, a: StoredTensor, b: StoredTensor, left: Bytes, right: Bytes
) -> Difference:
    c: Copy = piece.copy
    unequal = left != right
    row, col = (int(x) for x in np.argwhere(unequal)[0])
    x, y = as_floats(left, a.dtype), as_floats(right, b.dtype)
    with np.errstate(all="ignore"):  # NaN and infinity are values like any other here
        gaps = np.abs(x - y)[unequal]
    return Difference(
        piece.key,
        a,
        b,
        (c.src_row + row, c.src_col + col),
        (c.dst_row + row, c.dst_col + col),
        float(x[row, col]),
        float(y[row, col]),
        float(np.nanmax(gaps)) if not np.isnan(gaps).all() else float("nan"),
        int(unequal.sum()),
    )


def _first(known: Difference | None, new: Difference) -> Difference:
    if known is None:
        return new
    first, other = (known, new) if known.a_index <= new.a_index else (new, known)
    return first._replace(
        largest=float(np.nanmax([first.largest, other.largest])),
        elements=first.elements + other.elements,
    )


def not_zero(zeros: Sequence[Zeros], tensors: Sequence[StoredTensor]) -> list[Difference]:
    """Rectangles that should hold zeros and do not, each as a difference from zero."""
    found: list[Difference] = []
    with open_files() as files:
        for zero in zeros:
            tensor = tensors[zero.tensor]
            data = read_rect(files, tensor, zero.row, zero.col, zero.rows, zero.cols)
            values = as_floats(data, tensor.dtype)
            if (values == 0).all():
                continue
            row, col = (int(x) for x in np.argwhere(values != 0)[0])
            index = (zero.row + row, zero.col + col)
            largest, count = float(np.abs(values).max()), int((values != 0).sum())
            none = tensor._replace(name="zero")
            found.append(
                Difference(
                    zero.key, tensor, none, index, index, values[row, col], 0.0, largest, count
                )
            )
    return found


def as_floats(data: Bytes, dtype: str) -> np.ndarray:
    """The values behind bits, as float64."""
    if dtype == "BF16":  # the upper half of a float32
        return (data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    kinds = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BOOL": "?"}
    kind = kinds.get(dtype, ("<u" if dtype[0] == "U" else "<i") + str(data.itemsize))
    if dtype.startswith("F8"):
        return data.astype(np.float64)  # the raw bits: numpy has no 8-bit floats
    return np.ascontiguousarray(data).view(kind).astype(np.float64)


def same_bytes(a: StoredTensor, b: StoredTensor) -> bool | None:
    """Whether two tensors hold the same bytes; None if ``a`` is one value throughout."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    rows, cols = matrix(a.shape)
    step = max(1, BAND // max(1, cols * ITEM_SIZE[a.dtype]))
    varies = False
    with open_files() as files:
        for row in range(0, rows, step):
            n = min(step, rows - row)
            left = read_rect(files, a, row, 0, n, cols)
            varies = varies or bool((left != left.flat[0]).any())
            if not np.array_equal(left, read_rect(files, b, row, 0, n, cols, "other")):
                return False
    return True if varies else None


def comparison_bytes(comparisons: Sequence[Comparison], tensors: Sequence[StoredTensor]) -> int:
    """Bytes of one side of the comparisons."""
    return sum(
        c.copy.rows * c.copy.cols * ITEM_SIZE[tensors[c.copy.src].dtype] for c in comparisons
    )


def place(tensor: StoredTensor) -> str:
    """A stored tensor in words: its name and the folder or file that holds it."""
    path = tensor.path
    where = path.parent.name if path.suffix == ".pt" else path.name
    return f"{tensor.name} in {where}"


def in_words(d: Difference) -> str:
    """A difference as one line."""
    return (
        f"{d.key.name()}: {place(d.a)} has {d.a_value:g} at {list(d.a_index)}, {place(d.b)} "
        f"{d.b_value:g} at {list(d.b_index)}; largest difference {d.largest:g}, "
        f"{d.elements} elements differ"
    )


def as_dict(d: Difference) -> dict[str, object]:
    """A difference as JSON."""
    return {
        "tensor": d.key.name(),
        "a": {"place": place(d.a), "index": list(d.a_index), "value": repr(d.a_value)},
        "b": {"place": place(d.b), "index": list(d.b_index), "value": repr(d.b_value)},
        "largest_difference": repr(d.largest),
        "elements": d.elements,
    }

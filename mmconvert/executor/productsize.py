"""Products of adapters as numbers: how large they are, and how far two of them are apart."""

# numpy's own types are written for a newer Python than the oldest that is served here.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mmconvert.executor.blockio import Region, read_compact
from mmconvert.executor.differences import TensorDifference
from mmconvert.executor.fileio import Files, open_files
from mmconvert.executor.products import Array, matrix_of, merged_bands
from mmconvert.plan.plan import Key, Plan, Term, matrix
from mmconvert.stored import ITEM_SIZE, StoredTensor

# Of the largest value: what the order of a sum may change in float64.
SAME = 1e-13
ROWS = 1024  # of a product that is in memory at a time


def compare_products(
    pairs: Iterable[tuple[Key, Term, Term]],
    left: Sequence[StoredTensor],
    right: Sequence[StoredTensor],
) -> list[TensorDifference]:
    """The products that differ, in float64."""
    found: list[TensorDifference] = []
    with open_files() as files:
        for key, one, other in pairs:
            if one.shape != other.shape:
                found.append(_difference(key, one, other, left, right, (0, 0), (0.0, 0.0), 0.0, 0))
                continue
            if _same_matrices(files, (left, one), (right, other)):
                continue
            for top in range(0, one.rows, ROWS):
                rows = min(ROWS, one.rows - top)
                x, y = (_rows(files, s, t, top, rows) for s, t in ((left, one), (right, other)))
                apart = np.abs(x - y)
                limit = SAME * max(float(np.abs(x).max()), float(np.abs(y).max()))
                if not (apart <= limit).all():
                    r, c = (int(i) for i in np.argwhere(~(apart <= limit))[0])
                    values = (float(x[r, c]), float(y[r, c]))
                    count, largest = int((~(apart <= limit)).sum()), float(apart.max())
                    place = (top + r, c)
                    found.append(
                        _difference(key, one, other, left, right, place, values, largest, count)
                    )
                    break
    return found


def _same_matrices(
    files: Files,
    one: tuple[Sequence[StoredTensor], Term],
    other: tuple[Sequence[StoredTensor], Term],
) -> bool:
    """Whether two products need not be formed, as they are of the same numbers."""
    (_, mine), (_, theirs) = one, other
    if (mine.rank, mine.scale) != (theirs.rank, theirs.scale):
        return False
    pairs = (
        [matrix_of(files, stored, term.b, Region(0, 0, term.rows, term.rank)),
         matrix_of(files, stored, term.a, Region(0, 0, term.rank, term.cols))]
        for stored, term in (one, other)
    )  # fmt: skip
    return all(np.array_equal(x, y) for x, y in zip(*pairs, strict=True))


def norm(files: Files, sources: Sequence[StoredTensor], term: Term) -> float:
    """The Frobenius norm of a product, from matrices of its rank alone."""
    a = matrix_of(files, sources, term.a, Region(0, 0, term.rank, term.cols)).astype(np.float64)
    b = matrix_of(files, sources, term.b, Region(0, 0, term.rows, term.rank)).astype(np.float64)
    gram_b, gram_a = np.einsum("ir,is->rs", b, b), np.einsum("ri,si->rs", a, a)
    square = float(np.einsum("rs,rs->", gram_b, gram_a))
    return abs(term.scale) * max(square, 0.0) ** 0.5


def zero(files: Files, sources: Sequence[StoredTensor], term: Term) -> bool:
    """Whether a term adds nothing, as B is zero."""
    return not matrix_of(files, sources, term.b, Region(0, 0, term.rows, term.rank)).any()


def _rows(files: Files, sources: Sequence[StoredTensor], term: Term, top: int, rows: int) -> Array:
    b = matrix_of(files, sources, term.b, Region(top, 0, rows, term.rank)).astype(np.float64)
    if not term.a:
        return b * term.scale
    a = matrix_of(files, sources, term.a, Region(0, 0, term.rank, term.cols)).astype(np.float64)
    return (b @ a) * term.scale


def _difference(
    key: Key,
    one: Term,
    other: Term,
    left: Sequence[StoredTensor],
    right: Sequence[StoredTensor],
    place: tuple[int, int],
    values: tuple[float, float],
    largest: float,
    count: int,
) -> TensorDifference:
    pair = one.b[0].tensor, other.b[0].tensor
    a, b = left[pair[0]], right[pair[1]]
    return TensorDifference(key, pair, a, b, place, place, *values, largest, count)


def unlike(plan: Plan, stored: Sequence[StoredTensor]) -> list[str]:
    """The tensors that are not what a merge would write, in words.

    Args:
        stored: those that exist, in the order of the plan's targets.
    """
    found: list[str] = []
    with open_files() as files:
        for number in sorted({copy.dst for copy in plan.products}):
            tensor = stored[number]
            copies = [c for c in plan.copies if c.dst == number]
            products = [c for c in plan.products if c.dst == number]
            bad = 0
            for top, bits in merged_bands(files, plan, tensor, copies, products):
                width = matrix(tensor.shape)[1]
                rows = len(bits) // (width * ITEM_SIZE[tensor.dtype])
                there = read_compact(files, tensor, Region(top, 0, rows, width), "merged")
                kind = f"<u{ITEM_SIZE[tensor.dtype]}"
                bad += int((np.frombuffer(bits, kind) != np.frombuffer(there, kind)).sum())
            if bad:
                found.append(f"{tensor.name}: {bad} values are not those of base and adapter")
    return found

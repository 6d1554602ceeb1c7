"""Makes plans: two sides joined in the space of wholes. See :mod:`plan` for the words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from mmconvert.errors import TensorError
from mmconvert.plan.dtypes import CAST_ALL, ONE_DTYPE, cast_dtype, mixed_dtypes
from mmconvert.plan.plan import (
    Block,
    Comparison,
    Copy,
    Key,
    Plan,
    Side,
    Whole,
    Zeros,
    matrix,
)
from mmconvert.stored import StoredTensor, Target


def join(src: Sequence[Block], dst: Sequence[Block]) -> list[Copy]:
    """The copies that bring blocks of one side to blocks of another, both of one whole."""
    copies: list[Copy] = []
    sources = sorted(src, key=lambda b: b.whole_row)
    tallest = max((b.rows for b in sources), default=0)
    starts = [b.whole_row for b in sources]
    for d in dst:
        first = _first_at_or_after(starts, d.whole_row - tallest)
        for s in sources[first:]:
            if s.whole_row >= d.whole_row + d.rows:
                break
            row = max(s.whole_row, d.whole_row)
            rows = min(s.whole_row + s.rows, d.whole_row + d.rows) - row
            col = max(s.whole_col, d.whole_col)
            cols = min(s.whole_col + s.cols, d.whole_col + d.cols) - col
            if rows > 0 and cols > 0:
                copies.append(
                    Copy(
                        s.tensor,
                        s.row + row - s.whole_row,
                        s.col + col - s.whole_col,
                        d.tensor,
                        d.row + row - d.whole_row,
                        d.col + col - d.whole_col,
                        rows,
                        cols,
                    )
                )
    return copies


def _first_at_or_after(starts: list[int], row: int) -> int:
    from bisect import bisect_left

    return bisect_left(starts, row)


def in_dtype(wholes: Mapping[Key, Whole], dtype: str) -> dict[Key, Whole]:
    """The wholes as they can be written: floating-point ones in another dtype; "" leaves each as
    it is.

    Raises:
        TensorError: a whole of several dtypes, and no dtype that all of it is cast to.
    """
    found = {
        key: replace(w, dtype=w.dtype if w.keeps_dtype else cast_dtype(w.dtype, dtype))
        for key, w in wholes.items()
    }
    if mixed := mixed_dtypes(found):
        raise TensorError(mixed, ONE_DTYPE, CAST_ALL)
    return found


def build(src: Side, dst: Side, notes: Sequence[str] = (), cast: str = "") -> Plan:
    """The plan that makes ``dst`` of ``src``.

    Args:
        cast: the dtype that floating-point tensors of ``src`` have in ``dst``; "" is each its own.

    Raises:
        TensorError: the sides do not hold the same wholes, in the same shapes and dtypes.
    """
    check_same_wholes(replace(src, wholes=in_dtype(src.wholes, cast)), dst)
    plan = Plan(src.stored, dst.targets, [], [], list(notes), cast=cast, rounded=src.rounded)
    for key, whole in src.wholes.items():
        original, *others = whole.copies
        for blocks in dst.wholes[key].copies:
            plan.copies += join(original, blocks)
            plan.kept |= {b.tensor for b in blocks} if whole.keeps_dtype else set()
            plan.fills += zeros_of(key, whole, blocks)
        for blocks in others:
            plan.replicas += [Comparison(key, copy) for copy in join(original, blocks)]
        for blocks in whole.copies:
            plan.zeros += zeros_of(key, dst.wholes[key], blocks)
    for key, term, blocks in src.scaled:
        mine = [block._replace(tensor=len(plan.terms)) for block in blocks]
        plan.terms.append(term)
        plan.products += [c for target in dst.wholes[key].copies for c in join(mine, target)]
    return plan


def zeros_of(key: Key, other: Whole, blocks: Sequence[Block]) -> list[Zeros]:
    """The rectangles of a side's blocks that are zeros on the other side."""
    return [
        Zeros(
            key,
            b.tensor,
            b.row + first - b.whole_row,
            b.col + left - b.whole_col,
            last - first,
            right - left,
        )
        for gap in other.zeros
        for b in blocks
        if (first := max(gap.row, b.whole_row))
        < (last := min(gap.row + gap.rows, b.whole_row + b.rows))
        and (left := max(gap.col, b.whole_col))
        < (right := min(gap.col + gap.cols, b.whole_col + b.cols))
    ]


def carry(plan: Plan, tensors: Sequence[StoredTensor]) -> Plan:
    """The plan with tensors that are copied as they are."""
    sources, targets = list(plan.sources), list(plan.targets)
    copies = list(plan.copies)
    for tensor in tensors:
        rows, cols = matrix(tensor.shape)
        copies.append(Copy(len(sources), 0, 0, len(targets), 0, 0, rows, cols))
        sources.append(tensor)
        targets.append(Target(tensor.name, cast_dtype(tensor.dtype, plan.cast), tensor.shape))
    return replace(plan, sources=sources, targets=targets, copies=copies)


class ComparedPairs(NamedTuple):
    """What must hold for two checkpoints to be the same model, every copy included."""

    equal: list[Comparison]
    zeros_a: list[Zeros]
    zeros_b: list[Zeros]


def build_comparison(a: Side, b: Side) -> ComparedPairs:
    """What must hold for two checkpoints to be the same model.

    Raises:
        TensorError: they do not hold the same wholes, in the same shapes and dtypes.
    """
    check_same_wholes(a, b)
    pairs = ComparedPairs([], [], [])
    for key, whole in a.wholes.items():
        other = b.wholes[key]
        joined = [(blocks, other.copies[0]) for blocks in whole.copies]
        joined += [(whole.copies[0], blocks) for blocks in other.copies[1:]]
        for one, two in joined:
            pairs.equal.extend(Comparison(key, copy) for copy in join(one, two))
        for blocks in whole.copies:
            pairs.zeros_a.extend(zeros_of(key, other, blocks))
        for blocks in other.copies:
            pairs.zeros_b.extend(zeros_of(key, whole, blocks))
    return pairs


def check_same_wholes(src: Side, dst: Side) -> None:
    """Raises TensorError unless both sides hold the same wholes in the same shapes and dtypes."""
    for key in [*src.wholes, *dst.wholes]:
        if key not in src.wholes or key not in dst.wholes:
            where = "source" if key not in src.wholes else "destination"
            raise TensorError(f"{key.name()} is not in the {where}", "the same tensors in both")
    for key, a in src.wholes.items():
        b = dst.wholes[key]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise TensorError(
                f"{key.name()} is {a.dtype} {list(a.shape)} in the source and {b.dtype} "
                f"{list(b.shape)} in the destination",
                "the same shape and dtype in both",
                "give the hf_dir from which this checkpoint was made",
            )

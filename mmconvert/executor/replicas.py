"""Copies of one tensor that must be equal: compared while the original's bytes pass, so that each
is read once. What does not pass in one piece is compared by jobs of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from mmconvert.errors import ReplicaError
from mmconvert.executor.compare import Differences, Sides, comparison_jobs
from mmconvert.executor.fileio import Files
from mmconvert.executor.jobs import Job
from mmconvert.plan.plan import Comparison, Copy, Plan, matrix
from mmconvert.plan.proof import Rect, covers

Pairs = frozenset[tuple[int, int]]


class Replicas(NamedTuple):
    """What is compared on the way.

    Attributes:
        sides: the tensors that are compared, on both sides the plan's sources.
        passing: the comparisons of each source all of whose elements pass.
        repeats: (source, target) of copies at which nothing is compared once more.
    """

    sides: Sides
    passing: Mapping[int, Sequence[Comparison]]
    repeats: Pairs

    def look(self, files: Files, c: Copy, left: memoryview | None) -> None:
        """Compares what a copy reads with its replicas.

        Args:
            left: the bits that it has read, row by row; None if they are not at hand.

        Raises:
            ReplicaError: they differ.
        """
        if (c.src, c.dst) in self.repeats:
            return
        found = Differences(*self.sides)
        for key, known in self.passing.get(c.src, ()):
            top, bottom = _overlap(c.src_row, c.rows, known.src_row, known.rows)
            first, last = _overlap(c.src_col, c.cols, known.src_col, known.cols)
            if top >= bottom or first >= last:
                continue
            other = (known.dst_row + top - known.src_row, known.dst_col + first - known.src_col)
            size = (bottom - top, last - first)
            piece = Comparison(key, Copy(c.src, top, first, known.dst, *other, *size))
            if left is None or last - first < c.cols:
                found.look(files, piece)
            else:
                line = len(left) // c.rows
                part = left[(top - c.src_row) * line : (bottom - c.src_row) * line]
                found.look_at(files, piece, part)
            if found.listed():
                raise differing()


def differing() -> ReplicaError:
    """That they differ, without the details: those take a look at all of them."""
    return ReplicaError("copies of one tensor differ", "the same values in every copy")


def on_the_way(plan: Plan, repeats: Pairs) -> tuple[Replicas, list[Job]]:
    """What is compared while a plan's copies pass, and the jobs that compare the rest.

    Args:
        repeats: (source, target) of copies that write once more what another target has too.
    """
    sides = plan.sources, plan.sources, plan.cast
    merged = {product.dst for product in plan.products}
    read: dict[int, list[Rect]] = defaultdict(list)
    for c in plan.copies if plan.replicas else ():
        if (c.src, c.dst) not in repeats and c.dst not in merged:
            read[c.src].append(Rect(c.src_row, c.src_col, c.rows, c.cols))
    passing: dict[int, list[Comparison]] = defaultdict(list)
    rest: list[Comparison] = []
    for pair in plan.replicas:
        passing[pair.copy.src].append(pair)
    for src in list(passing):
        if not covers(read[src], *matrix(plan.sources[src].shape), once=False):
            rest += passing.pop(src)
    jobs = comparison_jobs(sides, rest)
    return Replicas(sides, passing, repeats), [job._replace(run=_strict(job)) for job in jobs]


def _strict(job: Job) -> Callable[[Files], None]:
    def run(files: Files) -> None:
        if job.run(files):
            raise differing()

    return run


def _overlap(start: int, size: int, other: int, other_size: int) -> tuple[int, int]:
    return max(start, other), min(start + size, other + other_size)

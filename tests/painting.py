"""Plans painted on arrays: no arithmetic of mmconvert is used. And what property tests share."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings

from mmconvert.config import Options
from mmconvert.plan.plan import Plan, matrix
from nights import examples

DRY = Options(dry_run=True, workers=1)
NORMAL = Options(workers=2)


def tries(count: int, nightly: int = 0) -> Callable[[Any], Any]:
    """The settings of a property with `count` examples, or another number of them nightly."""
    return settings(
        examples(count, nightly or count),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@contextmanager
def folder() -> Iterator[Path]:
    """A folder of one example, removed after it."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def assert_none(lines: list[str]) -> None:
    assert not lines, "\n".join(lines[:10])


def painted(plan: Plan) -> list[str]:
    """What is wrong with a plan, found by painting: no arithmetic of mmconvert is used."""
    writes = [np.zeros(matrix(t.shape), np.int32) for t in plan.targets]
    reads = [np.zeros(matrix(t.shape), np.int32) for t in plan.sources]
    lines: list[str] = []

    def paint(canvas: np.ndarray, row: int, col: int, rows: int, cols: int, name: str) -> None:
        if min(row, col) < 0 or row + rows > canvas.shape[0] or col + cols > canvas.shape[1]:
            lines.append(f"{name}: a rectangle reaches outside")
        else:
            canvas[row : row + rows, col : col + cols] += 1

    for c in plan.copies:
        paint(writes[c.dst], c.dst_row, c.dst_col, c.rows, c.cols, plan.targets[c.dst].name)
        paint(reads[c.src], c.src_row, c.src_col, c.rows, c.cols, plan.sources[c.src].name)
        if plan.targets[c.dst].dtype != plan.sources[c.src].dtype:
            lines.append(f"{plan.targets[c.dst].name}: another dtype")
    for _, c in plan.replicas:
        paint(reads[c.src], c.src_row, c.src_col, c.rows, c.cols, plan.sources[c.src].name)
        paint(reads[c.dst], c.dst_row, c.dst_col, c.rows, c.cols, plan.sources[c.dst].name)
    for target, canvas in zip(plan.targets, writes, strict=True):
        if not (canvas == 1).all():
            lines.append(f"{target.name}: written {canvas.min()} to {canvas.max()} times")
    for source, canvas in zip(plan.sources, reads, strict=True):
        if not (canvas >= 1).all():
            lines.append(f"{source.name}: {int((canvas == 0).sum())} elements are not used")
    return lines

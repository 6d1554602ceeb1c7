"""Copies of one tensor are compared while the original is moved: early and late differences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mmconvert.errors import ReplicaError
from mmconvert.executor.execute import jobs_of
from mmconvert.executor.jobs import run_jobs
from mmconvert.plan.plan import Comparison, Copy, Key, Plan
from mmconvert.stored import StoredTensor, Target

ROWS, COLS = 900, 800  # of 4 bytes: several bands
KEY = Key("weight", -1)
WHOLE = (Copy(0, 0, 0, 0, 0, 0, ROWS, COLS),)
IN_COLUMNS = (
    Copy(0, 0, 0, 0, 0, 0, ROWS, 300),
    Copy(0, 0, 300, 1, 0, 0, ROWS, COLS - 300),
)
TWICE = (*WHOLE, Copy(0, 0, 0, 1, 0, 0, ROWS, COLS))
PLANS = {"whole": WHOLE, "in columns": IN_COLUMNS, "to two targets": TWICE}
NARROW = [Copy(0, 0, 500, 1, 0, 500, ROWS, 300), Copy(0, 0, 0, 1, 0, 0, ROWS, 500)]
LOW = [Copy(0, 400, 0, 1, 400, 0, ROWS - 400, COLS), Copy(0, 0, 0, 1, 0, 0, 400, COLS)]
COMPARED = {"whole": [Copy(0, 0, 0, 1, 0, 0, ROWS, COLS)], "in columns": NARROW, "in rows": LOW}


def move(
    folder: Path, one: np.ndarray, other: np.ndarray, copies: Sequence[Copy], pairs: list[Copy]
) -> list[np.ndarray]:
    """Moves the first of two replicas."""
    sources: list[StoredTensor] = []
    for name, array in (("one", one), ("other", other)):
        (folder / name).write_bytes(bytes(40) + array.tobytes())
        sources.append(StoredTensor(name, "F32", array.shape, folder / name, 40))
    targets: list[Target] = []
    places: list[StoredTensor] = []
    for c in copies:
        targets.append(Target(f"t{c.dst}", "F32", (c.rows, c.cols)))
        path = folder / targets[-1].name
        path.write_bytes(bytes(targets[-1].nbytes))
        places.append(StoredTensor(path.name, "F32", (c.rows, c.cols), path, 0))
    plan = Plan(sources, targets, list(copies), [Comparison(KEY, pair) for pair in pairs])
    run_jobs(jobs_of(plan, places), 2)
    return [np.fromfile(p.path, "<u4").reshape(p.shape) for p in places]


def numbers() -> np.ndarray:
    return np.random.default_rng(1).integers(1 << 28, 1 << 29, (ROWS, COLS), dtype="<u4")


@pytest.mark.parametrize("pairs", COMPARED.values(), ids=COMPARED.keys())
@pytest.mark.parametrize("copies", PLANS.values(), ids=PLANS.keys())
def test_equal(copies: Sequence[Copy], pairs: list[Copy], tmp_path: Path) -> None:
    one = numbers()
    found = move(tmp_path, one, one.copy(), copies, pairs)
    for c, array in zip(copies, found, strict=True):
        np.testing.assert_array_equal(array, one[:, c.src_col : c.src_col + c.cols])


@pytest.mark.parametrize("at", [(0, 0), (ROWS - 1, COLS - 1), (ROWS // 2, 499), (1, 500)])
@pytest.mark.parametrize("pairs", COMPARED.values(), ids=COMPARED.keys())
@pytest.mark.parametrize("copies", PLANS.values(), ids=PLANS.keys())
def test_one_value_differs(
    copies: Sequence[Copy], pairs: list[Copy], at: tuple[int, int], tmp_path: Path
) -> None:
    one, other = numbers(), numbers()
    other[at] += 1
    with pytest.raises(ReplicaError):
        move(tmp_path, one, other, copies, pairs)


def test_what_no_copy_moves_is_compared_too(tmp_path: Path) -> None:
    """The lower half has no target; it is compared by a job of its own."""
    one, other = numbers(), numbers()
    other[-1, -1] += 1
    half = [Copy(0, 0, 0, 0, 0, 0, ROWS // 2, COLS)]
    with pytest.raises(ReplicaError):
        move(tmp_path, one, other, half, COMPARED["whole"])

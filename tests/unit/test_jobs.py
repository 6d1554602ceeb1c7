"""The jobs of large tensors, by kind: real files, of several bands, against numpy."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mmconvert.estimate import BUFFERS_EACH
from mmconvert.executor.execute import jobs_of
from mmconvert.executor.fileio import BAND, open_files
from mmconvert.executor.jobs import Job, JobQueue, run_jobs
from mmconvert.plan.plan import Copy, Plan
from mmconvert.plan.proof import prove
from mmconvert.stored import StoredTensor, Target

ROWS, COLS = 1500, 900  # of 4 bytes: more than five bands


def numbers(rows: int, cols: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 32, (rows, cols), dtype="<u4")


def moved(
    folder: Path, arrays: Sequence[np.ndarray], offsets: Sequence[int], plan: Sequence[Copy]
) -> list[np.ndarray]:
    """What the targets of a plan hold, each in a file of its own, as are its sources."""
    sources: list[StoredTensor] = []
    for i, (array, offset) in enumerate(zip(arrays, offsets, strict=True)):
        path = folder / f"source{i}"
        path.write_bytes(bytes(offset) + array.tobytes() + bytes(64))
        sources.append(StoredTensor(f"s{i}", "F32", array.shape, path, offset))
    targets: list[Target] = []
    places: list[StoredTensor] = []
    for i in sorted({copy.dst for copy in plan}):
        mine = [copy for copy in plan if copy.dst == i]
        rows, cols = (max(c[k] + c[k + 2] for c in mine) for k in (4, 5))
        targets.append(Target(f"t{i}", "F32", (rows, cols)))
        path = folder / f"target{i}"
        path.write_bytes(bytes(rows * cols * 4))
        places.append(StoredTensor(f"t{i}", "F32", (rows, cols), path, 0))
    made = Plan(sources, targets, list(plan), [])
    prove(made)
    run_jobs(jobs_of(made, places), 2)
    return [np.fromfile(p.path, "<u4").reshape(p.shape) for p in places]


def test_stream_from_two_files_whose_offsets_adjoin(tmp_path: Path) -> None:
    """The second tensor begins in its file where the first ends in another."""
    one, two = numbers(2000, 900, 1), numbers(3000, 900, 2)
    plan = [Copy(0, 0, 0, 0, 0, 0, 2000, 900), Copy(1, 0, 0, 0, 2000, 0, 3000, 900)]
    (found,) = moved(tmp_path, [one, two], [64, 64 + one.nbytes], plan)
    np.testing.assert_array_equal(found, np.concatenate([one, two]))


@pytest.mark.parametrize("seam", [300, 450])
def test_scatter_columns(seam: int, tmp_path: Path) -> None:
    whole = numbers(ROWS, COLS, seam)
    plan = [Copy(0, 0, 0, 0, 0, 0, ROWS, seam), Copy(0, 0, seam, 1, 0, 0, ROWS, COLS - seam)]
    left, right = moved(tmp_path, [whole], [16], plan)
    np.testing.assert_array_equal(left, whole[:, :seam])
    np.testing.assert_array_equal(right, whole[:, seam:])


@pytest.mark.parametrize("seam", [300, 450])
def test_gather_columns(seam: int, tmp_path: Path) -> None:
    left, right = numbers(ROWS, seam, 1), numbers(ROWS, COLS - seam, 2)
    plan = [Copy(0, 0, 0, 0, 0, 0, ROWS, seam), Copy(1, 0, 0, 0, 0, seam, ROWS, COLS - seam)]
    (found,) = moved(tmp_path, [left, right], [16, 0], plan)
    np.testing.assert_array_equal(found, np.concatenate([left, right], axis=1))


@pytest.mark.parametrize(("old", "new"), [("F32", "BF16"), ("BF16", "F32")])
def test_a_cast_holds_no_more_than_the_estimate_says(old: str, new: str, tmp_path: Path) -> None:
    shape = (8 * BAND // 4096, 1024)
    source = StoredTensor("s", old, shape, tmp_path / "source", 0)
    place = StoredTensor("t", new, shape, tmp_path / "target", 0)
    for tensor in (source, place):
        tensor.path.write_bytes(bytes(tensor.nbytes))
    copies = [Copy(0, 0, 0, 0, 0, 0, *shape)]
    jobs = jobs_of(Plan([source], [Target("t", new, shape)], copies, [], cast=new), [place])
    tracemalloc.start()
    try:
        with open_files() as files:
            for job in jobs:
                job.run(files)
        assert tracemalloc.get_traced_memory()[1] < BUFFERS_EACH * BAND
    finally:
        tracemalloc.stop()


def test_what_reads_between_its_writes_is_done_last() -> None:
    jobs = [Job(("file",), ("file", i), 1, lambda files: None, mixed=i in {0, 2}) for i in range(4)]
    queue = JobQueue(jobs)
    assert [job.place[1] for job in iter(queue.take, None)] == [1, 3, 0, 2]

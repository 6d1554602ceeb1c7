"""File systems on which each call takes a while: many large reads under way at a time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from commands import hf_to_mm, layout
from mmconvert.disks import is_near, kind_of
from mmconvert.executor.execute import jobs_of
from mmconvert.executor.jobs import MOST_THREADS, run_jobs
from mmconvert.plan.plan import Copy, Plan
from mmconvert.stored import StoredTensor, Target
from mmread import compare_mm
from slowfiles import Seen, slow

ROWS, COLS = 64 << 10, 1 << 10  # 64 MiB
pytestmark = pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="the kernel has no FUSE")


def copied(folder: Path, workers: int) -> Seen:
    """What a file server has seen while one large tensor was copied from it."""
    path = folder / "far" / "weights"
    path.parent.mkdir(parents=True)
    path.write_bytes(os.urandom(COLS) * ROWS)
    (folder / "out").write_bytes(b"")
    os.truncate(folder / "out", ROWS * COLS)
    with slow(path.parent, folder / "mount") as seen:
        source = StoredTensor("a", "U8", (ROWS, COLS), folder / "mount" / path.name, 0)
        assert kind_of(source.path) == "fuse.slow" and is_near(source.path) is False
        target = Target("a", "U8", (ROWS, COLS))
        plan = Plan([source], [target], [Copy(0, 0, 0, 0, 0, 0, ROWS, COLS)], [])
        run_jobs(jobs_of(plan, [source._replace(path=folder / "out")]), workers)
    assert (folder / "out").read_bytes() == path.read_bytes()
    return seen


def test_many_large_reads_at_a_time(tmp_path: Path) -> None:
    """Far more than one thread and the kernel's own reading ahead have under way."""
    one, many = copied(tmp_path / "one", 1).found, copied(tmp_path / "many", 0).found
    assert many["most"] >= max(2 * one["most"], MOST_THREADS - 4)
    assert many["nbytes"] / many["reads"] >= 100 << 10  # the kernel cuts them; no page faults


def test_a_conversion(tied_hf: Path, tied_mm: Path, tmp_path: Path, out: Path) -> None:
    with slow(tied_hf, tmp_path / "mount"):
        hf_to_mm(tmp_path / "mount", out, *layout("[4]", "[2]"))
    assert not compare_mm(tied_mm, out)

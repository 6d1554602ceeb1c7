"""What a conversion will take: disk, memory, time. Time from a short probe of the real jobs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

try:
    import resource
except ImportError:  # Windows: what is in use is not counted
    resource = None

from mmconvert.errors import MMConvertError
from mmconvert.executor.execute import jobs_of
from mmconvert.executor.fileio import BAND
from mmconvert.executor.jobs import MOST_THREADS, Job, cores, run_jobs, threads_for
from mmconvert.executor.staging import free_bytes
from mmconvert.plan.plan import Plan
from mmconvert.stored import StoredTensor

PROBE_SECONDS = 0.4
PROBE_FILES = 8  # files that the probe writes, at most
PROBE_ROUND = 1  # jobs for each thread between two looks at the clock
BUFFERS_EACH = 10  # times BAND bytes that one thread holds, at most: where it casts and compares


@dataclass(frozen=True)
class Estimate:
    """What a conversion will take.

    Attributes:
        disk_needed: bytes of the output, side files included.
        disk_free: bytes free where it goes; None if that cannot be known.
        memory: bytes of resident memory at the peak.
        seconds: wall time; None where nothing could be measured.
    """

    disk_needed: int
    disk_free: int | None
    memory: int
    seconds: float | None

    def as_dict(self) -> dict[str, object]:
        """As JSON."""
        return {
            "disk_needed_bytes": self.disk_needed,
            "disk_free_bytes": self.disk_free,
            "peak_memory_bytes": self.memory,
            "seconds": None if self.seconds is None else round(self.seconds, 1),
        }


def estimate(plan: Plan, folder: Path, disk_needed: int, workers: int) -> Estimate:
    """What it will take to write a plan's output to ``folder``."""
    return Estimate(
        disk_needed,
        free_bytes(folder),
        _memory(workers or min(cores(), MOST_THREADS)),
        _seconds(plan, folder, workers),
    )


def _memory(workers: int) -> int:
    """What this process, with the whole plan in memory, has used so far; and its buffers."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes, but bytes on macOS
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if resource else 0
    return used + workers * BUFFERS_EACH * BAND


def _seconds(plan: Plan, folder: Path, workers: int) -> float | None:
    """Runs a sample of the jobs into files without a name, which vanish with this process."""
    parent = next((p for p in (folder, *folder.parents) if p.is_dir()), None)
    if parent is None or not hasattr(os, "O_TMPFILE") or not plan.nbytes:
        return None
    try:
        with ExitStack() as stack:
            sample = jobs_of(replace(plan, replicas=[]), _places(plan, parent, stack))
            return plan.nbytes / _speed(sample, threads_for(sample, workers))
    except (OSError, MMConvertError, ZeroDivisionError):  # a disk without such files, or full
        return None


def _places(plan: Plan, parent: Path, stack: ExitStack) -> list[StoredTensor]:
    """The targets, laid one after the other over a few files without a name."""
    paths: list[Path] = []
    for _ in range(PROBE_FILES):
        fd = os.open(parent, os.O_TMPFILE | os.O_RDWR, 0o600)
        stack.callback(os.close, fd)
        paths.append(Path(f"/proc/self/fd/{fd}"))
    ends = dict.fromkeys(paths, 0)
    chunks = sorted({t.chunk for t in plan.targets if t.chunk is not None})
    number = {chunk: i for i, chunk in enumerate(chunks)}
    places: list[StoredTensor] = []
    for target in plan.targets:
        path = paths[number[target.chunk] % PROBE_FILES if target.chunk is not None else 0]
        places.append(StoredTensor(target.name, target.dtype, target.shape, path, ends[path]))
        ends[path] += target.nbytes
    return places


def _speed(jobs: Sequence[Job], workers: int) -> float:
    """Bytes per second of jobs from all over the plan, until the time is over."""
    stride = max(1, len(jobs) // 64)
    left = [job for start in range(stride) for job in jobs[start::stride]]
    moved = 0
    began = time.monotonic()
    while left and time.monotonic() - began < PROBE_SECONDS:
        now, left = left[: workers * PROBE_ROUND], left[workers * PROBE_ROUND :]
        run_jobs(now, workers)
        moved += sum(job.nbytes for job in now)
    return moved / (time.monotonic() - began)

"""Runs jobs over threads, spread over the files; the first failure ends all."""

from __future__ import annotations

import os
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import NamedTuple

from mmconvert.blockio import Files, open_files

JOB_SIZE = 32 << 20  # bytes of one job, about: large enough for speed, small enough to share out

Progress = Callable[[int], None]


class Job(NamedTuple):
    """Work for one thread: ``run`` moves ``nbytes``; ``place`` orders jobs along the files."""

    place: tuple[str, int]
    nbytes: int
    run: Callable[[Files], None]


def default_workers() -> int:
    """One thread for each core that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def run_jobs(jobs: Sequence[Job], workers: int, progress: Progress | None = None) -> None:
    """Runs jobs over threads; the first failure ends all and is raised."""
    stop = threading.Event()
    queue = _Queue(jobs)

    def work() -> None:
        while not stop.is_set() and (job := queue.take()) is not None:
            try:
                with open_files() as files:
                    job.run(files)
            finally:
                queue.done(job)
            if progress:
                progress(job.nbytes)

    with ThreadPoolExecutor(max(1, min(workers, len(jobs)))) as pool:
        futures = [pool.submit(work) for _ in range(min(workers, len(jobs)))]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            stop.set()
            for future in futures:
                future.result()
        finally:  # also after Ctrl-C: no job outlives this call
            stop.set()


class _Queue:
    """Hands out jobs along each file, and spreads the threads over the files.

    Two threads that write one file wait for each other inside the kernel, so each next job is
    of the file with the fewest threads on it, and among these of the one with most left to do.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[str, deque[Job]] = defaultdict(deque)
        self._left: dict[str, int] = defaultdict(int)
        self._active: dict[str, int] = defaultdict(int)
        for job in sorted(jobs, key=lambda job: job.place):
            self._waiting[job.place[0]].append(job)
            self._left[job.place[0]] += job.nbytes

    def take(self) -> Job | None:
        """The next job, or None when none is waiting."""
        with self._lock:
            if not self._waiting:
                return None
            path = min(self._waiting, key=lambda p: (self._active[p], -self._left[p]))
            job = self._waiting[path].popleft()
            if not self._waiting[path]:
                del self._waiting[path]
            self._active[path] += 1
            self._left[path] -= job.nbytes
            return job

    def done(self, job: Job) -> None:
        """A job has ended."""
        with self._lock:
            self._active[job.place[0]] -= 1

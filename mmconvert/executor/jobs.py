"""Runs jobs over processes or threads, spread over the files; the first failure ends all."""

from __future__ import annotations

import os
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import islice
from typing import Any, NamedTuple

from mmconvert.disks import is_near
from mmconvert.executor.fileio import ByteRange, Files, expect, open_files

AHEAD = 4  # jobs whose bytes are asked for before their turn
BLAS_THREADS = "OPENBLAS_NUM_THREADS"
JOB_SIZE = 32 << 20  # bytes of one job, about: large enough for speed, small enough to share out
LEAST_JOB = 4 << 20  # bytes of one job where all is small
FORK_LEAST = 128 << 20  # bytes of jobs that are worth the milliseconds that forks take
# Threads that write one file take turns inside the kernel. More of them are slower (measured on 16
# cores: 9.9 GB/s into two files with 4 threads, 8.3 with 16; 16.7 into four files with 16).
FILE_THREADS = 4
# Threads that are chosen where nobody asks for a number: one for each core, up to so many, which
# move 32 GB/s into 16 files (measured) and hold 60 MB. Across a network it is calls under way that
# count, whatever the cores.
MOST_THREADS = 16


class Job(NamedTuple):
    """Work for one thread or process: ``run`` moves ``nbytes``.

    Attributes:
        writes: the files that it writes.
        place: orders the jobs that write the same files, along one file.
        nbytes: bytes moved.
        run: does it, maybe in a forked process, so that what it finds is what it returns: of jobs
            that move bytes, what casts have lost, or None.
        reads: what it reads, as far as it is worth fetching before.
        mixed: it reads between its writes, which leaves room for another that writes to the same
            file: only one does at a time. So these are done last, when there may be fewer files
            than processes.
    """

    writes: tuple[str, ...]
    place: tuple[str, int]
    nbytes: int
    run: Callable[[Files], Any]
    reads: tuple[ByteRange, ...] = ()
    mixed: bool = False


Done = Callable[[Job, Any], None]  # a job, and what it has returned


def job_size(nbytes: int) -> int:
    """Bytes of one job of work on so many bytes: there should be some for each of many threads."""
    return max(LEAST_JOB, min(JOB_SIZE, nbytes // 128 >> 20 << 20))


def cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def threads_for(jobs: Sequence[Job], asked: int) -> int:
    """How many threads run jobs fastest.

    Args:
        asked: at most so many; 0 is one for each core, and more across a network.
    """
    writes = {path for job in jobs for path in job.writes}
    reads = {span.path for job in jobs for span in job.reads}
    if any(is_near(path) is False for path in (*writes, *reads)):
        most = asked or MOST_THREADS
    else:
        most = asked or min(cores(), MOST_THREADS)
        most = min(most, FILE_THREADS * len(writes) or len(jobs))
    return max(1, min(most, len(jobs)))


def run_jobs(jobs: Sequence[Job], workers: int, finished: Done | None = None) -> None:
    """Runs jobs; the first failure ends all and is raised.

    Args:
        workers: the number of processes or threads at most; 0 chooses it.
        finished: called after each job with what it returned, by one thread at a time.
    """
    queue, count = JobQueue(jobs), threads_for(jobs, workers)
    if count > 1 and sum(job.nbytes for job in jobs) >= FORK_LEAST:
        from mmconvert.executor.workers import can_fork, run_in_processes  # of large work alone

        if can_fork() and run_in_processes(jobs, queue, count, finished):
            return
    _run_in_threads(queue, count, finished)


def _run_in_threads(queue: JobQueue, count: int, finished: Done | None) -> None:
    stop = threading.Event()
    telling = threading.Lock()

    def work() -> None:
        with open_files() as files:
            while not stop.is_set() and (job := queue.take()) is not None:
                try:
                    expect(files, (j.reads for j in queue.upcoming(job)))  # while we copy
                    result = job.run(files)
                finally:
                    queue.done(job)
                files.trim()
                if finished:
                    with telling:
                        finished(job, result)

    from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait  # slow to load

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(work) for _ in range(count)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            stop.set()
            for future in futures:
                future.result()
        finally:  # also after Ctrl-C: no job outlives this call
            stop.set()


class JobQueue:
    """Hands out jobs along each file, and spreads the threads over the files.

    Two threads that write one file wait for each other inside the kernel, so each next job is
    of the group of files with the fewest threads on them, and among these of the group with
    most left to do.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[tuple[str, ...], deque[Job]] = defaultdict(deque)
        self._left: dict[tuple[str, ...], int] = defaultdict(int)
        self._active: dict[str, int] = defaultdict(int)  # threads by file
        self._told: dict[tuple[str, ...], int] = defaultdict(int)  # waiting jobs told of already
        for job in sorted(jobs, key=lambda job: (job.mixed, job.place)):
            self._waiting[job.writes].append(job)
            self._left[job.writes] += job.nbytes

    def take(self) -> Job | None:
        """The next job, or None when none is waiting."""
        with self._lock:
            if not self._waiting:
                return None
            group = min(self._waiting, key=lambda g: (self._threads(g), -self._left[g]))
            job = self._waiting[group].popleft()
            if not self._waiting[group]:
                del self._waiting[group]
            self._left[group] -= job.nbytes
            self._told[group] = max(0, self._told[group] - 1)
            for path in group:
                self._active[path] += 1
            return job

    def upcoming(self, job: Job) -> list[Job]:
        """The jobs after this one, as far as no call before has told."""
        with self._lock:
            waiting = self._waiting.get(job.writes, ())
            told = self._told[job.writes]
            self._told[job.writes] = max(told, min(AHEAD, len(waiting)))
            return list(islice(waiting, told, AHEAD))

    def _threads(self, group: tuple[str, ...]) -> int:
        return sum(self._active[path] for path in group)

    def done(self, job: Job) -> None:
        """A job has ended."""
        with self._lock:
            for path in job.writes:
                self._active[path] -= 1


def load_numpy() -> None:
    """Imports numpy, whose matrix products then take one thread: the jobs are the threads here, and
    with threads of its own below each of them OpenBLAS spends its time waiting. Without effect
    where numpy is there already.
    """
    set_here = BLAS_THREADS not in os.environ
    if set_here:
        os.environ[BLAS_THREADS] = "1"
    import_module("mmconvert.executor.rounding")
    if set_here:
        del os.environ[BLAS_THREADS]

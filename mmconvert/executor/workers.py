"""Jobs in processes that are forked from this one.

Threads of one process take turns at the interpreter.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn, cast

from mmconvert.errors import LostProcessError, MMConvertError
from mmconvert.executor.crew import Crew
from mmconvert.executor.fileio import Files, expect, open_files

if TYPE_CHECKING:
    from mmconvert.executor.jobs import Done, Job, JobQueue

LENGTH = 8  # bytes before each message, which say how long it is
THREADS = {"sync", "ranks"}  # ours; rich has one that draws
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_DEATH = 1  # PR_SET_PDEATHSIG, prctl(2)


def can_fork() -> bool:
    """Whether processes of their own are safe.

    A child finds every lock as it was, and for ever: so not beside threads of the program that
    calls us, nor where torch may have started its own.
    """
    return (
        sys.platform == "linux"
        and "torch" not in sys.modules
        and threading.current_thread() is threading.main_thread()
        and all(_harmless(thread) for thread in threading.enumerate())
    )


def _harmless(thread: threading.Thread) -> bool:
    rich = type(thread).__module__.startswith("rich.")
    return rich or thread.name in THREADS or thread is threading.main_thread()


class Worker:
    """A child process, as its parent sees it.

    Attributes:
        job: what it does now.
        answers: the descriptor of its answers.
    """

    def __init__(self, jobs: Sequence[Job], others: Sequence[Worker]) -> None:
        """Forks."""
        self.job: Job | None = None
        inbox, self._orders = os.pipe()
        self.answers, outbox = os.pipe()
        parent = os.getpid()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads: see can_fork
            self._pid = _forked(inbox, outbox, self._orders, self.answers)
        if not self._pid:
            for worker in (*others, self):  # else the end of this process would go unnoticed
                worker.hang_up()
            _serve(jobs, inbox, outbox, parent)
        os.close(inbox)
        os.close(outbox)

    def order(self, job: Job, numbers: Sequence[int]) -> None:
        """Hands out a job: the numbers of it and of those that come after it."""
        self.job = job
        with suppress(BrokenPipeError):  # it is gone: its answer will say so
            _send(self._orders, numbers)

    def answer(self) -> Any:  # noqa: ANN401 - what the job returned
        """What its job gave.

        Raises:
            MMConvertError: what the job has raised; LostProcessError if the process is gone.
            Exception: a fault of mmconvert, with the traceback in the child as its cause.
        """
        message = _receive(self.answers)
        if message is None:
            _, status = os.waitpid(self._pid, 0)
            self._pid = 0
            raise LostProcessError(
                f"a process that copies ended with exit code {os.waitstatus_to_exitcode(status)}",
                "that it lives to the end of the conversion",
                "see in the system's log whether memory ran out, and run the same command again",
            )
        error, trace, result = message
        if error is not None:
            raise error from (RuntimeError(trace) if trace else None)
        return result

    def hang_up(self) -> None:
        """Closes this side's ends of the pipes."""
        os.close(self._orders)
        os.close(self.answers)

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self.hang_up()
        if self._pid:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            with suppress(ChildProcessError):  # of a program that ignores SIGCHLD
                os.waitpid(self._pid, 0)


def run_in_processes(
    jobs: Sequence[Job], queue: JobQueue, count: int, finished: Done | None
) -> bool:
    """Runs jobs in ``count`` processes, or as many as there can be; the first failure is raised.

    Returns:
        whether there could be any: if not, nothing was done.
    """
    import select  # not on Windows as it is here

    _prctl()  # loaded once, for all
    gc.freeze()  # else collecting in a child would copy the pages of all objects
    numbers = {id(job): number for number, job in enumerate(jobs)}
    workers: list[Worker] = []

    def employ(worker: Worker) -> None:
        if (job := queue.take()) is not None:
            worker.order(job, [numbers[id(j)] for j in (job, *queue.upcoming(job))])

    try:
        _fork(workers, jobs, count, employ)
        crew = Crew(len(workers))
        by_answers = {worker.answers: worker for worker in workers}
        poll = select.poll()
        for worker in workers:
            poll.register(worker.answers, select.POLLIN)
        while any(worker.job for worker in workers):
            for descriptor, _ in poll.poll():
                worker = by_answers[descriptor]
                job, worker.job = worker.job, None
                result = worker.answer()
                if job is None:
                    continue
                queue.done(job)
                crew.ended(job.nbytes)
                idle = [worker for worker in workers if worker.job is None]
                busy = len(workers) - len(idle)
                for worker in idle[: max(0, crew.size - busy)]:
                    employ(worker)
                if finished:
                    finished(job, result)
        return bool(workers)
    finally:  # also after Ctrl-C: no job outlives this call
        for worker in workers:
            worker.end()
        gc.unfreeze()


def _forked(*pipes: int) -> int:
    """A new process, or its parent's view of it; without one the pipes are closed."""
    try:
        return os.fork()
    except OSError:
        for descriptor in pipes:
            os.close(descriptor)
        raise


def _fork(
    workers: list[Worker], jobs: Sequence[Job], count: int, employ: Callable[[Worker], None]
) -> None:
    """Adds ``count`` workers, each at work before the next one is made. Signals wait meanwhile:
    what their handlers raise in the middle of a fork is lost.
    """
    came: list[int] = []
    before = {n: signal.signal(n, lambda number, _: came.append(number)) for n in SIGNALS}
    try:
        with suppress(OSError):  # no more are allowed here: fewer do as well
            for _ in range(count):
                workers.append(Worker(jobs, workers))
                employ(workers[-1])
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    for number in came:
        signal.raise_signal(number)


def _serve(jobs: Sequence[Job], inbox: int, outbox: int, parent: int) -> NoReturn:
    """Does what is ordered until the parent hangs up."""
    try:
        for number in SIGNALS:  # the parent decides, and ends us
            signal.signal(number, signal.SIG_IGN)
        _prctl()(_DEATH, signal.SIGKILL)
        with open_files() as files:
            while os.getppid() == parent and (order := _receive(inbox)) is not None:
                number, *upcoming = cast("list[int]", order)
                expect(files, (jobs[n].reads for n in upcoming))  # the disk works while we copy
                _send(outbox, _done(jobs[number], files))
    finally:
        os._exit(0)


def _done(job: Job, files: Files) -> tuple[Exception | None, str, object]:
    try:
        return None, "", job.run(files)
    except MMConvertError as error:
        return error, "", None
    except Exception as error:  # ours: it is raised where it can be told
        import traceback  # never needed

        return RuntimeError(f"{type(error).__name__}: {error}"), traceback.format_exc(), None
    finally:
        files.trim()


def _send(fd: int, message: object) -> None:
    data = pickle.dumps(message)
    data = len(data).to_bytes(LENGTH, "little") + data
    while data:
        data = data[os.write(fd, data) :]


def _receive(fd: int) -> Any:  # noqa: ANN401 - whatever the other side has sent
    """A message of our own other half; None at the end."""
    head = _read(fd, LENGTH)
    data = _read(fd, int.from_bytes(head or b"", "little")) if head else None
    return None if data is None else pickle.loads(data)  # noqa: S301 - our own child or parent


def _read(fd: int, nbytes: int) -> bytes | None:
    data = b""
    while len(data) < nbytes:
        more = os.read(fd, nbytes - len(data))
        if not more:
            return None
        data += more
    return data


def _prctl() -> Any:  # noqa: ANN401 - a function of the C library
    from ctypes import CDLL  # of use here alone

    return CDLL(None).prctl

"""Conversions that are stopped at an exact point, each in a process of its own.

As a program, ``python stopping.py SIGNAL PLACE COUNT WORD ...`` runs ``mm-convert WORD ...`` and
sends itself SIGNAL when COUNT jobs are noted in the journal: with the PLACE ``after`` right then,
with ``before`` when the next job is done but not noted. SIGNAL 0 is no signal: from then on the
process may write no large file, as on a full disk. Of several processes only the one of rank
$STOP_RANK, or 0, stops.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from forked import Forked
from mmconvert import cli
from mmconvert.executor.casts import Loss
from mmconvert.executor.jobs import Job
from mmconvert.executor.journal import PREFIX, Journal

Done = subprocess.CompletedProcess[str]


def command(number: int, place: str, count: int, *words: str | Path) -> list[str]:
    """The words after ``python`` or ``torchrun``."""
    return [__file__, str(int(number)), place, str(count), *map(str, words)]


def stopped(
    *words: str | Path,
    number: signal.Signals = signal.SIGKILL,
    place: str = "after",
    count: int = 1,
    cwd: Path | None = None,
) -> Done:
    """Run ``mm-convert`` with `words` up to the point where it is stopped.

    A run that has too few jobs is a fault of the test, and fails it.
    """
    given = [str(word) for word in words]

    def program() -> int:
        os.chdir(cwd or Path.cwd())
        return _run(int(number), place, count, given)

    with closing(Forked(program)) as child:
        code, errors = child.ends()
    expected = -9 if number == signal.SIGKILL else 130
    assert code == expected, f"{code}\n{errors}"
    return Done(given, code, "", errors)


def staging(out: Path) -> Path:
    """The folder in which the files of `out` are made."""
    return out.with_name(f".{out.name}.mmconvert-partial")


def noted(out: Path) -> int:
    """Number of finished jobs that the journals of an interrupted run tell of."""
    journals = staging(out).glob(f"{PREFIX}.*")
    return sum(len(path.read_bytes().splitlines()) - 1 for path in journals)


def _run(number: int, place: str, count: int, words: list[str]) -> int:
    """In a process of its own, which ends after this."""
    note, seen = Journal.add, 0

    def stop() -> None:
        if not number:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, resource.RLIM_INFINITY))
            return
        os.kill(os.getpid(), number)
        time.sleep(1)  # the main thread now ends the run; this thread must not run ahead of it

    def add(self: Journal, job: Job, losses: Mapping[str, Loss]) -> None:
        nonlocal seen
        if place == "before" and seen == count:
            stop()
            return  # so the job is not noted
        note(self, job, losses)
        seen += 1
        if place == "after" and seen == count:
            stop()

    if os.environ.get("RANK", "0") == os.environ.get("STOP_RANK", "0"):
        Journal.add = add
    return cli.main(words, launched=True)


if __name__ == "__main__":
    sys.exit(_run(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:]))

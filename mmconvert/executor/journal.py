"""What an interrupted conversion had done already, so that the next run goes on from there.

The journal lies in the staging folder. Its first line says which request it belongs to and since
which start of the machine; then comes one line for each finished job. Bytes that a killed process
has written are safe in the system's cache, but not if the machine itself went down: the journal
of another start of the machine, or of another machine, counts for nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from itertools import chain
from pathlib import Path

from mmconvert.executor.casts import Loss, LossByTensor
from mmconvert.executor.jobs import Job
from mmconvert.plan.plan import Plan
from mmconvert.positioned import BINARY
from mmconvert.version import VERSION

PREFIX = ".mmconvert-journal"  # then number and machine: each process of a run keeps its own
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | BINARY
_BOOT = Path("/proc/sys/kernel/random/boot_id")  # Linux, proc(5)

# What reading a damaged journal may raise.
_SENSELESS = (OSError, ValueError, TypeError, AttributeError, RecursionError)

Finished = dict[str, LossByTensor]  # by job_key


def boot_id() -> str:
    """Names this start of this machine; "" where that is not known, and nothing is resumed."""
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def request_of(plan: Plan, extra: object) -> str:
    """A digest of all that decides which bytes are written where.

    Args:
        extra: what beside the plan decides it, such as weight files and their headers, and the
            state of the files that are read.
    """
    added = (plan.terms, plan.products)
    numbers = list(chain.from_iterable(plan.copies))  # without the names of each copy's fields
    parts = (VERSION, plan.sources, plan.targets, numbers, plan.fills, added, extra)
    return blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def job_key(job: Job, folder: Path) -> str:
    """Names a job, the same in every run of one request, wherever the staging folder lies."""
    base = f"{folder}{os.sep}"
    places = [str(path).removeprefix(base) for path in (*job.writes, job.place[0])]
    words = "\0".join([*places, str(job.place[1]), str(job.nbytes)])
    return blake2b(words.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()


def read(folder: Path, request: str, boots: Iterable[str], files: Mapping[str, int]) -> Finished:
    """The finished jobs of earlier runs of this very request; empty if there are none.

    Args:
        boots: the boot ids of the machines of this run.
        files: path below ``folder`` -> size, of the files that the jobs write. If one is not
            there as it was left, what was done counts for nothing: a new one would be empty.
    """
    found: Finished = {}
    try:
        if not all(_in_place(folder / name, size) for name, size in files.items()):
            return {}
        for path in sorted(folder.glob(f"{PREFIX}.*")):
            head, *lines = path.read_bytes().split(b"\n")
            if head not in {_head(request, boot) for boot in boots if boot}:
                return {}
            for line in lines[:-1]:  # what follows the last newline was cut off by the kill
                key, _, losses = line.decode("ascii").partition(" ")
                found[key] = _losses(losses)
    except _SENSELESS:
        return {}
    return found


def _in_place(path: Path, size: int) -> bool:
    """Whether a regular file of this size is there, and no link leads to it."""
    return os.path.realpath(path) == str(path) and path.is_file() and path.stat().st_size == size


def _head(request: str, boot: str) -> bytes:
    return f"{request} {boot}".encode()


def _torn(path: Path) -> int:
    """Bytes after a journal's last whole line."""
    return len(path.read_bytes().rpartition(b"\n")[2])


def _losses(text: str) -> LossByTensor:
    if not text:
        return {}
    found = {name: Loss(*counts) for name, counts in json.loads(text).items()}
    if not all(type(count) is int for loss in found.values() for count in loss):
        raise ValueError("a loss is no number")
    return found


class Journal:
    """Notes the jobs that this process finishes."""

    def __init__(self, folder: Path, request: str, number: int = 0) -> None:
        """Opens it for appending; the file is made if there is none."""
        self._folder = folder
        # The boot id in the name: with other machines in the next run, a process may get the
        # number that one of another machine had, and its jobs must not pass for that machine's.
        path = folder / f"{PREFIX}.{number}.{boot_id()}"
        new = not path.exists()
        self._fd = os.open(path, _APPEND, 0o600)
        if new:
            os.write(self._fd, _head(request, boot_id()) + b"\n")
        elif torn := _torn(path):
            os.ftruncate(self._fd, path.stat().st_size - torn)

    def add(self, job: Job, losses: LossByTensor) -> None:
        """A job is done. One write call, so that a kill leaves whole lines but the last."""
        words = job_key(job, self._folder)
        if losses:
            words += " " + json.dumps({name: list(loss) for name, loss in losses.items()})
        os.write(self._fd, words.encode("ascii") + b"\n")

    def close(self) -> None:
        """No more jobs."""
        os.close(self._fd)


def remove(folder: Path) -> None:
    """Takes the journals out of a staging folder that is complete."""
    for path in folder.glob(f"{PREFIX}.*"):
        path.unlink()

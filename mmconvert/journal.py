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
from pathlib import Path

from mmconvert.casts import Loss
from mmconvert.jobs import Job, Losses
from mmconvert.plan import Plan
from mmconvert.version import VERSION

PREFIX = ".mmconvert-journal"  # then a number: each process of a run keeps its own
_BOOT = Path("/proc/sys/kernel/random/boot_id")  # Linux, proc(5)

Finished = dict[str, Losses]  # by job_key


def boot_id() -> str:
    """Names this start of this machine; "" where that is not known, and nothing is resumed."""
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def request_of(plan: Plan, extra: object) -> str:
    """A digest of all that decides which bytes are written where.

    Args:
        extra: what beside the plan decides it, such as weight files and their headers.

    Raises:
        OSError: a source file is gone.
    """
    sources = {str(p): _state(p) for p in sorted({t.path for t in plan.sources})}
    parts = (VERSION, sources, plan.sources, plan.targets, plan.copies, plan.fills, extra)
    return blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def job_key(job: Job, folder: Path) -> str:
    """Names a job, the same in every run of one request, wherever the staging folder lies."""
    base = f"{folder}{os.sep}"
    places = [str(path).removeprefix(base) for path in (*job.writes, job.place[0])]
    words = "\0".join([*places, str(job.place[1]), str(job.nbytes)])
    return blake2b(words.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()


def read(folder: Path, request: str, boots: Iterable[str]) -> Finished:
    """The finished jobs of earlier runs of this very request; empty if there are none.

    Args:
        boots: the boot ids of the machines of this run.
    """
    found: Finished = {}
    try:
        for path in sorted(folder.glob(f"{PREFIX}.*")):
            head, *lines = path.read_bytes().split(b"\n")
            if head not in {_head(request, boot) for boot in boots if boot}:
                return {}
            for line in lines[:-1]:  # what follows the last newline was cut off by the kill
                key, _, losses = line.decode("ascii").partition(" ")
                found[key] = _losses(losses)
    except (OSError, ValueError, TypeError, AttributeError):  # a journal that makes no sense
        return {}
    return found


def _head(request: str, boot: str) -> bytes:
    return f"{request} {boot}".encode()


def _losses(text: str) -> Losses:
    if not text:
        return {}
    return {name: Loss(*counts) for name, counts in json.loads(text).items()}


class Journal:
    """Notes the jobs that this process finishes."""

    def __init__(self, folder: Path, request: str, number: int = 0) -> None:
        """Opens it for appending; the file is made if there is none."""
        self._folder = folder
        path = folder / f"{PREFIX}.{number}"
        new = not path.exists()
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        if new:
            os.write(self._fd, _head(request, boot_id()) + b"\n")

    def add(self, job: Job, losses: Mapping[str, Loss]) -> None:
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

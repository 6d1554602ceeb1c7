"""What conversions leave beside their output when they are killed (see ``output``)."""

from __future__ import annotations

import os
from pathlib import Path

from mmconvert import durable
from mmconvert.tools.doctor.report import DoctorReport
from mmconvert.tools.doctor.shell import line, operand

try:
    import fcntl
except ImportError:  # not POSIX: nobody can be asked
    fcntl = None

PARTIAL, OLD = ".mmconvert-partial", ".mmconvert-old"


def look_beside(path: Path, report: DoctorReport) -> None:
    """Staging folders of conversions into ``path``; a running one holds a lock on its own."""
    final = Path(os.path.realpath(path))
    partial, old = (durable.beside(final, end) for end in (PARTIAL, OLD))
    there = os.path.lexists(final)
    running = partial.is_dir() and is_locked(partial)
    if running:
        report.add(
            "running-conversion",
            f"a conversion into {final} is running: it holds {partial}",
            "wait until it has ended, then run doctor again; remove nothing",
            path=partial,
        )
    elif partial.is_dir():
        report.add(
            "unfinished-output",
            f"{partial} is what a killed conversion into {final} left; it is not complete",
            "run the same conversion again: it goes on from there; or remove the folder",
            path=partial,
            command=line(["rm", "-r", operand(partial)]),
        )
    if not old.is_dir() or running:
        return
    if there:
        report.add(
            "old-output",
            f"{old} is the former content of {final}: a conversion with --overwrite was killed "
            "before it removed it",
            f"remove it, unless you want the former checkpoint instead of the one in {final}",
            path=old,
            command=line(["rm", "-r", operand(old)]),
        )
    else:
        report.add(
            "interrupted-replacement",
            f"{final} does not exist, and {old} is its former content: a conversion with "
            "--overwrite was killed between two renames",
            "give it its name back",
            path=old,
            command=line(["mv", operand(old), operand(final)]),
        )


def staged_for(path: Path) -> Path | None:
    """The output that a staging folder is for, or None if ``path`` is no staging folder."""
    name = path.resolve().name
    for end in (PARTIAL, OLD):
        if name.startswith(".") and name.endswith(end) and len(name) > len(end) + 1:
            return path.resolve().with_name(name[1 : -len(end)])
    return None


def is_locked(folder: Path) -> bool:
    """Whether a running conversion holds the folder.

    Asking takes a shared lock for an instant; a conversion that starts in that very instant
    would find the folder taken, and says so.
    """
    if fcntl is None:
        return False
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False

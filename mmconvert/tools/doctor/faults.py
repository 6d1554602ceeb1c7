"""What a reader has found, as findings: with an id, and the shell line that mends it."""

from __future__ import annotations

import os
from pathlib import Path

from mmconvert.errors import FormError, MMConvertError
from mmconvert.formats.faults import Collected
from mmconvert.formats.mm.ranks import TRACKER
from mmconvert.formats.mm.source import TRANSPOSED
from mmconvert.formats.mm.tracker import newest, tracker_word
from mmconvert.tools.doctor.report import DoctorReport
from mmconvert.tools.doctor.shell import (
    drop_flags,
    line,
    move_aside,
    operand,
    quote,
    unused,
    write_tracker,
)

# Causes of which the one file at fault gets another name where it stands.
RENAMED = {"stale-index", "index-not-read", "partial-weight-file"}
TRACKERS = {"missing-tracker", "damaged-tracker", "dangling-tracker"}
HEADS = {"tied-head-missing", "tied-head-superfluous"}  # resplit writes them as they should be
DROPPED = 20  # names that one command leaves out


def report_faults(found: Collected, root: Path, report: DoctorReport) -> None:
    """Adds faults and remarks to a report.

    Args:
        root: what was examined; things that do not belong in it are moved beside it.
    """
    for error in [*found.errors, *found.remarks]:
        if isinstance(error, FormError) and report.has([error.cause]):  # the same in every file
            report.more[error.cause] = report.more.get(error.cause, 0) + 1
            continue
        command, flags = command_of(error, root), _flags(error)
        report.add_error("refused", error, path=root, command=command, flags=flags)


def command_of(error: MMConvertError, root: Path) -> str:
    """The shell line that mends it; "" if none can."""
    path = error.path or root
    if error.cause in RENAMED:
        return line(["mv", operand(path), operand(unused(path, ".old"))])
    if error.aside:
        return move_aside(error.aside, _outside(root))
    if error.cause in TRACKERS and (there := newest(root)):
        return write_tracker(root / TRACKER, tracker_word(there))
    if error.cause == "lfs-pointer":
        return line(["git", "-C", operand(path.parent), "lfs", "pull"])
    if error.cause == "pp-suffix-without-pp" and _all_end_in_zeros(path):
        folder = quote(operand(path))
        return f'for d in {folder}/mp_rank_*_000; do mv "$d" "${{d%_000}}"; done'
    return ""


def _outside(root: Path) -> Path:
    """What set-aside files may stand beside: the checkpoint, of which ``root`` may be a part."""
    inside = root.name == "release" or root.name.startswith("iter_")
    return root.parent if inside and root.parent.name else Path(os.path.normpath(root))


def _all_end_in_zeros(folder: Path) -> bool:
    return all(path.name.endswith("_000") for path in folder.glob("mp_rank_*"))


def _flags(error: MMConvertError) -> tuple[str, ...] | None:
    """What resplit needs for it; None if that does not mend it."""
    if error.cause == "unknown-tensor" and len(error.tensors) <= DROPPED:
        return drop_flags(error.tensors)
    if error.cause == TRANSPOSED:
        return ("--experts", "transposed")
    return () if error.cause in HEADS else None

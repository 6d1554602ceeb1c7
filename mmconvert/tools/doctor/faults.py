"""What a reader has found, as findings: with an id, and the shell line that mends it."""

from __future__ import annotations

import os
from pathlib import Path

from mmconvert.errors import MMConvertError
from mmconvert.formats.faults import Collected
from mmconvert.tools.doctor.report import DoctorReport
from mmconvert.tools.doctor.shell import line, move_aside, operand, unused

# Causes of which the one file at fault gets another name where it stands.
RENAMED = {"stale-index", "index-not-read", "partial-weight-file"}


def report_faults(found: Collected, root: Path, report: DoctorReport) -> None:
    """Adds faults and remarks to a report.

    Args:
        root: what was examined; things that do not belong in it are moved beside it.
    """
    for error in [*found.errors, *found.remarks]:
        report.add_error("refused", error, path=root, command=command_of(error, root))


def command_of(error: MMConvertError, root: Path) -> str:
    """The shell line that mends it; "" if none can."""
    if error.cause in RENAMED:
        (path,) = error.aside
        return line(["mv", operand(path), operand(unused(path, ".old"))])
    if error.aside:
        return move_aside(error.aside, Path(os.path.normpath(root)))
    if error.cause == "lfs-pointer" and error.path is not None:
        return line(["git", "-C", operand(error.path.parent), "lfs", "pull"])
    return ""

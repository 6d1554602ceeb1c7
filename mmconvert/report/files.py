"""Report files: written whole or not at all, and never over something else."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from mmconvert import durable
from mmconvert.errors import OutputError, RequestError, cannot_write

HEADS = (b"<!doctype html", b"<svg")  # how our reports begin; only such files are replaced


def check_reports(*paths: Path | None, overwrite: bool) -> list[Path]:
    """The reports that are asked for; each may be written. Asked before the long work.

    Raises:
        RequestError: one file for two reports; OutputError: see :func:`check_report`.
    """
    expected = [path for path in paths if path is not None]
    if len({os.path.realpath(path) for path in expected}) < len(expected):
        raise RequestError(f"--html and --svg are both {expected[0]}", "two files")
    for path in expected:
        check_report(path, overwrite=overwrite)
    return expected


def check_report(path: Path, *, overwrite: bool) -> None:
    """Whether a report may be written there.

    Raises:
        OutputError: something is there, or the folder is not.
    """
    if path.is_dir():
        raise OutputError(
            f"{path} is a folder", "the name of a file", "add the file's name to the path"
        )
    if not path.parent.is_dir():
        raise OutputError(
            f"{path}: the folder {path.parent} does not exist",
            "a file in a folder that exists",
            "make the folder, or choose another place",
        )
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise OutputError(
            f"{path} exists",
            "a file that does not exist yet",
            "choose another name, or give --overwrite to replace it",
        )
    if not _is_report(path):
        raise OutputError(
            f"{path} is not a report, so --overwrite does not replace it",
            "an HTML or SVG report, or a file that does not exist yet",
            "choose another name, or remove the file yourself",
        )


def _is_report(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError:
        return False
    return not head or head.lower().startswith(HEADS)


def write_report(path: Path, text: str, *, overwrite: bool) -> None:
    """Writes a report under a temporary name beside the file, and gives it its name when complete.

    Raises:
        OutputError: see :func:`check_report`; or the system refuses.
    """
    check_report(path, overwrite=overwrite)
    final = Path(os.path.realpath(path))
    partial = durable.beside(final, f".{os.getpid()}.mmconvert-partial")
    try:
        with partial.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            durable.sync_fd(file.fileno())
        durable.replace(partial, final)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink()

"""Whether an output is apart from all that is read, whatever mounts and links lie between.

Paths tell less than they seem to: a bind mount shows a folder under a second name, and a link in
an input folder may lead into the very folder that is to be replaced. Devices and inodes tell.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from mmconvert.disks import mounts
from mmconvert.errors import OutputError

Identity = tuple[int, int]  # device and inode


def identity(path: Path) -> Identity | None:
    """Device and inode behind a path, links followed; None if nothing is there to be told."""
    with suppress(OSError):
        status = os.stat(path)
        if status.st_ino:  # some file systems number nothing
            return status.st_dev, status.st_ino
    return None


def check_apart(final: Path, inputs: Iterable[Path]) -> None:
    """Raises OutputError if an output is, holds or lies in an input, by name or by inode."""
    final = Path(os.path.realpath(final))
    above = _names(final.parents)
    for given in inputs:
        path = Path(os.path.realpath(given))
        if _names([final]) & _names([path]):
            relation = "is the input"
        elif _names([final]) & _names(path.parents):
            relation = f"holds the input {path}"
        elif _names([path]) & above:
            relation = f"is inside the input {path}"
        else:
            continue
        raise OutputError(
            f"the output {final} {relation}",
            "an output folder apart from the inputs",
            "choose another output folder",
        )


def _names(paths: Iterable[Path]) -> set[object]:
    """Paths and what stands behind each."""
    return {name for path in paths for name in (path, identity(path)) if name is not None}


def check_survives(places: Iterable[Path], read: Mapping[Identity, Path]) -> None:
    """Raises OutputError if replacing or emptying these folders would remove what is read.

    Args:
        places: folders, or files.
        read: all that the conversion reads, by device and inode.
    """
    for place in places:
        for path in _below(place):
            with suppress(OSError):  # another run is at work there
                status = os.lstat(path)
                if source := read.get((status.st_dev, status.st_ino)):
                    raise OutputError(
                        f"{path}, which this conversion would remove, is the same as its input "
                        f"{source}",
                        "an output folder apart from the inputs",
                        "choose another output folder, or give the input's folder another name",
                    )


def _below(place: Path) -> Iterator[str]:
    yield str(place)
    for here, folders, files in os.walk(place):
        yield from (os.path.join(here, name) for name in (*folders, *files))


def is_mount_point(path: Path) -> bool:
    """Whether a file system, or a part of one, is mounted right there."""
    if os.path.ismount(path):
        return True
    # A part of the same file system: ismount sees no difference.
    return str(path) in {mount.point for mount in mounts()}

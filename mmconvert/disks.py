"""Where a file lies, as far as it decides how its bytes are best read and written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

_MOUNTS = Path("/proc/self/mountinfo")  # Linux, proc(5); fields are parted by spaces
_POINT = 4  # the mount point, in which spaces and the like are written in octal

# File systems whose bytes lie in this machine's memory or on its disks. All others are reached
# through a network or through a program: each call costs a round trip.
_NEAR = {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs", "tmpfs", "ramfs", "overlay"}


class Mount(NamedTuple):
    """Where a file system, or a part of one, is mounted, and its kind."""

    point: str
    kind: str


def mounts() -> Iterator[Mount]:
    """All mounts that this process sees, later ones over earlier ones; none where none are told."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        fields, _, kind = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields.split(" ")[_POINT])
        yield Mount(point, kind.split(" ")[0])


def kind_of(path: str | Path) -> str:
    """The kind of file system that a file lies on, links followed; "" if the system tells none."""
    return _kind_of(os.path.dirname(os.path.realpath(path)))


@lru_cache(maxsize=4096)
def _kind_of(folder: str) -> str:
    found = Mount("", "")
    for mount in mounts():
        inside = f"{folder}/".startswith(f"{mount.point.rstrip('/')}/")
        if inside and len(mount.point) >= len(found.point):
            found = mount
    return found.kind


def is_near(path: str | Path) -> bool | None:
    """Whether a file lies in this machine's memory or on its disks, and not behind a network or a
    program; None where the system does not tell.
    """
    kind = kind_of(path)
    return kind in _NEAR if kind else None


def on_local_disk(fd: int) -> bool:
    """Whether an open file is on a disk of this machine, whose device has a major number.

    Network, copy-on-write and in-memory file systems have none.

    Raises:
        OSError: the file cannot be looked at.
    """
    return hasattr(os, "major") and os.major(os.fstat(fd).st_dev) != 0

"""Where a file lies, as far as it decides how its bytes are best written."""

from __future__ import annotations

import os


def on_local_disk(fd: int) -> bool:
    """Whether an open file is on a disk of this machine, whose device has a major number.

    Network, copy-on-write and in-memory file systems have none.

    Raises:
        OSError: the file cannot be looked at.
    """
    return hasattr(os, "major") and os.major(os.fstat(fd).st_dev) != 0

"""How many bytes one call should write, by what was faster of late."""

from __future__ import annotations

import threading

# Bytes that one call writes, up to a multiple of them in the file: the kernel allocates page cache
# in pieces of that size. Where the machine owns its memory the larger one is a tenth faster; on a
# virtual machine whose host takes free memory back, which it does in large pieces, the smaller one
# is up to three times faster (measured on Linux 6.18, ext4). So both are tried, and timed.
LARGE, SMALL = 256 << 10, 64 << 10
WORTH = 1.25  # times that the small one must be faster: less is chance
TRIAL = 16  # each so many windows, the size that was slower gets another chance


class Pace(threading.local):
    """How fast one thread writes in pieces of each size."""

    def __init__(self) -> None:
        self._cost = {LARGE: 0.0, SMALL: 0.0}  # seconds for each byte, recent ones count most
        self._turn = 0

    @property
    def best(self) -> int:
        """The size that was faster of late."""
        return SMALL if self._cost[SMALL] * WORTH < self._cost[LARGE] else LARGE

    def next(self) -> int:
        """The size for the next window."""
        self._turn += 1
        return self.best if self._turn % TRIAL else LARGE + SMALL - self.best

    def took(self, size: int, seconds: float, nbytes: int) -> None:
        """Writing a window in pieces of this size took so long."""
        known = self._cost[size] or seconds / nbytes
        self._cost[size] = known + (seconds / nbytes - known) / 4


PACE = Pace()

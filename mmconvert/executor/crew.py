"""How many workers are given jobs: fewer than there are, where fewer move more."""

from __future__ import annotations

import time
from collections.abc import Callable

# Seconds of work before fewer are tried, that a number is measured for, and until the next trial.
# A trial of half as many costs up to half of its time, so short work is done without.
FIRST, SPAN, REST = 4.0, 1.0, 30.0
RESTS = 20  # times what a trial took, where jobs take long, that pass until the next
JOBS = 2  # jobs of each worker that a measurement counts at least
WORTH = 1.1  # times that another number must be faster: less is chance


class Crew:
    """The workers of a run. Disks that seek, and servers that throttle, are slower with more.

    From time to time half as many as now are tried, or twice as many if there are more. Those are
    chosen which were faster than the present number, measured before and after.

    Attributes:
        size: how many are to be at work.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.size = self._chosen = self._most = most
        self._clock = clock
        self._down = True
        self._rate = 0.0  # bytes a second of the chosen number
        self._tried = 0.0  # when another was tried
        self._rival: tuple[int, float] | None = None  # a number that was faster once, and its rate
        self._measure(FIRST)

    def _measure(self, seconds: float, under_way: int = 0) -> None:
        """Begins to measure, once the jobs that are under way have ended."""
        self._under_way, self._ended, self._nbytes = under_way, 0, 0
        self._began, self._seconds = self._clock(), seconds

    def ended(self, nbytes: int) -> None:
        """A job has ended that moved so many bytes."""
        if self._under_way:
            self._measure(self._seconds, self._under_way - 1)
            return
        self._ended += 1
        self._nbytes += nbytes
        took = self._clock() - self._began
        if took >= self._seconds and self._ended >= JOBS * self.size:
            self._measured(self._nbytes / took)

    def _measured(self, rate: float) -> None:
        """What follows from how fast the present number is."""
        now, rival, self._rival = self.size, self._rival, None
        if now != self._chosen:
            won = rate > WORTH * self._rate
            self._rival = (now, rate) if won else None
            self.size = self._chosen
        elif rival is not None:  # the chosen number once more: was that chance?
            size, best = rival
            won = best > WORTH * rate
            if won:
                self.size = self._chosen = size
        else:
            self._rate = rate
            self._down = now == self._most or (self._down and now > 1)
            self.size = now // 2 or 1 if self._down else min(2 * now, self._most)
            self._tried = self._clock()
            self._measure(SPAN, now)
            return
        if not won:
            self._down = not self._down
        rest = max(REST, RESTS * (self._clock() - self._tried))
        self._measure(SPAN if won else rest, now)

"""How many workers are given jobs, on disks of several kinds, in a time of their own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

from mmconvert.executor.crew import FIRST, REST, Crew

JOB = 32 << 20
DISK = 1 << 30  # bytes a second


def memory(workers: int) -> float:
    return DISK * workers


def seeking(workers: int) -> float:
    return DISK / workers


def saturated(workers: int) -> float:
    """The best are four; more wait for each other."""
    return DISK * (workers if workers <= 4 else 16 / workers)


def worked(most: int, speed: Callable[[int], float], seconds: float) -> list[tuple[float, int]]:
    """When how many were at work, where all of them together move ``speed`` bytes a second."""
    now = 0.0
    crew = Crew(most, lambda: now)
    busy, sizes = most, [(now, most)]
    while now < seconds:
        now += JOB / speed(busy)
        crew.ended(JOB)
        busy = max(1, min(crew.size, most))
        sizes.append((now, busy))
    return sizes


def share(sizes: list[tuple[float, int]], number: int, after: float) -> float:
    """Which part of the time after some seconds so many were at work."""
    spans = [(b - a, n) for (a, n), (b, _) in pairwise(sizes) if a >= after]
    return sum(span for span, n in spans if n == number) / sum(span for span, _ in spans)


@pytest.mark.parametrize(
    ("most", "speed", "best"),
    [
        (2, memory, 2),
        (16, memory, 16),
        (2, seeking, 1),
        (16, seeking, 1),
        (16, saturated, 4),
        (4, saturated, 4),
        (1, memory, 1),
    ],
)
def test_the_number_that_moves_most_is_at_work(
    most: int, speed: Callable[[int], float], best: int
) -> None:
    """But for a while of trials, which is at most a twentieth."""
    sizes = worked(most, speed, 600.0)
    assert share(sizes, best, 120.0) >= 0.95


def test_short_work_is_done_by_all() -> None:
    assert {size for _, size in worked(16, seeking, FIRST)[:-1]} == {16}


def test_a_disk_that_is_busy_for_a_while_does_not_keep_workers_idle_for_ever() -> None:
    """The first minute belongs to another program, whose requests make ours seek."""
    sizes: list[tuple[float, int]] = []
    now = 0.0
    crew = Crew(8, lambda: now)
    while now < 600.0:
        now += JOB / (seeking if now < 60.0 else memory)(crew.size)
        crew.ended(JOB)
        sizes.append((now, crew.size))
    assert min(size for _, size in sizes) == 1
    assert share(sizes, 8, 300.0) >= 0.9


def test_one_slow_moment_is_no_reason_for_fewer() -> None:
    """All were slow while they were measured, so the number after that looks fast, once."""
    now = 0.0
    crew = Crew(2, lambda: now)
    at_work: list[tuple[float, int]] = []
    while now < REST:
        now += JOB / memory(crew.size) * (4 if now < FIRST else 1)
        crew.ended(JOB)
        at_work.append((now, crew.size))
    assert share(at_work, 1, FIRST) > 0  # it was tried
    assert share(at_work, 2, 2 * FIRST) == 1

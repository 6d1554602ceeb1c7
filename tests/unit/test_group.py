"""Several processes on one run: shares, and failing as one. Threads play the processes here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmconvert.errors import LayoutError, MMConvertError, OutputError
from mmconvert.executor.group import Group

T = TypeVar("T")


class Thread(Group):
    """A process that is a thread; `table` holds what each of them says."""

    def __init__(self, rank: int, table: list, barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(table)
        self._table, self._barrier = table, barrier

    def gather(self, value: T) -> list[T]:
        self._table[self.rank] = value
        self._barrier.wait(20)
        found = list(self._table)
        self._barrier.wait(20)
        return found


def everywhere(size: int, work: Callable[[Group], T]) -> list[T | Exception]:
    """What `work` returns, or raises, in each of `size` processes."""
    table: list = [None] * size
    barrier = threading.Barrier(size)
    outcomes: list = [None] * size

    def run(rank: int) -> None:
        try:
            outcomes[rank] = work(Thread(rank, table, barrier))
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return outcomes


@given(st.lists(st.integers(0, 1000), max_size=60), st.integers(1, 9))
def test_shares(weights: Sequence[int], size: int) -> None:
    """Every item in one share, neighbours together, no share far above its part."""
    items = list(enumerate(weights))
    shares = []
    for rank in range(size):
        group = Group()
        group.rank, group.size = rank, size
        shares.append(group.share(items, lambda item: item[1]))
    assert [item for share in shares for item in share] == items
    for share in shares:
        weight = sum(weight for _, weight in share)
        assert weight <= sum(weights) / size + max(weights, default=0)


def test_alone() -> None:
    group = Group()
    assert (group.rank, group.size, group.leads) == (0, 1, True)
    assert group.together(lambda: 5) == [5]
    assert group.lead(lambda: 6) == 6
    assert group.share([1, 2, 3], lambda _: 1) == [1, 2, 3]
    with pytest.raises(ZeroDivisionError):
        group.together(lambda: 1 // 0)


def test_results_of_all() -> None:
    found = everywhere(3, lambda group: group.together(lambda: group.rank * 10))
    assert found == [[0, 10, 20]] * 3


def test_the_leader_alone_works() -> None:
    calls: list[int] = []
    found = everywhere(4, lambda group: group.lead(lambda: calls.append(group.rank) or "done"))
    assert found == ["done"] * 4
    assert calls == [0]


@pytest.mark.parametrize("failing", [{0}, {2}, {1, 3}, {0, 1, 2, 3}], ids=str)
def test_one_fails_all_fail(failing: set[int]) -> None:
    """Each with its own error, or with that of the first that failed, which it names."""

    def work(group: Group) -> object:
        def fail() -> None:
            if group.rank in failing:
                raise OutputError(f"disk {group.rank}", "room", "buy one")

        return group.together(fail)

    for rank, error in enumerate(everywhere(4, work)):
        assert isinstance(error, OutputError)
        first = min(failing)
        expected = f"disk {rank}" if rank in failing else f"process {first}: disk {first}"
        assert error.lines() == [expected, "expected: room", "to fix: buy one"]


def test_kinds_of_errors_are_kept() -> None:
    """The exit code is the same in all processes; a stranger's error is named."""

    def work(error: Exception) -> Callable[[Group], object]:
        def fail() -> object:
            raise error

        return lambda group: group.lead(fail)

    for kind in (LayoutError, OutputError, MMConvertError):
        found = everywhere(2, work(kind("no")))
        assert [type(error) for error in found] == [kind, kind]
    own, other = everywhere(2, work(KeyError("x")))
    assert isinstance(own, KeyError)
    assert type(other) is MMConvertError and "KeyError: 'x'" in str(other)

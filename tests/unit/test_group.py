"""Several processes on one run: shares, and failing as one. Threads play the processes here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmconvert.config import HFConfig, HFToMM, Options
from mmconvert.errors import LayoutError, MMConvertError, OutputError, RequestError
from mmconvert.executor.agreement import of_plan, of_request
from mmconvert.executor.group import ProcessGroup
from mmconvert.formats.reading import State
from mmconvert.plan.plan import Plan
from mmconvert.stored import StoredTensor

T = TypeVar("T")


class Thread(ProcessGroup):
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


def everywhere(size: int, work: Callable[[ProcessGroup], T]) -> list[T | Exception]:
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
        group = ProcessGroup()
        group.rank, group.size = rank, size
        shares.append(group.share(items, lambda item: item[1]))
    assert [item for share in shares for item in share] == items
    for share in shares:
        weight = sum(weight for _, weight in share)
        assert weight <= sum(weights) / size + max(weights, default=0)


def test_alone() -> None:
    group = ProcessGroup()
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

    def work(group: ProcessGroup) -> object:
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

    def work(error: Exception) -> Callable[[ProcessGroup], object]:
        def fail() -> object:
            raise error

        return lambda group: group.lead(fail)

    for kind in (LayoutError, OutputError, MMConvertError):
        found = everywhere(2, work(kind("no")))
        assert [type(error) for error in found] == [kind, kind]
    own, other = everywhere(2, work(KeyError("x")))
    assert isinstance(own, KeyError)
    assert type(other) is MMConvertError and "KeyError: 'x'" in str(other)


def test_agreement() -> None:
    """Where one differs all are told the same; what one lacks differs too."""
    assert everywhere(3, lambda group: group.agree({"--dtype": "bf16"})) == [None] * 3
    for other in ({"--dtype": "fp32"}, {}, {"--dtype": "bf16", "more": "1"}):
        facts = [{"--dtype": "bf16"}, {"--dtype": "bf16"}, other]
        found = everywhere(3, lambda group, facts=facts: group.agree(facts[group.rank]))
        assert {type(error) for error in found} == {RequestError}
        assert len({str(error) for error in found}) == 1
        assert "process 0" in str(found[0]) and "process 2" in str(found[0])


def test_what_must_agree(tmp_path: Path) -> None:
    """Every flag but the number of threads; folders by where they are; sizes and headers."""
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)

    def request(folder: Path, **options: Any) -> dict[str, str]:
        cfg = HFToMM(Path("mm"), HFConfig(folder))
        return of_request("hf_to_mm", cfg, Options(**options))

    same = request(real)
    assert request(link) == same
    assert request(real, workers=7) == same
    changes = {"dry_run": True, "dtype": "fp32", "overwrite": True, "drop": ("x",)}
    for flag, value in changes.items():
        other = request(real, **{flag: value})
        assert [key for key in same if same[key] != other[key]] == [f"--{flag.replace('_', '-')}"]
    tensor = StoredTensor("a", "F32", (2,), real / "file", 100)
    states = {real / "file": State(108, 1, 2, 3, 4)}
    plan = of_plan(Plan([tensor], [], [], []), states)
    assert of_plan(Plan([tensor], [], [], []), {real / "file": State(108, 9, 9, 9, 9)}) == plan
    for changed, state in (
        (tensor, State(109, 1, 2, 3, 4)),
        (tensor._replace(offset=104), states[real / "file"]),
        (tensor._replace(dtype="I32"), states[real / "file"]),
    ):
        other = of_plan(Plan([changed], [], [], []), {real / "file": state})
        assert [key for key in plan if plan[key] != other[key]] == [
            f"the content of {real / 'file'}"
        ]

"""Journals of several processes and machines: what counts, and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from journals import JOURNALS
from mmconvert.executor import journal
from mmconvert.executor.casts import Loss
from mmconvert.executor.jobs import Job
from mmconvert.executor.journal import PREFIX, Journal, job_key, read, remove, request_of
from mmconvert.plan.plan import Copy, Plan

REQUEST = "0123456789abcdef" * 2


class Machine:
    """What names the start of the machine that a process believes to be on."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._path = path
        monkeypatch.setattr(journal, "_BOOT", path)

    def be(self, name: str) -> None:
        self._path.write_text(f"{name}\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path / "boot_id", monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / ".out.mmconvert-partial"
    out.mkdir()
    return out


def job(folder: Path, number: int) -> Job:
    path = str(folder / "release" / "mp_rank_00" / "model_optim_rng.pt")
    return Job((path,), (path, number), 7, lambda _: None)


def note(folder: Path, rank: int, *numbers: int, request: str = REQUEST) -> None:
    """A process of this rank does some jobs."""
    notes = Journal(folder, request, rank)
    for number in numbers:
        notes.add(job(folder, number), {})
    notes.close()


def done(folder: Path, *boots: str, request: str = REQUEST) -> set[int]:
    """The jobs that count, among the first ten."""
    found = read(folder, request, boots, {})
    return {n for n in range(10) if job_key(job(folder, n), folder) in found}


def test_all_processes_count(folder: Path, machine: Machine) -> None:
    machine.be("a")
    note(folder, 0, 1, 2)
    note(folder, 1, 3)
    machine.be("b")
    note(folder, 2, 4)
    assert done(folder, "a", "b") == {1, 2, 3, 4}


def test_a_machine_that_is_not_there_any_more(folder: Path, machine: Machine) -> None:
    """One that has been started anew has lost what it had not yet written to the disk."""
    machine.be("a")
    note(folder, 0, 1)
    machine.be("b")
    note(folder, 1, 2)
    for boots in [("a",), ("b",), ("a", "c"), (), ("",)]:
        assert done(folder, *boots) == set()


def test_another_request(folder: Path, machine: Machine) -> None:
    """Its jobs may have the same names and sizes, and be made of other bytes."""
    machine.be("a")
    note(folder, 0, 1, request=REQUEST)
    assert done(folder, "a", request="another") == set()
    note(folder, 1, 2, request="another")
    assert done(folder, "a", request="another") == done(folder, "a") == set()


@pytest.mark.parametrize("damage", JOURNALS)
def test_damaged_ones(damage: str, folder: Path, machine: Machine) -> None:
    """They count for nothing as a whole."""
    machine.be("some start")
    note(folder, 0, 1, 2)
    assert done(folder, "some start") == {1, 2}
    JOURNALS[damage](next(folder.glob(f"{PREFIX}.*")))
    assert done(folder, "some start") == set()


def test_ranks_that_change_machines(folder: Path, machine: Machine) -> None:
    """Rank 0 is on b at first, then on a; what a has done must not pass for b's."""
    machine.be("b")
    note(folder, 0, 1)
    machine.be("a")
    note(folder, 0, 2)
    machine.be("b")
    note(folder, 1, 3)
    assert done(folder, "a", "b") == {1, 2, 3}
    assert done(folder, "b") == set()  # a has crashed


def test_a_machine_without_a_name_resumes_nothing(folder: Path, machine: Machine) -> None:
    machine.be("")
    note(folder, 0, 1)
    assert done(folder, "") == set()


def test_a_line_that_was_cut_off_does_not_spoil_the_next(folder: Path, machine: Machine) -> None:
    machine.be("a")
    note(folder, 0, 1)
    path = next(folder.glob(f"{PREFIX}.*"))
    with path.open("ab") as file:
        file.write(job_key(job(folder, 2), folder).encode() + b' {"a": [1')
    assert done(folder, "a") == {1}
    note(folder, 0, 3)
    assert done(folder, "a") == {1, 3}


def test_losses_come_back(folder: Path, machine: Machine) -> None:
    machine.be("a")
    notes = Journal(folder, REQUEST)
    lost = {"a é \udce8 in b": Loss(3, 0), 'quo"te\n': Loss(0, 4)}
    notes.add(job(folder, 1), lost)
    notes.close()
    (found,) = read(folder, REQUEST, ["a"], {}).values()
    assert found == lost


def test_files_must_be_as_they_were_left(folder: Path, machine: Machine) -> None:
    machine.be("a")
    note(folder, 0, 1)
    (folder / "file").write_bytes(b"12345")
    assert read(folder, REQUEST, ["a"], {"file": 5})
    assert not read(folder, REQUEST, ["a"], {"file": 4})
    assert not read(folder, REQUEST, ["a"], {"file": 5, "other": 5})


def test_keys_do_not_depend_on_where_the_folder_is(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b" / "c"]
    keys = [{job_key(job(folder, n), folder) for n in range(100)} for folder in folders]
    assert keys[0] == keys[1]
    assert len(keys[0]) == 100


def test_removal(folder: Path, machine: Machine) -> None:
    for name in ("a", "b"):
        machine.be(name)
        note(folder, 0, 1)
        note(folder, 1, 1)
    (folder / "weights").write_text("stay")
    remove(folder)
    assert [p.name for p in folder.iterdir()] == ["weights"]


def test_every_number_of_a_plan_decides_the_request() -> None:
    """Also those of a tensor without rows, whose columns may be more than any machine counts."""
    copies = [Copy(0, 0, 0, 0, 0, 0, 4, 6), Copy(1, 0, 0, 1, 0, 0, 0, 1 << 96)]
    others = [[*copies[:1]], copies[::-1]]
    for number, copy in enumerate(copies):
        for field, value in copy._asdict().items():
            changed = copy._replace(**{field: value + 1})
            others.append([changed if i == number else c for i, c in enumerate(copies)])
    digests = {request_of(Plan([], [], some, []), ()) for some in (copies, *others)}
    assert len(digests) == 1 + len(others)

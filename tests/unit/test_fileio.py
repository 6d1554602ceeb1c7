"""Bytes arrive as they were, on local disks and elsewhere, whatever their offsets."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from mmconvert.errors import CheckpointError
from mmconvert.executor.copying import copy_range
from mmconvert.executor.fileio import BAND, IOV_MAX, NEAR_CALL, open_files, write_pieces

IN_MEMORY = Path("/dev/shm")  # a file system without a device of its own


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path
        return
    if not IN_MEMORY.is_dir() or os.major(IN_MEMORY.stat().st_dev):
        pytest.skip("there is no file system in memory")
    with TemporaryDirectory(dir=IN_MEMORY) as made:
        yield Path(made)


@pytest.mark.parametrize(
    ("start", "at", "nbytes"),
    [(0, 0, 1), (8, 64, 100), (4096, 4096, BAND), (1000, 64, 2 * BAND + 77), (3, 0, BAND - 1)],
)
def test_a_range_is_copied_and_nothing_else(folder: Path, start: int, at: int, nbytes: int) -> None:
    data = random.Random(nbytes).randbytes(start + nbytes + 10)
    before = bytes([7]) * (at + nbytes + 10)
    (folder / "from").write_bytes(data)
    (folder / "to").write_bytes(before)
    with open_files() as files:
        copy_range(files, folder / "from", start, folder / "to", at, nbytes)
    after = before[:at] + data[start : start + nbytes] + before[at + nbytes :]
    assert (folder / "to").read_bytes() == after


@pytest.mark.parametrize(
    ("at", "sizes"),
    [
        (0, [3 * NEAR_CALL + 5]),
        (77, [2 * NEAR_CALL]),
        (NEAR_CALL - 1, [1]),
        (5, [9000] * 200),
        (9, [3] * (IOV_MAX + 7)),
        (1, [2 * NEAR_CALL + 7] * 3),
        (NEAR_CALL - 10, [NEAR_CALL, NEAR_CALL]),
        (4, []),
    ],
)
def test_buffers_are_written_one_after_the_other(at: int, sizes: list[int], tmp_path: Path) -> None:
    pieces = [random.Random(i).randbytes(size) for i, size in enumerate(sizes)]
    whole = b"".join(pieces)
    (tmp_path / "to").write_bytes(bytes([7]) * (at + len(whole) + 3))
    with open_files() as files:
        write_pieces(files, tmp_path / "to", at, [memoryview(piece) for piece in pieces])
    assert (tmp_path / "to").read_bytes() == b"\7" * at + whole + b"\7" * 3


def refuse(*given: object, **named: object) -> int:
    raise OSError(errno.EINVAL, "refused")


def halting(calls: int) -> Callable[..., int]:
    """A splice that moves fewer bytes than it is asked to, and refuses after so many calls."""
    splice, left = os.splice, iter(range(calls))

    def some(source: int, target: int, count: int, **offsets: int) -> int:
        if next(left, None) is None:
            refuse()
        return splice(source, target, count - count // 3, **offsets)

    return some


@pytest.mark.skipif(not hasattr(os, "splice"), reason="Linux alone has it")
@pytest.mark.parametrize("way", ["none", "no pipe", "short", "halts", "halts later"])
def test_what_the_kernel_does_not_move_is_read_and_written(
    way: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "none":
        monkeypatch.delattr(os, "splice")
    elif way == "no pipe":
        monkeypatch.setattr(os, "pipe", refuse)
    else:
        calls = {"short": 1 << 20, "halts": 8, "halts later": 9}[way]
        monkeypatch.setattr(os, "splice", halting(calls))
    data = random.Random(2).randbytes(5 * NEAR_CALL + 11)
    (folder / "from").write_bytes(data)
    (folder / "to").write_bytes(bytes(77))
    with open_files() as files:
        copy_range(files, folder / "from", 3, folder / "to", 77, len(data) - 3)
    assert (folder / "to").read_bytes() == bytes(77) + data[3:]


def test_between_file_systems(folder: Path, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(BAND + 5)
    (tmp_path / "from").write_bytes(data)
    (folder / "to").write_bytes(b"")
    with open_files() as files:
        copy_range(files, tmp_path / "from", 0, folder / "to", 0, len(data))
    assert (folder / "to").read_bytes() == data


def test_a_source_that_ends_early_is_an_error(folder: Path) -> None:
    (folder / "from").write_bytes(bytes(100))
    (folder / "to").write_bytes(bytes(300))
    with open_files() as files, pytest.raises(CheckpointError, match="ends at byte 100, 100 bytes"):
        copy_range(files, folder / "from", 0, folder / "to", 0, 200)

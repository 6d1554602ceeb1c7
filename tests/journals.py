"""Journals that count for nothing, made of one that a process has left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mmconvert.executor.journal import PREFIX


def first_line(path: Path) -> bytes:
    return path.read_bytes().partition(b"\n")[0] + b"\n"


def replaced(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


JOURNALS: dict[str, Callable[[Path], object]] = {
    "empty": lambda p: replaced(p, b""),
    "random bytes": lambda p: replaced(p, bytes(range(256)) * 50),
    "no head": lambda p: replaced(p, p.read_bytes().partition(b"\n")[2]),
    "another request": lambda p: replaced(p, b"0" * 32 + p.read_bytes()[32:]),
    "another start of the machine": lambda p: replaced(
        p, first_line(p)[:-5] + b"0000\n" + p.read_bytes().partition(b"\n")[2]
    ),
    "no start of a machine": lambda p: replaced(
        p, first_line(p)[:33] + b"\n" + p.read_bytes().partition(b"\n")[2]
    ),
    "a folder": a_folder,
    "bytes among the lines": lambda p: replaced(p, p.read_bytes() + b"\xff\xfe\n"),
    "a line of no JSON": lambda p: replaced(p, p.read_bytes() + b"abc {nope\n"),
    "JSON of another kind": lambda p: replaced(p, p.read_bytes() + b"abc [1, 2]\n"),
    "losses of another kind": lambda p: replaced(p, p.read_bytes() + b'abc {"a": ["x", 1]}\n'),
    "too many losses": lambda p: replaced(p, p.read_bytes() + b'abc {"a": [1, 2, 3]}\n'),
    "deep JSON": lambda p: replaced(p, p.read_bytes() + b"abc " + b"[" * 100_000 + b"\n"),
    "a second journal of another request": lambda p: replaced(
        p.with_name(f"{PREFIX}.7.x"), b"0" * 32 + p.read_bytes()[32:]
    ),
}

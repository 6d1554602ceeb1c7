"""What a process brings to the disk, and when: the calls, noted in their order.

A file or folder is safe if it is, to the time of its last change, what it was when it was synced.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mmconvert import durable

State = tuple[int, int]  # size and time of the last change


def _state(path: str | Path | int) -> State:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


class Record:
    """The calls of one process.

    Attributes:
        calls: ("sync" or "rename" or "remove", path), in order; a rename by its new name.
        unsafe: for each rename what was not on the disk by then, relative to what was renamed.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.unsafe: dict[str, list[str]] = {}
        self._synced: dict[int, State] = {}  # by inode: names change

    def sync(self, fd: int) -> None:
        self._synced[os.fstat(fd).st_ino] = _state(fd)
        self.calls.append(("sync", os.readlink(f"/proc/self/fd/{fd}")))

    def rename(self, old: str, new: str) -> None:
        old, new = os.fspath(old), os.fspath(new)
        below = [os.path.join(h, n) for h, fs, ns in os.walk(old) for n in (*fs, *ns)]
        self.unsafe[new] = [
            os.path.relpath(path, old)
            for path in (old, *below)
            if self._synced.get(os.stat(path).st_ino) != _state(path)
        ]
        self.calls.append(("rename", new))

    def remove(self, path: str) -> None:
        self.calls.append(("remove", os.fspath(path)))

    def check(self, final: Path, *, old: Path | None = None) -> None:
        """What got the name `final` was safe, then its name was made safe, then `old` went."""
        name = str(final)
        assert self.unsafe[name] == []
        renamed = self.calls.index(("rename", name))
        named = self.calls.index(("sync", str(final.parent)), renamed)
        if old is not None:
            assert self.calls.index(("remove", str(old))) > named
            assert self.calls.index(("rename", str(old))) < renamed


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Record]:
    """Notes the calls of this process; they are still made."""
    record = Record()
    names = {"fsync": os.fsync, "rename": os.rename, "replace": os.replace}
    rmtree: Any = shutil.rmtree

    def fsync(fd: int) -> None:
        names["fsync"](fd)
        record.sync(fd)

    def rename(old: str, new: str, **more: int) -> None:
        record.rename(old, new)
        names["rename"](old, new, **more)

    def replace(old: str, new: str, **more: int) -> None:
        record.rename(old, new)
        names["replace"](old, new, **more)

    def remove(path: str, *args: object, **more: object) -> None:
        record.remove(path)
        rmtree(path, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "rename", rename)
        patch.setattr(os, "replace", replace)
        patch.setattr(shutil, "rmtree", remove)
        assert durable.os is os
        yield record

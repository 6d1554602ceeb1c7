"""Opens the files of a checkpoint for reading, and keeps in mind in which state each one was.

A plan is made of what headers say, and the data is copied minutes later. A conversion watches
what is read, and at its end every file must still be the one that it was at the first look.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import BinaryIO, NamedTuple, ParamSpec, TypeVar

from mmconvert import positioned
from mmconvert.causes.downloads import LONGEST, not_the_file
from mmconvert.errors import CheckpointError, FormatError, cannot_read
from mmconvert.executor.apart import Identity

P = ParamSpec("P")
R = TypeVar("R")


class State(NamedTuple):
    """What differs after a file was written to, or another one has taken its name.

    A program can set the time of a file back, but not that of its inode.
    """

    nbytes: int
    mtime_ns: int
    ctime_ns: int
    device: int
    inode: int

    @staticmethod
    def of(status: os.stat_result) -> State:
        """The state that ``os.stat`` tells."""
        return State(
            *(status.st_size, status.st_mtime_ns, status.st_ctime_ns),
            *(status.st_dev, status.st_ino),
        )


class FileWatch:
    """The files that were read, each in the state of the first look."""

    def __init__(self) -> None:
        self.states: dict[Path, State] = {}

    def identities(self) -> dict[Identity, Path]:
        """What was read, by device and inode."""
        return {(s.device, s.inode): path for path, s in self.states.items()}

    def check(self) -> None:
        """Raises CheckpointError if a file is not what it was: a part of it may be copied."""
        for path, before in self.states.items():
            try:
                same = State.of(path.stat()) == before
            except OSError as error:
                raise CheckpointError(
                    f"{path}: {error.strerror}: it is gone since the first look",
                    "a file that does not change meanwhile",
                ) from error
            if not same:
                raise CheckpointError(
                    f"{path} has changed while it was read",
                    "a file that does not change meanwhile",
                    "wait until whatever writes it has finished, and run the command again",
                )


_watch: ContextVar[FileWatch | None] = ContextVar("watch", default=None)


def current() -> FileWatch:
    """The watch of the conversion under way; one of nothing where there is none."""
    return _watch.get() or FileWatch()


def watched(conversion: Callable[P, R]) -> Callable[P, R]:
    """Watches what a conversion reads, from its first line on; one within another is watched
    with it.
    """

    @wraps(conversion)
    def watching(*args: P.args, **kwargs: P.kwargs) -> R:
        if _watch.get() is not None:
            return conversion(*args, **kwargs)
        token = _watch.set(FileWatch())
        try:
            return conversion(*args, **kwargs)
        finally:
            _watch.reset(token)

    return watching


@contextmanager
def unwatched() -> Generator[None]:
    """What is looked at, but no part of the result, such as an output that is to be replaced."""
    token = _watch.set(None)
    try:
        yield
    finally:
        _watch.reset(token)


def steady(comparison: Callable[P, R]) -> Callable[P, R]:
    """Watches what a comparison reads: it says nothing unless all of it is the same at the end."""

    @watched
    @wraps(comparison)
    def comparing(*args: P.args, **kwargs: P.kwargs) -> R:
        result = comparison(*args, **kwargs)
        current().check()
        return result

    return comparing


def note(paths: Iterable[Path]) -> None:
    """Files that are to be read later, such as those that are copied as they are.

    Raises:
        CheckpointError: one is gone.
    """
    if (watch := _watch.get()) is None:
        return
    for path in paths:
        try:
            watch.states.setdefault(path, State.of(path.stat()))
        except OSError as error:
            raise cannot_read(path, error) from error


@contextmanager
def opened(path: Path) -> Generator[BinaryIO]:
    """A file of a checkpoint, open for reading; the conversion under way watches it.

    Raises:
        CheckpointError: a pipe or a device, which would keep us waiting for ever.
        FormatError: what a download has left in place of the file.
        OSError: it is not there, or cannot be read.
    """
    size_of_file(path)
    with path.open("rb") as file:
        if (fault := not_the_file(path, positioned.pread(file.fileno(), LONGEST, 0))) is not None:
            raise fault
        if (watch := _watch.get()) is not None:
            watch.states.setdefault(path, State.of(os.fstat(file.fileno())))
        yield file


def read_at_most(path: Path, most: int, expected: str) -> bytes:
    """The bytes of a file of a checkpoint that is read whole, ``most`` of them at most.

    Raises:
        CheckpointError: unreadable; FormatError: too large.
    """
    try:
        with opened(path) as file:
            data = file.read(most + 1)
    except OSError as error:
        raise cannot_read(path, error) from error
    if len(data) > most:
        raise FormatError(f"{path}: larger than {most} bytes", expected)
    return data


def size_of_file(path: Path) -> int:
    """Bytes of a regular file. A pipe would keep whoever opens it waiting for ever.

    Raises:
        CheckpointError: it is something else.
        OSError: it is not there.
    """
    status = path.stat()
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise CheckpointError(f"{path} is a pipe or a device", "a readable file")
    return status.st_size

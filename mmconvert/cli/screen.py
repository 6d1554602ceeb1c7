"""Progress on the terminal, by bytes; plain lines where there is no terminal."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO, cast

from mmconvert.events import Events
from mmconvert.words import one_line

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


NARROWEST = 40  # columns; in less than 10 the layout of tyro's help does not end


def prepare() -> None:
    """Sees to standard streams that can be written to, and to a width that words fit in."""
    # Closed by whoever started us: Python has None there. The first descriptor that is opened
    # takes the free number, so that no weight file gets that of a standard stream.
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until this process ends
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until this process ends
    stdout = cast("object", sys.stdout)
    if isinstance(stdout, io.TextIOWrapper):  # a folder's name may be no valid text
        stdout.reconfigure(errors="backslashreplace")
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)


def say(text: str) -> None:
    """Prints to stderr. Messages that cannot be printed (a full disk) stop no work."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        abandon(sys.stderr)


def print_lines(lines: Iterable[str]) -> None:
    """Prints a result; names are in it, which a terminal must not obey."""
    print("\n".join(map(one_line, lines)))


def abandon(stream: TextIO) -> None:
    """What is still to be printed to this stream is lost, and Python does not complain."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Lines(Events):
    """Notes on stderr, no progress."""

    def note(self, text: str) -> None:
        """Prints it."""
        say(labelled(text))


class Bars(Lines):
    """A bar for each phase, with throughput and time left."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def start(self, what: str, nbytes: int) -> None:
        """Adds a bar."""
        self._task = self._progress.add_task(what, total=nbytes)

    def advance(self, nbytes: int) -> None:
        """Moves the bar."""
        if self._task is not None:
            self._progress.advance(self._task, nbytes)

    def note(self, text: str) -> None:
        """Prints it above the bars."""
        self._progress.console.print(labelled(text), markup=False, highlight=False)


def labelled(text: str) -> str:
    """A note as it is printed; warnings say so themselves, names are made safe to show."""
    text = one_line(text)
    return text if text.startswith("warning: ") else f"note: {text}"


@contextmanager
def screen_events(*, quiet: bool) -> Generator[Events]:
    """What fits the screen: bars on a terminal, else notes only; nothing if ``quiet``."""
    if quiet or not sys.stderr.isatty():
        yield Events() if quiet else Lines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield Bars(progress)


def shows_blocks() -> bool:
    """Whether what reads our output can take the characters that bars are made of."""
    return "utf" in (sys.stdout.encoding or "").lower()

"""Progress on the terminal, by bytes; plain lines where there is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mmconvert.events import Events

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Lines(Events):
    """Notes on stderr, no progress."""

    def note(self, text: str) -> None:
        """Prints it."""
        print(labelled(text), file=sys.stderr)


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
    """A note as it is printed; warnings say so themselves."""
    return text if text.startswith("warning: ") else f"note: {text}"


@contextmanager
def screen_events(*, quiet: bool) -> Iterator[Events]:
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

"""Processes that find each other, and speak with each other, by files in a folder beside the
output: no launcher, no network, no torch.

A process's card (see ``cards``) has what it has last said, and whose cards it has read. All have
met when each has read, on everybody's card, the word that it drew for itself at its start: so cards
that an earlier run has left mislead nobody.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from mmconvert import durable
from mmconvert.errors import LostProcessError, OutputError, RequestError
from mmconvert.executor.cards import Card, Cards
from mmconvert.executor.group import ProcessGroup
from mmconvert.executor.journal import boot_id
from mmconvert.executor.ranks import Ranks

T = TypeVar("T")

GRACE = 15.0  # seconds in which one of the others must come, where it is not certain that they will
FAREWELL = 5.0  # seconds in which the others read what was said last, and the first one speaks
LOOK = 0.5  # seconds between two looks at the locks of processes that are waited for


class Rendezvous(ProcessGroup):
    """The processes of one run that share a folder."""

    def __init__(self, target: Path, ranks: Ranks) -> None:
        """Takes the place of this process; :meth:`meet` waits for the others.

        Raises:
            OutputError: the folder cannot be made, or is not of this user alone.
        """
        self.rank, self.size = ranks.rank, ranks.size
        self.folder = _folder_for(target)
        self._cards = Cards(self.folder, self.rank)
        self._others = [rank for rank in range(self.size) if rank != self.rank]
        self._mine = Card(os.urandom(16).hex(), self.size, boot_id())
        self._exchange = 0
        self._words: dict[int, str] = {}

    def meet(self, patience: float, note: Callable[[str], None], *, certain: bool) -> bool:
        """Waits until all processes have met; False if none of the others has come, and it is not
        certain that any will.

        Args:
            patience: seconds.

        Raises:
            RequestError: they have not all come; or count on another number of processes.
        """
        began = time.monotonic()
        self._take(began + patience)
        told, posted = False, 0.0
        while missing := self._missing():
            now = time.monotonic()
            if now - posted > 1:  # a name that was not there is looked for again
                self._post()
                posted = now
            if not certain and now - began > GRACE and len(missing) == self.size - 1:
                return False
            if now - began > patience:
                raise self._absent(missing, patience)
            if not told and now - began > 5:
                told = True
                note(
                    f"waiting for {_named(missing)} of {self.size}, at most {patience:.0f} s "
                    "(--ranks-timeout)"
                )
            time.sleep(0.02)
        self._words = dict(self._mine.seen)
        return True

    def _take(self, deadline: float) -> None:
        """Takes this process's place."""
        while True:
            try:
                self._cards.take()
                break
            except FileNotFoundError:
                continue
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RequestError(
                        f"another process is number {self.rank} of {self.size} already "
                        f"(it holds {self._cards.lock_path(self.rank)})",
                        "a number of its own for each process",
                        "see --ranks of each, or wait for the end of the other run",
                    ) from None
                time.sleep(0.1)
            except OSError as error:
                raise OutputError(
                    f"{self.folder}: {error.strerror or error}", "a folder that can be written"
                ) from error
        self._post()

    def _missing(self) -> list[int]:
        """The processes that have not read this one's card yet."""
        missing: list[int] = []
        changed = False
        for rank in self._others:
            card = self._cards.card(rank)
            if card is None or card.left:
                missing.append(rank)
                continue
            met = card.seen.get(self.rank) == self._mine.word
            if met and card.size != self.size:
                raise RequestError(
                    f"process {rank} expects {card.size} processes, this one {self.size}",
                    "the same number in all of them",
                )
            changed = changed or self._mine.seen.get(rank) != card.word
            self._mine.seen[rank] = card.word
            if not met:
                missing.append(rank)
        if changed:
            self._post()
        return missing

    def _absent(self, missing: list[int], patience: float) -> RequestError:
        return RequestError(
            f"{_named(missing)} of {self.size} did not come within {patience:.0f} s",
            f"{self.size} processes, each with a --ranks of its own, that all see {self.folder}",
            "start all of them; --ranks-timeout SECONDS waits longer, --ranks 0/1 for none",
        )

    def gather(self, value: T) -> list[T]:
        """The values of all processes; they are pickled, in a folder of this user alone.

        Raises:
            LostProcessError: one of them is gone.
            OutputError: this one cannot write its card.
        """
        self._exchange += 1
        # Who waits here may still have to read what was said before; none is further behind.
        said = {self._exchange: pickle.dumps(value)}
        before = self._exchange - 1
        if before in self._mine.said:
            said[before] = self._mine.said[before]
        self._mine.said = said
        self._post()
        found: list[Any] = [value] * self.size
        for rank in self._others:
            found[rank] = pickle.loads(self._heard(rank))  # noqa: S301 - written by ourselves
        self._mine.read = self._exchange
        self._post()
        return found

    def _heard(self, rank: int) -> bytes:
        """What a process says in the exchange that is under way."""
        pause, looked = 0.001, time.monotonic()
        while True:
            card = self._cards.card(rank)
            if card is not None and card.word == self._words[rank]:
                if self._exchange in card.said:
                    return card.said[self._exchange]
                if card.left:
                    raise _lost(rank, "it has ended")
            elif card is not None:
                raise _lost(rank, "it was started again")
            if time.monotonic() - looked > LOOK:
                looked = time.monotonic()
                if self._cards.gone(rank, card):
                    raise _lost(rank, "it gives no sign of life")
            time.sleep(pause)
            pause = min(0.1, pause * 1.5)

    def leave(self) -> None:
        """Says goodbye, once the others have read what was said last; the last one tidies up.

        The first process goes first: it speaks to the user, and a launcher may end all others when
        one of them ends with an error.
        """
        if not self._cards.taken:
            return
        self._mine.left = True
        with suppress(OutputError):
            self._post()
            end = time.monotonic() + (FAREWELL if self._words else 0)
            while time.monotonic() < end and not all(map(self._needs_nothing, self._others)):
                time.sleep(0.01)
        self._cards.tidy()

    def _post(self) -> None:
        """Writes this process's card.

        Raises:
            OutputError: it cannot be written.
        """
        self._cards.post(self._mine, first=not self._exchange)

    def _needs_nothing(self, rank: int) -> bool:
        """Whether a process needs this one no longer."""
        card = self._cards.card(rank)
        if (
            card is None
            or card.left
            or card.word != self._words[rank]
            or self._cards.gone(rank, card)
        ):
            return True
        return rank != 0 and card.read >= self._exchange


def _folder_for(target: Path) -> Path:
    """Where the processes of an output meet: beside it, or above the folders that are missing."""
    path = Path(os.path.realpath(target))
    while not path.parent.is_dir():
        path = path.parent
    return durable.beside(path, ".mmconvert-ranks")


def _named(ranks: list[int]) -> str:
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _lost(rank: int, why: str) -> LostProcessError:
    return LostProcessError(
        f"process {rank} of this run is lost: {why}",
        "all of them, until the end",
        "see what it printed; the same command goes on where it stopped",
    )

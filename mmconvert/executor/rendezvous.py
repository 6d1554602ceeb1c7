"""Processes that find each other, and speak with each other, by files in a folder beside the
output: no launcher, no network, no torch.

Each process has a card, ``0``, ``1`` …, which it alone writes and the others read, and a lock that
it holds while it lives. A card has what its process has last said, and whose cards it has read. All
have met when each has read, on everybody's card, the word that it drew for itself at its start: so
cards that an earlier run has left mislead nobody.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

from mmconvert import durable
from mmconvert.errors import LostProcessError, OutputError, RequestError, cannot_write
from mmconvert.executor import staging
from mmconvert.executor.group import ProcessGroup
from mmconvert.executor.journal import boot_id
from mmconvert.executor.ranks import Ranks

T = TypeVar("T")

BEAT = 2.0  # seconds between two signs of life
SILENCE = 120.0  # seconds without one, after which a process of another machine counts as lost
GRACE = 15.0  # seconds in which one of the others must come, where it is not certain that they will
FAREWELL = 5.0  # seconds in which the others read what was said last, and the first one speaks
LOOK = 0.5  # seconds between two looks at the locks of processes that are waited for
DIGEST = 16  # bytes
ROOM = 64 << 10  # bytes of a card


@dataclass
class Card:
    """What a process says of itself.

    Attributes:
        word: drawn at its start.
        size: how many processes it counts on.
        boot: of its machine: locks tell of processes on this machine only.
        seen: the words of the processes whose cards it has read.
        said: number of the exchange -> what it said, pickled; of the last two.
        read: number of the last exchange in which it has read what all said.
        left: it says nothing more.
    """

    word: str
    size: int
    boot: str
    seen: dict[int, str] = field(default_factory=dict[int, str])
    said: dict[int, bytes] = field(default_factory=dict[int, bytes])
    read: int = 0
    left: bool = False


class Rendezvous(ProcessGroup):
    """The processes of one run that share a folder."""

    def __init__(self, target: Path, ranks: Ranks) -> None:
        """Takes the place of this process; :meth:`meet` waits for the others.

        Raises:
            OutputError: the folder cannot be made, or is not of this user alone.
        """
        self.rank, self.size = ranks.rank, ranks.size
        self.folder = _folder_for(target)
        self._others = [rank for rank in range(self.size) if rank != self.rank]
        self._mine = Card(os.urandom(16).hex(), self.size, boot_id())
        self._exchange = 0
        self._words: dict[int, str] = {}
        self._beats: dict[int, tuple[int, float]] = {}
        self._stop = threading.Event()
        self._fd: int | None = None

    # ------------------------------------------------------------------------------ meeting

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
        threading.Thread(target=self._live, daemon=True).start()
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
        """Makes the folder and locks this process's place."""
        path = self._lock_path(self.rank)
        while True:
            try:
                staging.make(self.folder)
                self._fd = _locked(path, os.O_RDWR | os.O_CREAT)
                break
            except FileNotFoundError:  # the last one of an earlier run has just tidied up
                continue
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RequestError(
                        f"another process is number {self.rank} of {self.size} already "
                        f"(it holds {path})",
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
            card = self._card(rank)
            if card is None or card.left:
                missing.append(rank)
                continue
            met = card.seen.get(self.rank) == self._mine.word
            if met and card.size != self.size:
                raise RequestError(
                    f"process {rank} counts on {card.size} processes, this one on {self.size}",
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

    # ------------------------------------------------------------------------------ speaking

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
            card = self._card(rank)
            if card is not None and card.word == self._words[rank]:
                if self._exchange in card.said:
                    return card.said[self._exchange]
                if card.left:
                    raise _lost(rank, "it has ended")
            elif card is not None:
                raise _lost(rank, "it was started again")
            if time.monotonic() - looked > LOOK:
                looked = time.monotonic()
                if self._gone(rank, card):
                    raise _lost(rank, "it gives no sign of life")
            time.sleep(pause)
            pause = min(0.1, pause * 1.5)

    def leave(self) -> None:
        """Says goodbye, once the others have read what was said last; the last one tidies up.

        The first process goes first: it speaks to the user, and a launcher may end all others when
        one of them ends with an error.
        """
        if self._fd is None:
            return
        self._mine.left = True
        with suppress(OutputError):
            self._post()
            end = time.monotonic() + (FAREWELL if self._words else 0)
            while time.monotonic() < end and not all(map(self._needs_nothing, self._others)):
                time.sleep(0.01)
        self._stop.set()
        self._tidy()

    def _needs_nothing(self, rank: int) -> bool:
        """Whether a process needs this one no longer."""
        card = self._card(rank)
        if card is None or card.left or card.word != self._words[rank] or self._gone(rank, card):
            return True
        return rank != 0 and card.read >= self._exchange

    # --------------------------------------------------------------------------------- files

    def _lock_path(self, rank: int) -> Path:
        return self.folder / f"{rank}.lock"

    def _post(self) -> None:
        """Writes this process's card, in place: names that do not change are never outdated.

        The first time there is room to spare, so that on a full disk the card can still say so.

        Raises:
            OutputError: it cannot be written.
        """
        content = pickle.dumps(self._mine)
        digest = blake2b(content, digest_size=DIGEST).digest()
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW
        path = self.folder / str(self.rank)
        try:
            with open(os.open(path, flags, 0o600), "wb") as file:
                file.write(digest + len(content).to_bytes(8, "little") + content)
                if not self._exchange:
                    file.write(bytes(max(0, ROOM - len(content))))
        except OSError as error:
            raise cannot_write(path, error) from error

    def _card(self, rank: int) -> Card | None:
        """A process's card; None if there is none, or one that is being written."""
        try:
            with open(os.open(self.folder / str(rank), os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                content = file.read()
        except OSError:
            return None
        digest, size = content[:DIGEST], int.from_bytes(content[DIGEST : DIGEST + 8], "little")
        content = content[DIGEST + 8 : DIGEST + 8 + size]
        if digest != blake2b(content, digest_size=DIGEST).digest():
            return None
        return pickle.loads(content)  # noqa: S301 - written by ourselves, in a folder of ours alone

    def _live(self) -> None:
        """Gives signs of life."""
        while self._fd is not None and not self._stop.wait(BEAT):
            with suppress(OSError):
                os.utime(self._lock_path(self.rank))

    def _gone(self, rank: int, card: Card | None) -> bool:
        """Whether a process no longer runs, as far as can be told from here."""
        path = self._lock_path(rank)
        if card is None or card.boot == self._mine.boot:
            try:
                os.close(_locked(path, os.O_RDWR))
            except BlockingIOError:
                return False
            except FileNotFoundError:
                return True
            except OSError:
                pass  # a file system without locks
            else:
                return True
        try:
            beat = path.stat().st_mtime_ns
        except OSError:
            return True
        known, since = self._beats.get(rank, (0, 0.0))
        if known != beat:
            known, since = self._beats[rank] = beat, time.monotonic()
        return time.monotonic() - since > SILENCE

    def _tidy(self) -> None:
        """Removes what this process, and those that no longer run, have left."""
        for path in sorted(self.folder.glob("*.lock")) if self.folder.is_dir() else []:
            own = path == self._lock_path(self.rank)
            with suppress(OSError):
                fd = None if own else _locked(path, os.O_RDWR)
                for left in (path.with_suffix(""), path):
                    left.unlink(missing_ok=True)
                if fd is not None:
                    os.close(fd)
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        with suppress(OSError):
            self.folder.rmdir()


def _locked(path: Path, flags: int) -> int:
    """A descriptor that holds the lock of a file.

    Raises:
        BlockingIOError: another process holds it.
        FileNotFoundError: its holder has removed it meanwhile.
        OSError: no file, or no locks here.
    """
    fd = os.open(path, flags | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        here, there = os.fstat(fd), os.lstat(path)
        if (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino):
            raise FileNotFoundError(path)
    except OSError:
        os.close(fd)
        raise
    return fd


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

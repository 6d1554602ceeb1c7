"""The files by which processes speak: in one folder each has a card, ``0``, ``1`` …, which it alone
writes and the others read, and a lock that it holds while it lives.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from mmconvert.errors import cannot_write
from mmconvert.executor import staging
from mmconvert.executor.journal import boot_id

BEAT = 2.0  # seconds between two signs of life
SILENCE = 120.0  # seconds without one, after which a process of another machine counts as lost
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


class Cards:
    """The folder of the cards, as one of the processes sees it."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self._fd: int | None = None  # of its own lock
        self._beats: dict[int, tuple[int, float]] = {}
        self._stop = threading.Event()

    @property
    def taken(self) -> bool:
        """Whether this process has its place."""
        return self._fd is not None

    def take(self) -> None:
        """Makes the folder, locks this process's place, and gives signs of life from then on.

        Raises:
            FileNotFoundError: the last one of an earlier run has just tidied up.
            BlockingIOError: another process has this place.
            OSError: the folder cannot be written.
        """
        staging.make(self.folder)
        self._fd = _locked(self.lock_path(self.rank), os.O_RDWR | os.O_CREAT)
        threading.Thread(target=self._live, name="ranks", daemon=True).start()

    def lock_path(self, rank: int) -> Path:
        """The file that a process locks."""
        return self.folder / f"{rank}.lock"

    def post(self, card: Card, *, first: bool) -> None:
        """Writes this process's card, in place: names that do not change are never outdated.

        Args:
            first: with room to spare, so that on a full disk the card can still say so.

        Raises:
            OutputError: it cannot be written.
        """
        content = pickle.dumps(card)
        digest = blake2b(content, digest_size=DIGEST).digest()
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW
        path = self.folder / str(self.rank)
        try:
            with open(os.open(path, flags, 0o600), "wb") as file:
                file.write(digest + len(content).to_bytes(8, "little") + content)
                if first:
                    file.write(bytes(max(0, ROOM - len(content))))
        except OSError as error:
            raise cannot_write(path, error) from error

    def card(self, rank: int) -> Card | None:
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
                os.utime(self.lock_path(self.rank))

    def gone(self, rank: int, card: Card | None) -> bool:
        """Whether a process no longer runs, as far as can be told from here."""
        path = self.lock_path(rank)
        if card is None or card.boot == boot_id():
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

    def tidy(self) -> None:
        """Removes what this process, and those that no longer run, have left."""
        self._stop.set()
        for path in sorted(self.folder.glob("*.lock")) if self.folder.is_dir() else []:
            own = path == self.lock_path(self.rank)
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

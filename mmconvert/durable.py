"""What a lost machine must not take away: bytes and names that are on the disk, not in memory.

The order is always the same: the data of new files, the folders that name them, the rename, the
folder above it. Only then is anything removed that the new files replace.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None

# Syncs at once: a journaling file system puts them into one commit (measured on ext4: 0.3 ms for
# each of 50 small files, 3.9 ms one after the other).
THREADS = 16

LONGEST_NAME = 255  # bytes: NAME_MAX of the usual file systems

# What a file system answers that cannot sync a folder, or anything.
_NOT_HERE = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF}


def sync_file(path: str | Path) -> None:
    """Returns when a file's bytes are on its disk.

    Raises:
        OSError: the disk has failed.
    """
    way = os.O_RDONLY if os.name == "posix" else os.O_RDWR  # elsewhere only writers may sync
    fd = os.open(path, way | getattr(os, "O_CLOEXEC", 0))
    try:
        sync_fd(fd)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(fd)


def sync_fd(fd: int) -> None:
    """Returns when the bytes of an open file, or the names in an open folder, are on its disk.

    Raises:
        OSError: the disk has failed.
    """
    try:
        full = getattr(fcntl, "F_FULLFSYNC", 0)  # macOS, where fsync stops at the drive's cache
        if fcntl is not None and full:
            fcntl.fcntl(fd, full)
        else:
            os.fsync(fd)
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise


def sync_folder(path: str | Path) -> None:
    """Returns when the names in a folder are on its disk.

    Raises:
        OSError: the disk has failed.
    """
    if os.name == "posix":  # elsewhere folders cannot be opened
        sync_file(path)


def sync_tree(folder: Path) -> None:
    """Syncs every file below a folder, then every folder, it included.

    Raises:
        OSError: the disk has failed.
    """
    folders: list[str] = []
    files: list[str] = []
    for here, _, names in os.walk(folder):
        folders.append(here)
        files += [os.path.join(here, name) for name in names]
    sync_all(files)
    _at_once(sync_folder, folders)


def sync_all(files: Iterable[str | Path]) -> None:
    """Syncs files, several at once.

    Raises:
        OSError: the disk has failed.
    """
    _at_once(sync_file, list(files))


def _at_once(sync: Callable[[str | Path], None], paths: list[str] | list[str | Path]) -> None:
    from concurrent.futures import ThreadPoolExecutor  # slow to load

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(sync, paths))  # what one raises is raised here


def remove_empty(folders: Iterable[Path]) -> None:
    """Removes folders, the innermost first, up to one that is in use."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            break


def beside(path: Path, ending: str) -> Path:
    """Where what is to become a file or folder is made: ``.NAME`` and an ending, beside it. A name
    that leaves no room for the ending gives way to its digest, the same each time.
    """
    name = path.name
    if len(os.fsencode(f".{name}{ending}")) > LONGEST_NAME:
        from hashlib import sha256  # seldom needed

        name = sha256(os.fsencode(name)).hexdigest()[:32]
    return path.with_name(f".{name}{ending}")


def replace_file(path: Path, data: bytes) -> None:
    """Gives a small file new content: the old or the new is there at every moment, and whole.

    Raises:
        OSError: the system refuses.
    """
    new = beside(path, f".{os.getpid()}.new")
    try:
        with open(new, "xb") as file:
            file.write(data)
            file.flush()
            sync_fd(file.fileno())
        replace(new, path)
    finally:
        with suppress(OSError):  # a disk that refuses has refused before
            new.unlink()


def replace(new: Path, path: Path) -> None:
    """Gives a complete and synced file or folder its final name, and makes the name safe.

    Raises:
        OSError: the system refuses.
    """
    os.replace(new, path)
    sync_folder(path.parent)


class EarlySync:
    """Brings files to the disk while others are being written: the last sync then has little left.

    Use as a context manager; leaving it waits until every file that was told of is on its disk.
    """

    def __init__(self) -> None:
        self._told: dict[str, None] = {}  # all that ever were, in order
        self._waiting: dict[str, None] = {}
        self._failure: OSError | None = None  # a disk tells of a lost block only once
        self._change = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="sync", daemon=True)

    def __enter__(self) -> EarlySync:
        self._thread.start()
        return self

    def wrote(self, paths: Iterable[str]) -> None:
        """Something was written to these files."""
        with self._change:
            for path in paths:
                self._told[path] = self._waiting[path] = None
            self._change.notify()

    def _run(self) -> None:
        while (path := self._next()) is not None:
            try:
                sync_file(path)
            except OSError as error:
                self._failure = error
                return

    def _next(self) -> str | None:
        """A file to sync, as soon as there is one; None when the work has ended."""
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._ended)
            if self._ended:
                return None
            path = next(iter(self._waiting))
            del self._waiting[path]
            return path

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._change:
            self._ended = True
            self._change.notify()
        if error is not None:  # nobody wants the files any more
            return
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        sync_all(self._told)

"""A JSON list of objects, written item by item: complete, or not there at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType

from mmconvert import durable, positioned
from mmconvert.datasets.jsonlist import Item
from mmconvert.errors import DatasetError, OutputError, cannot_write

try:
    import fcntl
except ImportError:  # not POSIX: no advisory locks; the rename still holds
    fcntl = None

CHUNK = 1 << 20  # bytes that are written at once


class ListWriter:
    r"""Writes a JSON list, on one line, as ``json.dump`` does; complete or not there at all.

    Use as a context manager: :meth:`add` items, then :meth:`commit`.

    Args:
        final: the file.
        mode: permissions of the new file, before the umask.
        overwrite: whether a file that is there may be replaced.
        keep_mode: give the new file the permissions of the one that it replaces.
        ascii_only: write other characters as ``\uXXXX``.
        inputs: files that must not be overwritten.
    """

    def __init__(
        self,
        final: Path,
        *,
        mode: int,
        overwrite: bool,
        ascii_only: bool,
        keep_mode: bool = False,
        inputs: tuple[Path, ...] = (),
    ) -> None:
        self.target = final  # as it was given, for people
        self.final = Path(os.path.realpath(final))
        self.partial = durable.beside(self.final, ".mmconvert-partial")
        self.count = 0
        self._mode = mode
        self._overwrite = overwrite
        self._ascii = ascii_only
        self._keep_mode = keep_mode
        self._inputs = inputs
        self._new_parents: list[Path] = []
        self._fd: int | None = None
        self._pending: list[bytes] = []
        self._pending_bytes = 0

    def _check(self) -> None:
        if any(self._is_final(path) for path in self._inputs):
            raise OutputError(f"the output {self.final} is the input", "another file")
        if not os.path.lexists(self.final):
            return
        if not self.final.is_file():
            raise OutputError(f"{self.final} is not a file", "a file that does not exist yet")
        if not self._overwrite:
            raise OutputError(
                f"{self.final} exists",
                "a file that does not exist yet",
                "choose another one, or give --overwrite to replace it",
            )

    def _is_final(self, path: Path) -> bool:
        """Whether a file is the target, under whatever name a link or a mount shows it."""
        try:
            return os.path.samefile(path, self.final)
        except OSError:  # one of them is not there
            return Path(os.path.realpath(path)) == self.final

    def __enter__(self) -> ListWriter:
        self._check()
        try:
            self._new_parents = [p for p in self.final.parents if not p.exists()]
            self.final.parent.mkdir(parents=True, exist_ok=True)
            self._fd = self._open()
        except OSError as error:
            raise cannot_write(self.final, error) from error
        return self

    def _open(self) -> int:
        """The partial file, new and locked; what a killed run has left is removed."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | positioned.BINARY
        try:
            fd = os.open(self.partial, flags, self._mode)
        except FileExistsError:
            old = os.open(self.partial, os.O_RDONLY)
            try:
                self._lock(old)
                self.partial.unlink()
            finally:
                os.close(old)
            fd = os.open(self.partial, flags, self._mode)
        self._lock(fd)
        return fd

    def _lock(self, fd: int) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"another run is writing {self.final}", "one run at a time", "wait for it"
            ) from None
        except OSError:  # a file system without locks
            return

    def add(self, item: Item, index: int) -> None:
        """Writes one item.

        Raises:
            DatasetError: text that is not Unicode: half of a surrogate pair.
            OutputError: the file cannot be written.
        """
        text = json.dumps(item, ensure_ascii=self._ascii)
        try:
            raw = (("[" if not self.count else ", ") + text).encode()
        except UnicodeEncodeError as error:
            raise DatasetError(
                f"item {index} holds half of a surrogate pair: {error.object[error.start]!a}",
                "text in Unicode",
            ) from None
        self.count += 1
        self._pending.append(raw)
        self._pending_bytes += len(raw)
        if self._pending_bytes >= CHUNK:
            self._flush()

    def _flush(self) -> None:
        data = memoryview(b"".join(self._pending))
        self._pending, self._pending_bytes = [], 0
        if self._fd is None:
            raise ValueError("the writer is not open")
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            raise cannot_write(self.final, error) from error

    def commit(self) -> None:
        """Ends the list and gives the file its final name.

        Raises:
            OutputError: the target appeared meanwhile, or the disk is full.
        """
        self._pending.append(b"]" if self.count else b"[]")
        self._flush()
        self._check()
        try:
            if self._keep_mode and self._fd is not None and self.final.exists():
                os.chmod(self.partial, self.final.stat().st_mode & 0o7777)
            if self._fd is not None:
                durable.sync_fd(self._fd)
            durable.replace(self.partial, self.final)
            made, self._new_parents = self._new_parents, []
            for parent in made:
                durable.sync_folder(parent.parent)
        except OSError as error:
            raise cannot_write(self.final, error) from error
        self._close()

    def _close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._fd is None:
            return
        self.partial.unlink(missing_ok=True)
        self._close()
        durable.remove_empty(self._new_parents)

"""A JSON list of objects, read and written item by item: files of gigabytes in little memory."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from mmconvert import durable, positioned
from mmconvert.errors import DatasetError, OutputError, cannot_write

try:
    import fcntl
except ImportError:  # not POSIX: no advisory locks; the rename still holds
    fcntl = None

CHUNK = 1 << 20  # bytes that are read at once
MAX_ITEM = 16 << 20  # characters of one item; a conversation has a few thousand
_SPACE = " \t\n\r"
_FORM = "a JSON list of objects: [{...}, {...}]"

Item = dict[str, Any]


def read_items(path: Path, progress: Callable[[int], None] | None = None) -> Iterator[Item]:
    """The items of a file that holds one JSON list, one at a time.

    Args:
        path: the file, in UTF-8.
        progress: called with the number of bytes read since the last call.

    Raises:
        DatasetError: unreadable, or not such a list; names the item by its index.
    """
    try:
        with path.open("rb") as file:
            yield from _items(_Text(path, file, progress))
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror or error}", "a readable file") from error


class _Text:
    """A window of a file's text; what has been taken is forgotten."""

    def __init__(self, path: Path, file: BinaryIO, progress: Callable[[int], None] | None) -> None:
        self.path = path
        self.held = ""
        self.at = 0  # what lies before has been taken
        self._file = file
        self._progress = progress
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def more(self) -> bool:
        """Reads on, twice as much as is held; False at the end of the file."""
        raw = self._file.read(max(CHUNK, len(self.held) - self.at))
        if self._progress is not None:
            self._progress(len(raw))
        try:
            text = self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            around = self._file.tell() - len(raw) + error.start
            raise DatasetError(
                f"{self.path}: not UTF-8 text, at about byte {around}", _FORM
            ) from None
        self.held = self.held[self.at :] + text
        self.at = 0
        return bool(raw)

    def next(self) -> str:
        """The next character that is no space, not yet taken; empty at the end of the file."""
        while True:
            while self.at < len(self.held) and self.held[self.at] in _SPACE:
                self.at += 1
            if self.at < len(self.held):
                return self.held[self.at]
            if not self.more():
                return ""


def _items(text: _Text) -> Iterator[Item]:
    first = text.next()
    if first != "[":
        what = "the file is empty" if not first else f"begins with {first!r}"
        fix = "one object for each line? put them into a list" if first == "{" else ""
        raise DatasetError(f"{text.path}: {what}", _FORM, fix)
    text.at += 1
    decoder = json.JSONDecoder()
    index = 0
    while True:
        sign = text.next()
        if sign == "]" and index == 0:
            break
        yield _item(text, decoder, index)
        index += 1
        sign = text.next()
        text.at += 1
        if sign == "]":
            break
        if sign != ",":
            what = f"{sign!r} follows item {index - 1}" if sign else f"ends after item {index - 1}"
            raise DatasetError(f"{text.path}: {what}", "a comma, or the end of the list: ]")
    if index == 0:
        text.at += 1
    if text.next():
        raise DatasetError(f"{text.path}: {text.next()!r} follows the end of the list", _FORM)


def _item(text: _Text, decoder: json.JSONDecoder, index: int) -> Item:
    sign = text.next()
    if sign != "{":
        what = f"item {index} begins with {sign!r}" if sign else f"ends before item {index}"
        raise DatasetError(f"{text.path}: {what}", "an object in braces")
    while True:
        try:
            item, text.at = decoder.raw_decode(text.held, text.at)
        except (ValueError, RecursionError) as error:
            too_long = len(text.held) - text.at > MAX_ITEM
            if isinstance(error, ValueError) and not too_long and text.more():
                continue  # it may be only that the rest has not been read
            if isinstance(error, RecursionError):
                reason = "nested too deeply"
            elif too_long:
                reason = f"no end within {MAX_ITEM} characters"
            else:
                reason = getattr(error, "msg", str(error))[:200]
            raise DatasetError(
                f"{text.path}: item {index} is not valid JSON: {reason}",
                "an object in braces",
                "is the file complete? download it again",
            ) from None
        return item


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
        for parent in self._new_parents:  # innermost first; stops at one that is in use
            try:
                parent.rmdir()
            except OSError:
                break

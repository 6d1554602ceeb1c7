"""A JSON list of objects, read item by item: files of gigabytes in little memory."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mmconvert.errors import DatasetError

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
            raise DatasetError(f"{self.path}: not UTF-8 text, near byte {around}", _FORM) from None
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

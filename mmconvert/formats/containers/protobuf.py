"""The protocol buffers wire format, as far as MindSpore's files need it.

A message is a row of fields. A field begins with a varint, ``number * 8 + wire type``; what
follows is a varint, 8 bytes, a length and so many bytes, the fields of a group, or 4 bytes.
Nested messages, text and bytes are all "a length and so many bytes". Fields that a reader does
not know are skipped. Source: the protocol buffers encoding documentation.

Files are read at the places where fields begin, through a small window: what lies between is
never read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mmconvert import positioned
from mmconvert.errors import FormatError

VARINT, FIXED64, LENGTH, GROUP, END_GROUP, FIXED32 = range(6)
_WIDTH = {FIXED64: 8, FIXED32: 4}

WINDOW = 4096  # bytes that are read at once
COPY_AGAIN = "copy the file again from where it was made"
MAX_FIELDS = 1 << 24  # fields of one file: an endless row of empty ones must end
MAX_GROUPS = 100  # groups in groups; the libraries' own limit
_BITS64 = (1 << 64) - 1


class Field(NamedTuple):
    """One field of a message.

    Attributes:
        number: which field.
        wire: its wire type.
        at: absolute byte offset of its first byte.
        value: of a VARINT, from 0 to 2**64 - 1.
        start, end: absolute byte offsets of the payload of all others.
    """

    number: int
    wire: int
    at: int
    value: int
    start: int
    end: int


class WireFile:
    """An open file that holds messages.

    Args:
        path: its name, for messages.
        file: open for reading; must stay open.
        kind: what it should be, for messages.
    """

    def __init__(self, path: Path, file: BinaryIO, kind: str) -> None:
        self.path = path
        self.kind = kind
        self.size = os.fstat(file.fileno()).st_size
        self._fd = file.fileno()
        self._window = b""
        self._begin = 0
        self._left = MAX_FIELDS

    def error(self, at: int, what: str, fix: str = COPY_AGAIN) -> FormatError:
        """What is wrong with the file, and at which byte."""
        where = f"(at byte {at} of {self.size})"
        return FormatError(f"{self.path}: {what} {where}", self.kind, fix)

    def read(self, start: int, end: int) -> bytes:
        """Bytes of the file; meant for short runs.

        Raises:
            FormatError: the file ends before.
        """
        skip = start - self._begin
        if skip < 0 or end > self._begin + len(self._window):
            self._begin, skip = start, 0
            self._window = positioned.pread(self._fd, max(WINDOW, end - start), start)
        found = self._window[skip : skip + end - start]
        if len(found) < end - start:
            raise self.error(start + len(found), f"ends {end - start - len(found)} bytes too early")
        return found

    def varint(self, at: int, end: int) -> tuple[int, int]:
        """The varint at a place of a message that ends at ``end``, and where the next byte is.

        Raises:
            FormatError: cut off by the end of the message, or longer than 64 bits.
        """
        raw = self.read(at, min(at + 10, end))
        value = 0
        for count, byte in enumerate(raw, 1):
            value |= (byte & 0x7F) << (7 * count - 7)
            if byte < 0x80:
                if value > _BITS64:
                    raise self.error(at, "a number has more than 64 bits")
                return value, at + count
        what = "a number has more than ten bytes" if len(raw) == 10 else "a number is cut off"
        raise self.error(at, what)

    def fields(self, start: int, end: int) -> Iterator[Field]:
        """The fields of the message from ``start`` to ``end``, groups skipped.

        Raises:
            FormatError: when the damaged field is reached.
        """
        at = start
        while at < end:
            field = self._field(at, end)
            if field.wire == END_GROUP:
                raise self.error(at, f"group {field.number} ends without having begun")
            at = field.end
            if field.wire == GROUP:
                at = self._after_group(field, end)
                continue
            yield field

    def _field(self, at: int, end: int) -> Field:
        self._left -= 1
        if self._left < 0:
            raise self.error(at, f"more than {MAX_FIELDS} fields")
        key, start = self.varint(at, end)
        number, wire = key >> 3, key & 7
        if not 0 < number < 1 << 29:
            raise self.error(at, f"field number {number}")
        if wire == VARINT:
            value, after = self.varint(start, end)
            return Field(number, wire, at, value, start, after)
        if wire in (GROUP, END_GROUP):
            return Field(number, wire, at, 0, start, start)
        if wire == LENGTH:
            length, start = self.varint(start, end)
        elif wire in _WIDTH:
            length = _WIDTH[wire]
        else:
            raise self.error(at, f"field {number} has the unknown wire type {wire}")
        if length > end - start:
            raise self.error(at, f"field {number} claims {length} bytes, {end - start} are left")
        return Field(number, wire, at, 0, start, start + length)

    def _after_group(self, group: Field, end: int) -> int:
        """Where a group, old-fashioned and unknown to us, has ended."""
        open_groups = [group.number]
        at = group.end
        while open_groups:
            if at >= end:
                raise self.error(group.at, f"group {group.number} does not end")
            field = self._field(at, end)
            at = field.end
            if field.wire == GROUP:
                open_groups.append(field.number)
            elif field.wire == END_GROUP and open_groups.pop() != field.number:
                raise self.error(field.at, f"group {field.number} ends inside another one")
            if len(open_groups) > MAX_GROUPS:
                raise self.error(field.at, f"more than {MAX_GROUPS} groups in each other")
        return at

    # What fields hold.

    def need(self, field: Field, wire: int, name: str) -> Field:
        """The field. Raises FormatError if it is of another wire type."""
        if field.wire != wire:
            raise self.error(field.at, f"{name} has wire type {field.wire}, not {wire}")
        return field

    def payload(self, field: Field, name: str, limit: int) -> bytes:
        """Bytes of a length-delimited field. Raises FormatError beyond ``limit`` bytes."""
        self.need(field, LENGTH, name)
        if field.end - field.start > limit:
            raise self.error(field.at, f"{name} has {field.end - field.start} bytes, over {limit}")
        return self.read(field.start, field.end)

    def text(self, field: Field, name: str, limit: int) -> str:
        """Text of a field. Raises FormatError if it is not UTF-8."""
        try:
            return self.payload(field, name, limit).decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(field.at, f"{name} is not UTF-8 text") from None

    def integers(self, field: Field, name: str, limit: int) -> list[int]:
        """What one field adds to a repeated int64: one number, or several packed ones.

        Raises:
            FormatError: more than ``limit`` numbers, or damaged ones.
        """
        if field.wire == VARINT:
            return [signed(field.value, 64)]
        self.need(field, LENGTH, name)
        found: list[int] = []
        at = field.start
        while at < field.end:
            value, at = self.varint(at, field.end)
            found.append(signed(value, 64))
            if len(found) > limit:
                raise self.error(field.at, f"{name} has more than {limit} numbers")
        return found


def signed(value: int, bits: int) -> int:
    """A varint's value as a signed number of so many bits (int32, int64): the low bits count."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


# ---------------------------------------------------------------------------------- writing


def varint(value: int) -> bytes:
    """A number from -2**63 to 2**64 - 1; negative ones take ten bytes, as protobuf has them."""
    value &= _BITS64
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def number(field: int, value: int) -> bytes:
    """An integer field (int32, int64, uint32)."""
    return varint(field << 3 | VARINT) + varint(value)


def head(field: int, length: int) -> bytes:
    """What stands before the ``length`` bytes of a length-delimited field."""
    return varint(field << 3 | LENGTH) + varint(length)


def block(field: int, payload: bytes) -> bytes:
    """A length-delimited field: text in UTF-8, bytes, or a nested message."""
    return head(field, len(payload)) + payload

"""MindSpore checkpoint files (``.ckpt``): scanned and laid out; tensor data is never touched here.

A file is a row of protobuf messages (proto2), one for each tensor or piece of a large one::

    Checkpoint     { repeated Value value = 1; }
    Value          { required string tag = 1; optional TensorProto tensor = 2;
                     optional MapTensorProto maptensor = 3; }
    TensorProto    { repeated int64 dims = 1; required string tensor_type = 2;
                     required bytes tensor_content = 3; }

Data is little-endian and row-major. A tensor above 512 MiB is written as several records with
one tag and its full dims, cut every 512 MiB. A file may end in the word ``crc_num`` and the
CRC-32 of everything before it, in ten bytes, most significant first. Sources:
``mindspore/train/serialization.py`` and ``checkpoint.proto`` of MindSpore 2.7.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mmconvert.errors import FormatError, cannot_read
from mmconvert.formats.containers.protobuf import LENGTH, Field, WireFile
from mmconvert.formats.reading import opened
from mmconvert.stored import ITEM_SIZE, Extent, StoredTensor

# MindSpore's name of a dtype -> the safetensors spelling.
DTYPES = {
    "Float16": "F16",
    "BFloat16": "BF16",
    "Float32": "F32",
    "Float64": "F64",
    "Int8": "I8",
    "Int16": "I16",
    "Int32": "I32",
    "Int64": "I64",
    "UInt8": "U8",
    "UInt16": "U16",
    "UInt32": "U32",
    "UInt64": "U64",
    "Bool": "BOOL",
}
TEXT = "str"  # UTF-32 text, from save_checkpoint's append_dict
CRC_MARK = b"crc_num"
CRC_BYTES = len(CRC_MARK) + 10

MAX_NAME = 4096  # bytes of a tag
MAX_RANK = 8  # dimensions of a tensor
MAX_DIM = 1 << 48  # no tensor is longer; keeps products of lying shapes small
MAX_RECORDS = 1 << 20
OTHER = "give a checkpoint of MindSpore; PyTorch and Lightning write files of this ending too"
_READ = 8 << 20  # bytes that are read at once for a checksum


class Leftover(NamedTuple):
    """A record that is no tensor: text, or a hash table (``map``)."""

    name: str
    kind: str
    nbytes: int


@dataclass(frozen=True)
class CkptFile:
    """What a ``.ckpt`` file holds.

    Attributes:
        path: the file.
        tensors: in the order of the file. One in several pieces has ``extents``.
        leftovers: records that are no tensors.
        end: bytes of all records: where the checksum begins, if there is one.
        crc: the checksum in the file's trailer; None without one. It is not verified.
    """

    path: Path
    tensors: list[StoredTensor]
    leftovers: list[Leftover] = field(default_factory=list[Leftover])
    end: int = 0
    crc: int | None = None


class _Record(NamedTuple):
    at: int
    tag: str
    kind: str  # a key of DTYPES, TEXT, or "map"
    dims: tuple[int, ...]
    start: int
    end: int

    def continues(self, other: _Record) -> bool:
        return (self.tag, self.kind, self.dims) == (other.tag, other.kind, other.dims)


def read_ckpt(path: Path) -> CkptFile:
    """Scans a file's records; memory grows with their number, not with the data.

    Raises:
        FormatError: the file breaks the format, or holds types that have no bits of their own.
        CheckpointError: the file cannot be read.
    """
    try:
        with opened(path) as file:
            return _Reader(path, file).read()
    except OSError as error:
        raise cannot_read(path, error, "a readable .ckpt file") from error


def check_crc(found: CkptFile) -> None:
    """Reads the whole file and compares its checksum, if it has one.

    Raises:
        FormatError: the checksum differs.
        CheckpointError: the file cannot be read.
    """
    if found.crc is None:
        return
    try:
        with found.path.open("rb") as file:
            crc = crc_of(file, found.end)
    except OSError as error:
        raise cannot_read(found.path, error) from error
    if crc != found.crc:
        raise FormatError(
            f"{found.path}: its CRC-32 is {crc:08x}, its trailer says {found.crc:08x}",
            "an undamaged file",
            "copy the file again from where it was made",
        )


def crc_of(file: BinaryIO, nbytes: int) -> int:
    """CRC-32 of a file's first bytes. Raises OSError if it cannot be read, or ends before."""
    crc = 0
    while nbytes:
        block = file.read(min(_READ, nbytes))
        if not block:
            raise OSError(0, "the file became shorter while it was read")
        crc = zlib.crc32(block, crc)
        nbytes -= len(block)
    return crc


class _Reader:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.wire = WireFile(path, file, "a .ckpt file as mindspore.save_checkpoint writes it")
        self.error = self.wire.error
        self.crc: int | None = None
        self.end = self.wire.size

    def read(self) -> CkptFile:
        self._check_start()
        self._find_trailer()
        tensors: list[StoredTensor] = []
        leftovers: list[Leftover] = []
        seen: dict[str, int] = {}
        for pieces in self._joined():
            first = pieces[0]
            if first.tag in seen:
                what = f"{first.tag} occurs again; it was complete at byte {seen[first.tag]}"
                raise self.error(first.at, what)
            seen[first.tag] = first.at
            if first.kind in DTYPES:
                tensors.append(self._tensor(pieces))
            else:
                size = sum(piece.end - piece.start for piece in pieces)
                leftovers.append(Leftover(first.tag, first.kind, size))
        return CkptFile(self.path, tensors, leftovers, self.end, self.crc)

    def _check_start(self) -> None:
        """Tells what the file is when it is something else that is well known."""
        start = self.wire.read(0, min(16, self.wire.size))
        if not start:
            raise self.error(0, "the file is empty")
        if start[:4] == b"PK\3\4":
            raise self.error(0, "a zip archive, such as torch.save writes", OTHER)
        if start[:2] == b"\x80\x02":
            raise self.error(0, "a pickle, such as torch before 1.6 wrote", OTHER)
        if start[8:9] == b"{":
            raise self.error(0, "a safetensors file", "give it the ending .safetensors")

    def _find_trailer(self) -> None:
        """The checksum counts only if the records end exactly before it; see :meth:`_records`."""
        begin = self.wire.size - CRC_BYTES
        if begin < 0:
            return
        trailer = self.wire.read(begin, self.wire.size)
        if trailer.startswith(CRC_MARK):
            self.crc = int.from_bytes(trailer[len(CRC_MARK) :], "big")
            self.end = begin

    def _records(self) -> Iterator[_Record]:
        """Every record.

        Tensor data whose last 17 bytes look like a checksum would be cut off here and give an
        error, as in MindSpore itself; the odds are one in 2**56.
        """
        count = 0
        for top in self.wire.fields(0, self.end):
            if top.number != 1:
                continue
            count += 1
            if count > MAX_RECORDS:
                raise self.error(top.at, f"more than {MAX_RECORDS} records")
            yield self._value(self.wire.need(top, LENGTH, "a record"))

    def _value(self, top: Field) -> _Record:
        tag: str | None = None
        parts: list[Field] = []
        for part in self.wire.fields(top.start, top.end):
            if part.number == 1:
                if tag is not None:
                    raise self.error(part.at, f"the record of {tag:.80} has two tags")
                tag = self.wire.text(part, "a tag", MAX_NAME)
            elif part.number in (2, 3):
                parts.append(self.wire.need(part, LENGTH, "a tensor"))
        if not tag:
            raise self.error(top.at, "a record without a tag")
        if len(parts) != 1:
            raise self.error(top.at, f"the record of {tag:.80} has {len(parts)} tensors, not one")
        part = parts[0]
        if part.number == 3:
            return _Record(top.at, tag, "map", (), part.start, part.end)
        return self._tensor_record(top.at, tag, part)

    def _tensor_record(self, at: int, tag: str, part: Field) -> _Record:
        dims: list[int] = []
        kind: str | None = None
        content: Field | None = None
        for item in self.wire.fields(part.start, part.end):
            if item.number == 1:
                dims += self.wire.integers(item, f"the shape of {tag:.80}", MAX_RANK)
                if len(dims) > MAX_RANK:
                    raise self.error(item.at, f"{tag:.80} has more than {MAX_RANK} dimensions")
            elif item.number == 2 and kind is None:
                kind = self.wire.text(item, f"the type of {tag:.80}", MAX_NAME)
            elif item.number == 3 and content is None:
                content = self.wire.need(item, LENGTH, f"the data of {tag:.80}")
            elif item.number in (2, 3):
                raise self.error(item.at, f"{tag:.80} has two types or two pieces of data")
        if kind is None or content is None:
            missing = "type" if kind is None else "data"
            raise self.error(part.at, f"{tag:.80} has no {missing}")
        if any(not 0 <= n <= MAX_DIM for n in dims):
            raise self.error(part.at, f"{tag:.80} has the shape {dims}")
        if kind not in DTYPES and kind != TEXT:
            raise self.error(part.at, f"{tag:.80} has the type {kind!r:.80}, which is not known")
        return _Record(at, tag, kind, tuple(dims), content.start, content.end)

    def _joined(self) -> Iterator[list[_Record]]:
        """Records of one tag that follow each other: the pieces of one tensor."""
        pieces: list[_Record] = []
        for record in self._records():
            if pieces and pieces[0].tag == record.tag:
                if not pieces[0].continues(record):
                    what = f"{record.tag:.80} goes on with another type or shape"
                    raise self.error(record.at, what)
                pieces.append(record)
                continue
            if pieces:
                yield pieces
            pieces = [record]
        if pieces:
            yield pieces

    def _tensor(self, pieces: list[_Record]) -> StoredTensor:
        first = pieces[0]
        dtype, shape = DTYPES[first.kind], first.dims
        held = sum(piece.end - piece.start for piece in pieces)
        if shape == (0,) and held == ITEM_SIZE[dtype]:
            shape = ()  # how older versions write a scalar, and all versions read it
        if held != prod(shape) * ITEM_SIZE[dtype]:
            what = f"{first.tag:.80} {first.kind} {list(first.dims)} has {held} bytes of data"
            raise self.error(first.at, f"{what}, not {prod(shape) * ITEM_SIZE[dtype]}")
        extents: list[Extent] = []
        done = 0
        for piece in pieces:
            if piece.end > piece.start:
                extents.append(Extent(done, piece.start, piece.end - piece.start))
            done += piece.end - piece.start
        if len(extents) < 2:
            start = extents[0].offset if extents else first.start
            return StoredTensor(first.tag, dtype, shape, self.path, start)
        strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
        return StoredTensor(
            first.tag, dtype, shape, self.path, extents[0].offset, strides, tuple(extents)
        )

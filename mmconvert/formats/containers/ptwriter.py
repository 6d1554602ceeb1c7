"""The layout of a new ``.pt`` file: everything but the tensor data.

A ``.pt`` file is a zip archive of stored records: ``data.pkl`` describes the tensors, and
``data/<key>`` holds the bytes of one storage.  All sizes are known beforehand, so the file is
laid out first (sparse) and the data copied into it in place.  Rules: ``_save`` in
``torch/serialization.py``, and the zip specification (PKWARE APPNOTE 4.3, 4.4, 4.5.3).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple, cast

from mmconvert.formats.containers.image import FileImage, Piece, one_run
from mmconvert.formats.containers.ptpickle import Scalar, SlotTree, TensorSlot, emit_state
from mmconvert.narrow import is_array
from mmconvert.stored import ITEM_SIZE

# torch aligns storages to 64 bytes so that they can be mapped into memory (storage_alignment).
ALIGNMENT = 64
_U16, _U32 = 0xFFFF, 0xFFFFFFFF  # from these values on, zip fields need their ZIP64 form
_FLAGS = 0x800  # names are UTF-8
_DATE = 0x21  # 1980-01-01, the first date there is: equal input gives equal bytes


class Slot(NamedTuple):
    """A tensor to be written.

    Attributes:
        dtype: safetensors spelling.
        target: its number among all that are written.
        parts: of a flat tensor that several of them lie in: where each begins, in elements, its
            number and its elements; between them are zeros.
    """

    dtype: str
    shape: tuple[int, ...]
    target: int = 0
    parts: tuple[tuple[int, int, int], ...] | None = None


def pt_image(path: str, tree: object, stem: str = "archive") -> FileImage:
    """Lay out a ``.pt`` file; the same tree gives the same bytes.

    The records ``.format_version`` and ``.storage_alignment`` of newer torch versions are left
    out: they promise the exact paddings and data descriptors of torch's own zip writer, from
    which a reader may then compute offsets.  Without them every torch version looks the offsets
    up, as it does in files of torch 2.1.

    Args:
        path: of the file, below the output folder.
        tree: nested containers; each :class:`Slot` becomes a tensor with a storage of its own, and
            one or several pieces of the image.
        stem: name of the folder in the archive (torch.save takes the file's stem).

    Raises:
        RequestError: as :func:`emit_state`.
    """
    slots: list[Slot] = []
    pickle = emit_state(_number(tree, slots))
    archive = _Archive(stem)
    archive.add("data.pkl", pickle)
    archive.add("byteorder", b"little")
    pieces: list[Piece] = []
    for number, slot in enumerate(slots):
        nbytes = prod(slot.shape) * ITEM_SIZE[slot.dtype]
        start = archive.reserve(f"data/{number}", nbytes)
        if slot.parts is None:
            pieces.append(Piece(slot.target, one_run(start, nbytes)))
            continue
        item = ITEM_SIZE[slot.dtype]
        pieces += [Piece(t, one_run(start + item * at, item * n)) for at, t, n in slot.parts]
    archive.add("version", b"3\n")
    archive.finish()
    return FileImage(path, archive.position, archive.chunks, tuple(pieces))


class Laid(NamedTuple):
    """An archive of one object: all but a tensor's data, by offset; where that goes; its size."""

    heads: Sequence[tuple[int, bytes]]
    start: int
    size: int


def tensor_archive(dtype: str, shape: tuple[int, ...]) -> Laid:
    """What torch.save writes of one tensor.

    Raises:
        RequestError: as :func:`emit_state`.
    """
    pickle = emit_state(TensorSlot("0", dtype, shape))
    return _laid(pickle, prod(shape) * ITEM_SIZE[dtype])


def object_archive(value: SlotTree | Scalar) -> Laid:
    """What torch.save writes of a number, a text, or a dict of such."""
    return _laid(emit_state(value), None)


def _laid(pickle: bytes, nbytes: int | None) -> Laid:
    archive = _Archive("archive")
    archive.add("data.pkl", pickle)
    archive.add("byteorder", b"little")
    start = 0 if nbytes is None else archive.reserve("data/0", nbytes)
    archive.add("version", b"3\n")
    archive.finish()
    return Laid(archive.chunks, start, archive.position)


def _number(value: object, slots: list[Slot]) -> object:
    """The tree with numbered storages, as torch numbers them: in order of appearance."""
    if isinstance(value, Slot):
        slots.append(value)
        return TensorSlot(str(len(slots) - 1), value.dtype, value.shape)
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        return {key: _number(inner, slots) for key, inner in items}
    if is_array(value):
        return [_number(inner, slots) for inner in value]
    return value


class _Archive:
    """Records of a zip archive, each aligned, and the directory at the end."""

    def __init__(self, stem: str) -> None:
        self.stem = stem
        self.position = 0
        self.chunks: list[tuple[int, bytes]] = []
        self.directory = bytearray()
        self.count = 0

    def chunk(self, data: bytes) -> None:
        self.chunks.append((self.position, data))
        self.position += len(data)

    def add(self, name: str, data: bytes) -> None:
        self.header(name, len(data), zlib.crc32(data))
        self.chunk(data)

    def reserve(self, name: str, size: int) -> int:
        # No checksum: the data comes later and is copied inside the kernel, so that nobody sees
        # the bytes.  torch writes 0 as well when it skips data, and never checks.
        self.header(name, size, 0)
        start = self.position
        self.position += size
        return start

    def header(self, name: str, size: int, crc: int) -> None:
        """A local header, padded so that the data begins aligned; and the directory's entry."""
        path = f"{self.stem}/{name}".encode()
        start = self.position
        big, far = size >= _U32, start >= _U32
        need = 45 if big or far else 20
        size32, start32 = (_U32 if big else size), (_U32 if far else start)
        common = struct.pack("<4H3I", _FLAGS, 0, 0, _DATE, crc, size32, size32)

        extra = struct.pack("<2H2Q", 1, 16, size, size) if big else b""
        padding = -(start + 30 + len(path) + len(extra) + 4) % ALIGNMENT
        extra += struct.pack("<2s H", b"FB", padding) + bytes(padding)  # torch's id for padding
        lengths = struct.pack("<2H", len(path), len(extra))
        self.chunk(b"PK\3\4" + struct.pack("<H", need) + common + lengths + path + extra)

        wide = [size, size] * big + [start] * far
        extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        lengths = struct.pack("<5H2I", len(path), len(extra), 0, 0, 0, 0, start32)
        self.directory += b"PK\1\2" + struct.pack("<2H", need, need) + common + lengths
        self.directory += path + extra
        self.count += 1

    def finish(self) -> None:
        start, size, count = self.position, len(self.directory), self.count
        end = bytes(self.directory)
        if max(start, size) >= _U32 or count >= _U16:
            end += b"PK\6\6" + struct.pack("<Q2H2I4Q", 44, 45, 45, 0, 0, count, count, size, start)
            end += b"PK\6\7" + struct.pack("<IQI", 0, start + size, 1)
        n, size, start = min(count, _U16), min(size, _U32), min(start, _U32)
        self.chunk(end + b"PK\5\6" + struct.pack("<4H2IH", 0, 0, n, n, size, start, 0))

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
from typing import Any, NamedTuple, cast

from mmconvert.errors import RequestError
from mmconvert.formats.containers.image import FileImage, Piece, one_run
from mmconvert.formats.containers.torch_objects import STORAGE_DTYPE, TORCH_DTYPE, Global
from mmconvert.narrow import is_array, is_tuple
from mmconvert.stored import ITEM_SIZE

# torch aligns storages to 64 bytes so that they can be mapped into memory (storage_alignment).
ALIGNMENT = 64
_U16, _U32 = 0xFFFF, 0xFFFFFFFF  # from these values on, zip fields need their ZIP64 form
_FLAGS = 0x800  # names are UTF-8
_DATE = 0x21  # 1980-01-01, the first date there is: equal input gives equal bytes
_STORAGE_NAME = {dtype: name for name, dtype in STORAGE_DTYPE.items() if name != "UntypedStorage"}


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


class Namespace(NamedTuple):
    """An ``argparse.Namespace``, as Megatron saves its arguments."""

    values: Mapping[str, object]


class TensorSlot(NamedTuple):
    """A tensor in a pickle: its storage's key, safetensors dtype and shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]


Scalar = float | int | str  # bool is an int
# What a file may hold, nested: dicts, lists and tuples of scalars and tensors, namespaces, and
# dtypes of torch.
SlotTree = Mapping[Any, Any]


def emit_state(tree: object) -> bytes:
    """Pickle (protocol 2) nested containers of scalars and tensors as torch.save would.

    Each tensor is contiguous, alone in its storage and on the CPU, without gradient.

    Raises:
        RequestError: a dtype that has no typed torch storage, or a value of another type.
    """
    emitter = _Emitter()
    emitter.value(tree)
    return bytes(emitter.out + b".")


class _Emitter:
    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x02")
        self.memo: dict[bytes, int] = {}
        # Of tensors of one dtype and shape, which layers have many of: what stands before and
        # behind the storage's key.
        self.forms: dict[tuple[str, tuple[int, ...]], tuple[bytes, bytes]] = {}

    def shared(self, code: bytes) -> None:
        """Code whose object is used again and again: globals and the strings in each tensor."""
        if code in self.memo:
            self.out += b"h" + bytes([self.memo[code]])
        else:
            # At most 30: two functions, ten storage types, two strings, the dtypes, Namespace.
            self.memo[code] = len(self.memo)
            self.out += code + b"q" + bytes([self.memo[code]])

    def integer(self, value: int) -> None:
        if 0 <= value < 2**8:
            self.out += struct.pack("<cB", b"K", value)
        elif 0 <= value < 2**16:
            self.out += struct.pack("<cH", b"M", value)
        elif -(2**31) <= value < 2**31:
            self.out += struct.pack("<ci", b"J", value)
        elif (size := value.bit_length() // 8 + 1) < 256:  # floating-point operations are many
            self.out += b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
        else:
            raise RequestError(f"an integer of {value.bit_length()} bits", "at most 2039 bits")

    def sizes(self, values: tuple[object, ...]) -> None:
        """A tuple."""
        self.out += b"(" if len(values) > 3 else b""
        for value in values:
            self.value(value)
        self.out += {0: b")", 1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(values), b"t")

    def value(self, value: object) -> None:
        if isinstance(value, TensorSlot):
            self.tensor(value)
        elif isinstance(value, Namespace):
            self.shared(b"cargparse\nNamespace\n")
            self.out += b")\x81"
            self.mapping(value.values)
            self.out += b"b"
        elif isinstance(value, Global):
            self.dtype(value)
        elif isinstance(value, Mapping):
            self.mapping(cast("Mapping[object, object]", value))
        elif is_tuple(value):
            self.sizes(value)
        elif is_array(value):
            self.array(value)
        else:
            self.scalar(value)

    def scalar(self, value: object) -> None:
        if value is None:
            self.out += b"N"
        elif isinstance(value, bool):
            self.out += b"\x88" if value else b"\x89"
        elif isinstance(value, int):
            self.integer(value)
        elif isinstance(value, float):
            self.out += struct.pack(">cd", b"G", value)
        elif isinstance(value, str):
            self.out += _text(value)
        else:
            raise RequestError(
                f"a {type(value).__name__} cannot be written to a .pt file",
                expected="dicts, lists, tensors, numbers and text",
            )

    def dtype(self, value: Global) -> None:
        if value.module != "torch" or value.name not in TORCH_DTYPE:
            raise RequestError(f"{value} cannot be written to a .pt file", "a dtype of torch")
        self.shared(f"ctorch\n{value.name}\n".encode())

    def array(self, items: Sequence[object]) -> None:
        self.out += b"](" if items else b"]"
        for item in items:
            self.value(item)
        self.out += b"e" if items else b""

    def mapping(self, items: Mapping[Any, object]) -> None:
        self.out += b"}" + b"(" * (len(items) > 1)
        for key, item in items.items():
            self.value(_key(key))
            self.value(item)
        self.out += (b"", b"s", b"u")[min(len(items), 2)]

    def tensor(self, slot: TensorSlot) -> None:
        form = (slot.dtype, slot.shape)
        if (found := self.forms.get(form)) is None:
            known, start = len(self.memo), len(self.out)
            found = self.new_form(slot)
            del self.out[start:]
            if len(self.memo) == known:  # so the next one is written with the same bytes
                self.forms[form] = found
        self.out += found[0] + _text(slot.key) + found[1]

    def new_form(self, slot: TensorSlot) -> tuple[bytes, bytes]:
        """What stands before and behind the storage's key; ``out`` is left as it comes."""
        if slot.dtype not in _STORAGE_NAME:
            raise RequestError(
                f"a tensor of dtype {slot.dtype} cannot be written to a .pt file",
                expected=f"one of {', '.join(_STORAGE_NAME)}",
                fix="convert it to another dtype",
            )
        if any(n < 0 for n in slot.shape):
            raise RequestError(f"a tensor of shape {slot.shape} cannot be written")
        strides = tuple(
            prod(max(n, 1) for n in slot.shape[i + 1 :]) for i in range(len(slot.shape))
        )
        start = len(self.out)
        self.shared(b"ctorch._utils\n_rebuild_tensor_v2\n")
        self.out += b"(("
        self.shared(_text("storage"))
        self.shared(f"ctorch\n{_STORAGE_NAME[slot.dtype]}\n".encode())
        middle = len(self.out)
        self.shared(_text("cpu"))
        self.integer(prod(slot.shape))
        self.out += b"tQ"
        self.integer(0)
        self.sizes(slot.shape)
        self.sizes(strides)
        self.out += b"\x89"
        self.shared(b"ccollections\nOrderedDict\n")
        self.out += b")RtR"
        return bytes(self.out[start:middle]), bytes(self.out[middle:])


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<cI", b"X", len(data)) + data


def _key(key: object) -> object:
    """A key of a dict, if it can be one: text, a number, or a tuple of dtypes."""
    if isinstance(key, (str, int)) or (is_tuple(key) and all(isinstance(k, Global) for k in key)):
        return key
    raise RequestError(
        f"a {type(key).__name__} cannot be a key in a .pt file", expected="text or a number"
    )


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
    emitter = _Emitter()
    emitter.tensor(TensorSlot("0", dtype, shape))
    return _laid(bytes(emitter.out + b"."), prod(shape) * ITEM_SIZE[dtype])


def object_archive(value: SlotTree | Scalar) -> Laid:
    """What torch.save writes of a number, a text, or a dict of such."""
    emitter = _Emitter()
    emitter.value(value)
    return _laid(bytes(emitter.out + b"."), None)


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

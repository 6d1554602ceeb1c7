"""``.metadata`` of a DCP folder to be written: the pickle that torch's own classes are read from.

Protocol 2, and torch's names as they have been since 2.1. What the file would tell of the machine
that wrote it (``storage_meta``) is left out; readers do without.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence

from mmconvert.errors import RequestError
from mmconvert.formats.containers.torch_objects import TORCH_DTYPE
from mmconvert.formats.dcp.metadata import Entry, ItemPlace

_META = "torch.distributed.checkpoint.metadata"
_NAMES = {dtype: name for name, dtype in TORCH_DTYPE.items()}


def metadata_bytes(
    tensors: Mapping[str, Entry],
    objects: Mapping[str, ItemPlace],
    paths: Mapping[str, Sequence[str]] | None,
) -> bytes:
    """The file's bytes.

    Args:
        tensors, objects: as in :class:`mmconvert.formats.dcp.metadata.Metadata`.
        paths: flat name -> the keys that lead to it in the nested dict; None where names are not
            nested, as Megatron-Core writes them.

    Raises:
        RequestError: a dtype that torch has no name for.
    """
    out = _Pickle()
    out.begin(_META, "Metadata")
    out.text("state_dict_metadata")
    out.mapping({**dict.fromkeys(objects, _bytes), **{n: _tensor(e) for n, e in tensors.items()}})
    out.text("planner_data")
    if paths is None:
        out.raw(b"N")
    else:
        out.mapping({name: _path(path) for name, path in paths.items()})
    out.text("storage_data")
    out.raw(b"}(")
    for name, item in objects.items():
        _stored(out, name, None, 0, item)
    for name, entry in tensors.items():
        for number, piece in enumerate(entry.pieces):
            _stored(out, name, piece.offsets, number, piece.item)
    out.raw(b"u")
    out.end()
    return bytes(out.data + b".")


class _Pickle:
    def __init__(self) -> None:
        self.data = bytearray(b"\x80\x02")
        self.memo: dict[bytes, int] = {}

    def raw(self, code: bytes) -> None:
        self.data += code

    def shared(self, code: bytes) -> None:
        """Code whose object is used again and again."""
        if code in self.memo:
            self.data += b"j" + struct.pack("<I", self.memo[code])
        else:
            self.memo[code] = len(self.memo)
            self.data += code + b"r" + struct.pack("<I", self.memo[code])

    def name(self, module: str, name: str) -> None:
        self.shared(f"c{module}\n{name}\n".encode())

    def text(self, text: str) -> None:
        data = text.encode("utf-8", "surrogatepass")
        self.shared(b"X" + struct.pack("<I", len(data)) + data)

    def integer(self, value: int) -> None:
        if value < 1 << 8:
            self.data += struct.pack("<cB", b"K", value)
        elif value < 1 << 31:
            self.data += struct.pack("<ci", b"J", value)
        else:
            self.data += b"\x8a\x09" + value.to_bytes(9, "little")

    def sizes(self, values: Sequence[int]) -> None:
        self.name("torch", "Size")
        self.data += b"("
        for value in values:
            self.integer(value)
        self.data += b"t\x85R"

    def begin(self, module: str, name: str) -> None:
        """An object, before its attributes."""
        self.name(module, name)
        self.data += b")\x81}("

    def end(self) -> None:
        self.data += b"ub"

    def mapping(self, values: Mapping[str, Callable[[_Pickle], None]]) -> None:
        self.data += b"}("
        for key, write in values.items():
            self.text(key)
            write(self)
        self.data += b"u"


def _bytes(out: _Pickle) -> None:
    out.name(_META, "BytesStorageMetadata")
    out.raw(b")\x81")


def _tensor(entry: Entry) -> Callable[[_Pickle], None]:
    if entry.dtype not in _NAMES:
        raise RequestError(f"a tensor of dtype {entry.dtype} cannot be written to a DCP folder")

    def write(out: _Pickle) -> None:
        out.begin(_META, "TensorStorageMetadata")
        out.text("properties")
        out.name(_META, "TensorProperties")
        out.raw(b")\x81(")  # dtype, layout, requires_grad, memory format, pin_memory
        out.name("torch", _NAMES[entry.dtype])
        out.name("torch.serialization", "_get_layout")
        out.text("torch.strided")
        out.raw(b"\x85R\x89")
        out.name(_META, "_MEM_FORMAT_ENCODING")
        out.raw(b"K\x00\x85R\x89tb")
        out.text("size")
        out.sizes(entry.shape)
        out.text("chunks")
        out.raw(b"](")
        for piece in entry.pieces:
            out.begin(_META, "ChunkStorageMetadata")
            out.text("offsets")
            out.sizes(piece.offsets)
            out.text("sizes")
            out.sizes(piece.sizes)
            out.end()
        out.raw(b"e")
        out.end()

    return write


def _path(keys: Sequence[str]) -> Callable[[_Pickle], None]:
    def write(out: _Pickle) -> None:
        out.raw(b"(")
        for key in keys:
            out.text(key)
        out.raw(b"t")

    return write


def _stored(
    out: _Pickle, name: str, offsets: Sequence[int] | None, number: int, item: ItemPlace
) -> None:
    out.begin(_META, "MetadataIndex")
    out.text("fqn")
    out.text(name)
    out.text("offset")
    if offsets is None:
        out.raw(b"N")
    else:
        out.sizes(offsets)
    out.text("index")
    if offsets is None:
        out.raw(b"N")
    else:
        out.integer(number)
    out.end()
    out.begin("torch.distributed.checkpoint.filesystem", "_StorageInfo")
    out.text("relative_path")
    out.text(item.file)
    out.text("offset")
    out.integer(item.offset)
    out.text("length")
    out.integer(item.nbytes)
    out.end()

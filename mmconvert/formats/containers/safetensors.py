"""safetensors files: headers read and checked, headers written. Data is never touched here.

A file is 8 bytes of little-endian header length, a JSON header, then the data; each header
entry is ``{"dtype", "shape", "data_offsets": [begin, end]}`` with offsets into the data, which
the tensors fill without holes. Source: the safetensors format documentation.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeGuard

from mmconvert.causes.quantised import low_bit_dtype
from mmconvert.errors import FormatError, cannot_read
from mmconvert.formats.containers.image import FileImage, Piece, one_run
from mmconvert.formats.reading import opened
from mmconvert.narrow import is_array, is_object, is_texts
from mmconvert.stored import ITEM_SIZE, SCALED, StoredTensor, Target

MAX_HEADER = 100_000_000  # bytes; the safetensors library's own limit
MAX_DIM = 1 << 48  # no tensor is longer; keeps products of lying shapes small


class WeightFile(NamedTuple):
    """One safetensors file.

    Attributes:
        path: the file.
        header: its header, byte for byte.
        metadata: the ``__metadata__`` entry.
        tensors: its tensors in the order of their data.
    """

    path: Path
    header: bytes
    metadata: dict[str, str]
    tensors: list[StoredTensor]


def read_weight_file(path: Path) -> WeightFile:
    """Reads and checks the header of a safetensors file.

    Raises:
        FormatError: the file or its header breaks the format.
        CheckpointError: the file cannot be opened.
    """
    try:
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise _damaged(path, f"it has {size} bytes, too few for a safetensors file")
            length = struct.unpack("<Q", prefix)[0]
            if not 0 < length <= min(size - 8, MAX_HEADER):
                raise _damaged(path, f"header length {length} in a file of {size} bytes")
            header = file.read(length)
    except OSError as error:
        raise cannot_read(path, error) from error
    if len(header) != length:
        raise _damaged(path, "the header is cut off")
    entries = _parse(path, header)
    metadata = _metadata(path, entries.pop("__metadata__", {}))
    tensors = [_tensor(path, name, entry, 8 + length, size) for name, entry in entries.items()]
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    end = 8 + length
    for tensor in tensors:
        if tensor.offset != end:
            kind = "overlaps the tensor before it" if tensor.offset < end else "leaves a hole"
            raise _damaged(path, f"the data of {tensor.name} {kind} (byte {tensor.offset})")
        end = tensor.offset + tensor.nbytes
    if end != size:
        raise _damaged(path, f"tensors end at byte {end}, the file has {size} bytes")
    return WeightFile(path, header, metadata, tensors)


def expected_size(path: Path) -> int | None:
    """The size that a file's header asks for; None where the header itself is cut or damaged.

    Raises:
        CheckpointError: the file cannot be opened.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, MAX_HEADER))
    except OSError as error:
        raise cannot_read(path, error) from error
    try:
        entries = _parse(path, header)
        entries.pop("__metadata__", None)
        ends = [_end(entry) for entry in entries.values() if is_object(entry)]
    except (FormatError, LookupError, TypeError):
        return None
    sizes = [end for end in ends if _is_size(end)]
    return 8 + length + max(sizes, default=0) if len(sizes) == len(ends) else None


def _end(entry: Mapping[str, object]) -> object:
    """Where an entry says that its data ends.

    Raises:
        LookupError: it says nothing.
    """
    offsets = entry["data_offsets"]
    return offsets[1] if is_array(offsets) else None


def _damaged(path: Path, what: str) -> FormatError:
    return FormatError(
        f"{path}: {what}", "an undamaged safetensors file", "download or copy the file again"
    )


def parse_json(text: bytes, where: Path) -> object:
    """JSON from a stranger: no duplicate keys, no endless nesting.

    Raises:
        FormatError: not JSON, or not JSON that means one thing.
    """

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise ValueError(f"the key {twice!r} occurs twice")
        return found

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise FormatError(f"{where}: not valid JSON: {reason[:200]}", "a JSON object") from None


def _parse(path: Path, header: bytes) -> dict[str, object]:
    entries = parse_json(header, path)
    if not is_object(entries):
        raise _damaged(path, "the header is not a JSON object")
    return entries


def _metadata(path: Path, value: object) -> dict[str, str]:
    if value is None:  # null is no metadata, to the safetensors library too
        return {}
    if not is_texts(value):
        raise _damaged(path, "__metadata__ is not an object of strings")
    return value


def _tensor(path: Path, name: str, entry: object, start: int, size: int) -> StoredTensor:
    if not is_object(entry) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"the entry of {name!r} is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE or dtype == SCALED:
        raise low_bit_dtype(path, name, dtype) or _damaged(
            path, f"{name} has the unknown dtype {dtype!r}"
        )
    if not is_array(shape) or not _are_sizes(shape) or len(shape) > 8:
        raise _damaged(path, f"{name} has the shape {shape!r:.80}")
    if not is_array(offsets) or len(offsets) != 2 or not _are_sizes(offsets):
        raise _damaged(path, f"{name} has the data_offsets {offsets!r:.80}")
    begin, end = offsets
    tensor = StoredTensor(name, dtype, tuple(shape), path, start + begin)
    if end - begin != tensor.nbytes:
        raise _damaged(path, f"{name} {dtype} {shape} has {end - begin} bytes of data")
    if start + end > size:
        raise _damaged(path, f"{name} ends at byte {start + end} of a file of {size} bytes")
    return tensor


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_DIM


def _are_sizes(values: list[object]) -> TypeGuard[list[int]]:
    return all(map(_is_size, values))


def safetensors_image(
    path: str, targets: Sequence[Target], numbers: Sequence[int], metadata: Mapping[str, str]
) -> FileImage:
    """A file with some of the targets, in this order.

    The header is padded with spaces so that the data starts at a multiple of 8 bytes.
    """
    table: dict[str, object] = {}
    if metadata:
        table["__metadata__"] = dict(metadata)
    begin, starts = 0, list[int]()
    for number in numbers:
        target = targets[number]
        end = begin + target.nbytes
        shape = list(target.stack or target.shape)
        entry = {"dtype": target.dtype, "shape": shape, "data_offsets": [begin, end]}
        table[target.name] = entry
        starts.append(begin)
        begin = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    pieces = tuple(
        Piece(number, one_run(data + start, targets[number].nbytes))
        for number, start in zip(numbers, starts, strict=True)
    )
    return FileImage(path, data + begin, ((0, struct.pack("<Q", len(text)) + text),), pieces)

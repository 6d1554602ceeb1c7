"""The layout of a new MindSpore ``.ckpt`` file: everything but the tensor data.

Byte for byte what ``mindspore.save_checkpoint`` 2.7 writes for the same tensors in the same
order; see ``mmconvert/formats/containers/ckpt.py`` for the format. All sizes are known beforehand,
so a file is laid out first and the data is copied into it in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

from mmconvert.errors import CheckpointError, RequestError, cannot_write
from mmconvert.formats.containers.allocate import write_all
from mmconvert.formats.containers.ckpt import (
    CRC_BYTES,
    CRC_MARK,
    DTYPES,
    MAX_NAME,
    MAX_RANK,
    crc_of,
)
from mmconvert.formats.containers.image import FileImage, Piece
from mmconvert.formats.containers.protobuf import block, head, number
from mmconvert.stored import ITEM_SIZE, Extent, StoredTensor, Target

CHUNK = 512 << 20  # bytes of data that one record holds at most
_KIND = {dtype: kind for kind, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Seal:
    """The checksum behind the records, which end at ``end``; written when they are complete."""

    end: int

    def __call__(self, path: Path) -> None:
        """Writes it.

        Raises:
            OutputError: the file cannot be read back or written.
        """
        digits = CRC_BYTES - len(CRC_MARK)
        try:
            with path.open("r+b") as file:
                crc = crc_of(file, self.end)
                write_all(file.fileno(), crc.to_bytes(digits, "big"), self.end + len(CRC_MARK))
        except OSError as error:
            raise cannot_write(path, error) from error


def ckpt_image(
    path: str,
    targets: Sequence[Target],
    numbers: Sequence[int],
    *,
    crc: bool = False,
    chunk: int = CHUNK,
) -> FileImage:
    """A file with some of the targets, in this order.

    Args:
        crc: leave room for the checksum, which the image's seal fills in.
        chunk: bytes of data in one record at most; another value than MindSpore's is for tests.

    Raises:
        RequestError: a tensor that a .ckpt cannot hold.
    """
    heads: list[tuple[int, bytes]] = []
    pieces: list[Piece] = []
    names: set[str] = set()
    at = 0
    for tensor in numbers:
        target = targets[tensor]
        _check(target, names)
        found: list[Extent] = []
        for start in range(0, target.nbytes, chunk):
            size = min(chunk, target.nbytes - start)
            prefix = _record_head(target, size)
            heads.append((at, prefix))
            at += len(prefix)
            found.append(Extent(start, at, size))
            at += size
        pieces.append(Piece(tensor, tuple(found)))
    if not crc:
        return FileImage(path, at, heads, tuple(pieces))
    heads.append((at, CRC_MARK + bytes(CRC_BYTES - len(CRC_MARK))))
    return FileImage(path, at + CRC_BYTES, heads, tuple(pieces), Seal(at))


def _check(entry: Target, names: set[str]) -> None:
    if entry.name in names:
        raise RequestError(f"{entry.name} would be written twice", "each tensor once")
    names.add(entry.name)
    if entry.dtype not in _KIND:
        raise RequestError(
            f"{entry.name} is {entry.dtype}, which a .ckpt file cannot hold",
            f"one of {', '.join(_KIND)}",
        )
    if not prod(entry.shape):
        raise RequestError(
            f"{entry.name} has the shape {list(entry.shape)}: a .ckpt file cannot hold a tensor "
            "without elements",
            "tensors with elements",
            "leave it out with --drop",
        )
    if not 0 < len(entry.name.encode()) <= MAX_NAME or len(entry.shape) > MAX_RANK:
        raise RequestError(
            f"{entry.name[:80]!r} {list(entry.shape)} does not fit into a .ckpt file",
            f"a name of 1 to {MAX_NAME} bytes and at most {MAX_RANK} dimensions",
        )


def _record_head(entry: Target, size: int) -> bytes:
    """All of a record that stands before its ``size`` bytes of data, which end it."""
    content = head(3, size)
    dims = b"".join(number(1, n) for n in entry.shape)
    tensor = dims + block(2, _KIND[entry.dtype].encode()) + content
    value = block(1, entry.name.encode()) + head(2, len(tensor) + size) + tensor
    return head(1, len(value) + size) + value


class Rectangle(NamedTuple):
    """A contiguous piece of a tensor, seen as a matrix: what a plan can write into in one go."""

    row: int
    col: int
    stored: StoredTensor


def rectangles(tensor: StoredTensor) -> list[Rectangle]:
    """A tensor to be written, as plain tensors that lie in one run of the file each.

    A tensor in one piece is one rectangle. A cut inside a row gives three: the rest of the row,
    whole rows, the beginning of the next row.

    Raises:
        CheckpointError: a cut inside an element; MindSpore's chunks never have one.
    """
    if not tensor.extents:
        return [Rectangle(0, 0, tensor)]
    item = ITEM_SIZE[tensor.dtype]
    cols = prod(tensor.shape[1:])
    found: list[Rectangle] = []
    for extent in tensor.extents:
        if extent.start % item or extent.nbytes % item:
            raise CheckpointError(
                f"{tensor.name} in {tensor.path} is cut inside an element at its byte "
                f"{extent.start}",
                "pieces of whole elements",
            )
        at, last = extent.start // item, (extent.start + extent.nbytes) // item
        while at < last:
            row, col = divmod(at, cols)
            whole_rows = 0 if col else (last - at) // cols
            count = whole_rows * cols or min(cols - col, last - at)
            shape = (whole_rows, cols) if whole_rows else (1, count)
            offset = extent.offset + at * item - extent.start
            piece = StoredTensor(tensor.name, tensor.dtype, shape, tensor.path, offset)
            found.append(Rectangle(row, col, piece))
            at += count
    return found

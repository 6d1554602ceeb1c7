"""Items that differ from one read before in their data alone: they are not taken apart again.

An item of 64 ranks' weights is an archive of torch.save, whose structure takes a quarter of a
millisecond to read and check. Most have the bytes of another around their data, but for checksums.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mmconvert import positioned
from mmconvert.formats.containers.archive import Archive
from mmconvert.formats.dcp.metadata import ItemPlace
from mmconvert.stored import StoredTensor

MOST = 8192  # bytes around the data of an item that is remembered; torch has 1600
FORMS = 64  # items remembered of one size


class RememberedItem(NamedTuple):
    """An item that was read.

    Attributes:
        start, end: of the data in it.
        around: the bytes before and behind the data, without what may differ.
        differing: places in ``around``, and bytes there.
        tensor: as it was read, with its offset in the item.
    """

    start: int
    end: int
    around: bytes
    differing: Sequence[tuple[int, int]]
    tensor: StoredTensor


class Alike:
    """Remembers items."""

    def __init__(self) -> None:
        self.forms: dict[int, list[RememberedItem]] = {}

    def find(self, path: Path, file: BinaryIO, item: ItemPlace, name: str) -> StoredTensor | None:
        """The tensor of an item that is like one read before; None if none is."""
        for form in self.forms.get(item.nbytes, ()):
            around = _around(file, item, form.start, form.end)
            if around is not None and _without(around, form.differing) == form.around:
                offset = item.offset + form.tensor.offset
                return form.tensor._replace(name=name, path=path, offset=offset)
        return None

    def add(self, path: Path, file: BinaryIO, item: ItemPlace, tensor: StoredTensor) -> None:
        """Remembers an item that was read in full, if its data lie in one piece."""
        start = tensor.offset - item.offset
        end = start + tensor.nbytes
        known = self.forms.setdefault(item.nbytes, [])
        if tensor.extents or start + item.nbytes - end > MOST or len(known) == FORMS:
            return
        around = _around(file, item, start, end)
        if around is None:
            return
        places = Archive(path, file, (item.offset, item.nbytes)).checksums()
        differing = [(at if at < start else at - tensor.nbytes, n) for at, n in places]
        relative = tensor._replace(offset=start)
        known.append(RememberedItem(start, end, _without(around, differing), differing, relative))


def _around(file: BinaryIO, item: ItemPlace, start: int, end: int) -> bytes | None:
    """The bytes of an item before and behind its data; None where the file ends before."""
    head = positioned.pread(file.fileno(), start, item.offset)
    tail = positioned.pread(file.fileno(), item.nbytes - end, item.offset + end)
    return head + tail if len(head) + len(tail) == start + item.nbytes - end else None


def _without(around: bytes, differing: Sequence[tuple[int, int]]) -> bytes:
    """The bytes with zeros in some places."""
    found = bytearray(around)
    for at, count in differing:
        found[at : at + count] = bytes(count)
    return bytes(found)

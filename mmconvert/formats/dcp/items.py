"""The tensors of a DCP folder: each piece is an archive of torch.save in one of its files."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from mmconvert.errors import CheckpointError, FormatError
from mmconvert.formats.containers.ptfile import read_section
from mmconvert.formats.dcp.alike import Alike
from mmconvert.formats.dcp.metadata import Entry, ItemPlace, Metadata
from mmconvert.formats.reading import opened
from mmconvert.stored import StoredPart, StoredTensor

MAX_OBJECT = 64 << 20  # bytes of an object that is read
MOST_OPEN = 100  # files at once; 64 ranks may have written 16 each


class Items:
    """Reads items; keeps their files open until it is closed."""

    def __init__(self, metadata: Metadata) -> None:
        self.path = metadata.path
        self.folder = metadata.path.parent
        self.files: dict[str, tuple[BinaryIO, int]] = {}
        self.stack = ExitStack()
        self.alike = Alike()

    def __enter__(self) -> Items:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def tensor(self, name: str, entry: Entry) -> StoredTensor:
        """A tensor: as it is stored, or, if that is in several pieces, made of parts.

        Raises:
            CheckpointError: a file that is missing or too short; FormatError: an item that is not
                the piece that .metadata says.
        """
        parts = [
            StoredPart(piece.offsets, self.piece(name, entry.dtype, piece.sizes, piece.item))
            for piece in entry.pieces
        ]
        if len(parts) == 1:
            return parts[0].tensor
        filled = tuple(part for part in parts if 0 not in part.tensor.shape)
        return StoredTensor(name, entry.dtype, entry.shape, self.path, 0, parts=filled)

    def piece(self, name: str, dtype: str, sizes: tuple[int, ...], item: ItemPlace) -> StoredTensor:
        """The tensor that an item holds."""
        path, (file, size) = self.folder / item.file, self.opened(item.file)
        known = self.alike.find(path, file, item, name) if sum(item[1:]) <= size else None
        found = self.content(name, item) if known is None else known
        if not isinstance(found, StoredTensor):
            raise FormatError(
                f"{self.folder / item.file}: {name} at byte {item.offset} is not a tensor",
                f"{dtype} {list(sizes)}, as {self.path} says",
            )
        if (found.dtype, found.shape) != (dtype, sizes):
            raise FormatError(
                f"{found.path}: {name} at byte {item.offset} is {found.dtype} {list(found.shape)}",
                f"{dtype} {list(sizes)}, as {self.path} says",
                "take the .metadata and the files of one save",
            )
        if found.nbytes > item.nbytes:  # strides of 0, such as torch never saves: a bomb
            raise FormatError(
                f"{found.path}: {name} at byte {item.offset} has {found.nbytes} bytes in an item "
                f"of {item.nbytes}",
                "a tensor that is stored whole",
            )
        if known is None:
            self.alike.add(path, file, item, found)
        return found

    def value(self, name: str, item: ItemPlace) -> object:
        """What is no tensor, as inert data.

        Raises:
            FormatError: it is too large, or damaged.
        """
        if item.nbytes > MAX_OBJECT:
            raise FormatError(f"{self.path}: {name} has {item.nbytes} bytes", "a small object")
        return self.content(name, item)

    def content(self, name: str, item: ItemPlace) -> object:
        """What torch.save wrote as this item."""
        file, size = self.opened(item.file)
        if item.offset + item.nbytes > size:
            raise FormatError(
                f"{self.folder / item.file} ends at byte {size}; {name} is at {item.offset} and "
                f"has {item.nbytes} bytes",
                "the whole file",
                "copy the file again",
            )
        return read_section(self.folder / item.file, file, (item.offset, item.nbytes), name)

    def opened(self, name: str) -> tuple[BinaryIO, int]:
        """A file, and its size."""
        if name not in self.files:
            if len(self.files) == MOST_OPEN:
                self.stack.close()
                self.files.clear()
            path = self.folder / name
            try:
                file = self.stack.enter_context(opened(path))
                self.files[name] = file, path.stat().st_size
            except OSError as error:
                raise CheckpointError(
                    f"{path}, which {self.path} names: {error.strerror}",
                    "every file that .metadata names",
                    "copy the file too",
                ) from error
        return self.files[name]


def orphans(folder: Path, metadata: Metadata) -> list[str]:
    """The data files of a folder that nothing in its .metadata names."""
    named = {item.file for item in metadata.objects.values()}
    named |= {piece.item.file for entry in metadata.tensors.values() for piece in entry.pieces}
    return sorted(path.name for path in folder.glob("*.distcp") if path.name not in named)


def read_tensors(metadata: Metadata, names: Iterable[str]) -> dict[str, StoredTensor]:
    """Some of the tensors of a folder, by flat name.

    Raises:
        CheckpointError: as :meth:`Items.tensor`.
    """
    with Items(metadata) as items:
        return {name: items.tensor(name, metadata.tensors[name]) for name in names}

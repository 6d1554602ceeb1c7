"""A file that is to be written: everything but the tensor data, and where that goes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import NamedTuple

from mmconvert.formats.containers.allocate import opened, write_all, write_file
from mmconvert.stored import Extent, StoredTensor, Target


class Piece(NamedTuple):
    """Where the data of one tensor goes.

    Attributes:
        target: the tensor's number among those that are to be written.
        extents: where its bytes lie, in order; most lie in one run.
    """

    target: int
    extents: tuple[Extent, ...]


@dataclass(frozen=True)
class FileImage:
    """A file of an output.

    Attributes:
        path: below the output folder.
        size: bytes of the whole file.
        heads: (absolute offset, bytes) of all that is not tensor data, ascending.
        pieces: the tensors that lie in it.
        seal: completes the file when its data is in place, with a checksum for one.
        copied: the file that it is a copy of; it has no heads and no pieces then.
        pointer: it does but lead to the others, as an index or a tracker file; not listed in
            results.
    """

    path: str
    size: int
    heads: Sequence[tuple[int, bytes]] = ()
    pieces: tuple[Piece, ...] = ()
    seal: Callable[[Path], None] | None = field(default=None, repr=False)
    copied: Path | None = None
    pointer: bool = False

    @property
    def targets(self) -> tuple[int, ...]:
        """The numbers of the tensors in it."""
        return tuple(piece.target for piece in self.pieces)


def small(path: str, content: bytes, *, pointer: bool = False) -> FileImage:
    """A file without tensors."""
    return FileImage(path, len(content), ((0, content),), pointer=pointer)


def create(
    folder: Path, images: Sequence[FileImage], targets: Sequence[Target]
) -> list[StoredTensor]:
    """Creates files in a staging folder, their data as holes; those without data are complete.

    A file that is there already, left by an interrupted run, keeps its data.

    Returns:
        where each target is to be written, in their order.

    Raises:
        OSError: the file system refuses.
    """
    places: dict[int, StoredTensor] = {}
    for image in images:
        path = folder / image.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if image.copied is not None:
            path.unlink(missing_ok=True)  # what stands there may be a link
            shutil.copyfile(image.copied, path)
        elif image.pieces:
            with opened(path, image.size) as fd:
                for offset, data in image.heads:
                    write_all(fd, data, offset)
        else:
            write_file(path, b"".join(data for _, data in image.heads))
        places |= {p.target: place_of(targets[p.target], path, p.extents) for p in image.pieces}
    return [places[number] for number in range(len(targets))]


def place_of(target: Target, path: Path, extents: tuple[Extent, ...]) -> StoredTensor:
    """A tensor as a reader of the complete file will see it."""
    name, dtype, shape = target[:3]
    if len(extents) == 1:
        return StoredTensor(name, dtype, shape, path, extents[0].offset)
    strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    return StoredTensor(name, dtype, shape, path, extents[0].offset, strides, extents)


def finish(folder: Path, images: Sequence[FileImage]) -> None:
    """Completes the files whose data is in place.

    Raises:
        OutputError: a file cannot be read back or written.
    """
    for image in images:
        if image.seal is not None:
            image.seal(folder / image.path)


def one_run(start: int, nbytes: int) -> tuple[Extent, ...]:
    """The data of a tensor in one run of its file."""
    return (Extent(0, start, nbytes),)

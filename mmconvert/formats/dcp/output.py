"""The files of a DCP folder to be written: data files with an item for each piece, .metadata."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from mmconvert.formats.containers.image import FileImage, Piece, one_run, small
from mmconvert.formats.containers.ptpickle import Scalar
from mmconvert.formats.containers.ptwriter import Laid, object_archive, tensor_archive
from mmconvert.formats.dcp import metadata
from mmconvert.formats.dcp.metadata import NAME, Entry, ItemPlace
from mmconvert.formats.dcp.metadata_writer import metadata_bytes
from mmconvert.formats.dcp.naming import MODEL
from mmconvert.plan.plan import Block, Side, Whole
from mmconvert.stored import Target

ALIGNMENT = 64  # of each item, and so of its data: a typed array may be mapped there


class Written(NamedTuple):
    """A piece of a tensor to be written, one for each target.

    Attributes:
        name: flat name.
        shape: of the whole tensor.
        offsets, sizes: of this piece in it.
        file: the data file.
    """

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str


def data_file(rank: int, number: int = 0) -> str:
    """The name of a data file."""
    return f"__{rank}_{number}.distcp"


def whole_pieces(targets: Sequence[Target], files: Mapping[str, str]) -> list[Written]:
    """Each tensor in one piece, in the file that is given for its name, else in the first."""
    found: list[Written] = []
    for target in targets:
        shape = target.stack or target.shape
        file = files.get(target.name, data_file(0))
        found.append(Written(target.name, shape, (0,) * len(shape), shape, file))
    return found


def sharded(side: Side, ranks: int) -> tuple[Side, list[Written]]:
    """Every tensor divided along its first dimension over ranks, as FSDP2 divides parameters:
    ranks hold ceil(rows / ranks) each, the last ones fewer or none.
    """
    made = Side()
    written: list[Written] = []
    shards: list[list[tuple[int, int, int]]] = []  # of each target: number, first row, rows
    for target in side.targets:
        shape = target.stack or target.shape
        mine: list[tuple[int, int, int]] = []
        each = -(-shape[0] // ranks) if shape else 1
        per = target.shape[0] // shape[0] if shape and shape[0] else 1  # rows of one step
        for rank in range(ranks if shape and shape[0] else 1):
            first, last = rank * each, min((rank + 1) * each, shape[0] if shape else 1)
            if first >= last and rank:
                break
            rest = shape[1:]
            sizes = (last - first, *rest) if shape else ()
            offsets = (first, *(0 for _ in rest)) if shape else ()
            mine.append((len(made.targets), first * per, (last - first) * per))
            rows = ((last - first) * per, *target.shape[1:]) if shape else ()
            stack = sizes if target.stack else ()
            made.targets.append(Target(target.name, target.dtype, rows, stack=stack))
            written.append(Written(target.name, shape, offsets, sizes, data_file(rank)))
        shards.append(mine)
    for key, whole in side.wholes.items():
        copies = [
            [cut for b in blocks for cut in _cut(b, shards[b.tensor])] for blocks in whole.copies
        ]
        made.wholes[key] = Whole(whole.shape, whole.dtype, copies, whole.zeros)
    return made, written


def _cut(block: Block, shards: Sequence[tuple[int, int, int]]) -> Iterator[Block]:
    """A block of a tensor as blocks of its shards."""
    for number, first, rows in shards:
        start = max(block.row, first)
        count = min(block.row + block.rows, first + rows) - start
        if count > 0:
            whole_row = block.whole_row + start - block.row
            yield block._replace(tensor=number, row=start - first, whole_row=whole_row, rows=count)


def folder_images(
    folder: str,
    written: Sequence[Written],
    targets: Sequence[Target],
    objects: Mapping[str, Scalar],
    *,
    nested: bool = True,
) -> Iterator[FileImage]:
    """The data files, and .metadata.

    Args:
        folder: below the output folder; "" is the output folder itself.
        written: what each target is.
        objects: flat name -> what else is kept.
        nested: names are those of a nested dict (``model``), not keys as they are.
    """
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, list[metadata.StoredChunk]] = {}
    kept: dict[str, ItemPlace] = {}
    files: dict[str, list[int]] = {}
    for number, piece in enumerate(written):
        files.setdefault(piece.file, []).append(number)
    first = min(files, default=data_file(0))
    for file in sorted(files) or [first]:
        heads: list[tuple[int, bytes]] = []
        pieces: list[Piece] = []
        at = 0
        for name, value in objects.items() if file == first else ():
            laid = object_archive(value)
            heads += [(at + offset, data) for offset, data in laid.heads]
            kept[name] = ItemPlace(file, at, laid.size)
            at += laid.size
        for number in sorted(files.get(file, ()), key=lambda n: written[n][:3]):
            one, dtype = written[number], targets[number].dtype
            at += -at % ALIGNMENT
            laid = _laid(dtype, one.sizes)
            heads += [(at + offset, data) for offset, data in laid.heads]
            pieces.append(Piece(number, one_run(at + laid.start, targets[number].nbytes)))
            item = ItemPlace(file, at, laid.size)
            entries.setdefault(one.name, []).append(
                metadata.StoredChunk(one.offsets, one.sizes, item)
            )
            at += laid.size
        yield FileImage(f"{prefix}{file}", at, heads, tuple(pieces))
    shapes = {one.name: (targets[n].dtype, one.shape) for n, one in enumerate(written)}
    tensors = {name: Entry(*shapes[name], tuple(entries[name])) for name in sorted(entries)}
    paths = {name: _path(name) for name in [*kept, *tensors]} if nested else None
    yield small(f"{prefix}{NAME}", metadata_bytes(tensors, kept, paths), pointer=True)


def _path(name: str) -> tuple[str, ...]:
    """The keys that lead to a value: those of the model stand in a dict of their own."""
    return (MODEL[:-1], name[len(MODEL) :]) if name.startswith(MODEL) else (name,)


@lru_cache(maxsize=512)
def _laid(dtype: str, shape: tuple[int, ...]) -> Laid:
    return tensor_archive(dtype, shape)

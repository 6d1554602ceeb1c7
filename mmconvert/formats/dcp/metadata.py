"""``.metadata`` of a DCP folder: which tensors there are, and where each piece of them lies.

It is a pickle of torch's own classes; nothing of it is imported or run, and every number in it is
checked here. Source: ``metadata.py`` and ``filesystem.py`` of torch.distributed.checkpoint, 2.1 to
2.13.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import NamedTuple, cast

from mmconvert.errors import CheckpointError, FormatError, TensorError
from mmconvert.formats.containers.pickles import Global, Inert, load_pickle
from mmconvert.formats.containers.torch_objects import MAX_DIMS, TORCH_DTYPE
from mmconvert.formats.dcp.tiles import tile
from mmconvert.formats.reading import State, note, read_at_most
from mmconvert.narrow import is_array, is_dict, is_sequence, is_tuple
from mmconvert.stored import ITEM_SIZE

NAME = ".metadata"
MAX_METADATA = 1 << 30  # bytes; 140,000 pieces of tensors and their moments have 20 MB
_INT64 = 1 << 63


class ItemPlace(NamedTuple):
    """Where an item lies: its file, below the folder, and the bytes there."""

    file: str
    offset: int
    nbytes: int


class StoredChunk(NamedTuple):
    """A rectangle of a tensor, and the item that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    item: ItemPlace


class Entry(NamedTuple):
    """A tensor: safetensors dtype, shape, and the pieces that tile it."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[StoredChunk, ...]


@dataclass(frozen=True)
class Metadata:
    """What a DCP folder holds.

    Attributes:
        path: of the file.
        tensors: by flat name.
        objects: what is no tensor, by flat name.
        shapes: of tensors that Megatron's optimizers store flattened, their shape as it was.
    """

    path: Path
    tensors: Mapping[str, Entry]
    objects: Mapping[str, ItemPlace]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])


def read_metadata(folder: Path) -> Metadata:
    """Reads and checks ``.metadata``.

    Raises:
        CheckpointError: it is not there, as in a save that was interrupted; FormatError: damaged,
            or it names what does not belong there; TensorError: pieces that do not tile a tensor.
    """
    path = folder / NAME
    if not path.is_file():
        raise _unfinished(folder)
    note([path])
    return _read(path, State.of(path.stat()))


@lru_cache(maxsize=2)
def _read(path: Path, state: State) -> Metadata:
    """The file in this state: it is asked for several times, and large ones take seconds."""
    del state
    data = read_at_most(path, MAX_METADATA, "a .metadata of DCP")
    return _Reader(path).metadata(load_pickle(data, str(path)))


def _unfinished(folder: Path) -> CheckpointError:
    parts = sorted(path.name for path in folder.glob("__*.metadata"))
    if (folder / f"{NAME}.tmp").exists():
        return CheckpointError(
            f"{folder} has {NAME}.tmp and no {NAME}: the save was interrupted",
            f"{NAME}, which is written last",
            "take the checkpoint before this one",
        )
    if parts:
        return CheckpointError(
            f"{folder} has a metadata file for each rank ({parts[0]} ...) and no {NAME}: it was "
            "saved without collectives",
            f"one {NAME} for all ranks",
            "load it with torch.distributed.checkpoint and save it with no_dist=False",
        )
    return CheckpointError(
        f"{folder} has no {NAME}: the save is unfinished, or the file was not copied",
        f"{NAME} beside the *.distcp files",
        f"copy {NAME} too (its name begins with a dot), or take another checkpoint",
    )


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.stored: dict[tuple[str, tuple[int, ...]], ItemPlace] = {}

    def error(self, what: str, expected: str = "what torch.distributed.checkpoint writes"):  # noqa: ANN202 - as named
        return FormatError(f"{self.path}: {what}", expected, "copy the checkpoint again")

    def metadata(self, tree: object) -> Metadata:
        state = self.state(tree, "Metadata")
        self.stored = dict(self.items(state.get("storage_data")))
        self.check_apart()
        listed = state.get("state_dict_metadata")
        if not is_dict(listed):
            raise self.error("state_dict_metadata is not a dict")
        tensors: dict[str, Entry] = {}
        objects: dict[str, ItemPlace] = {}
        for name, value in listed.items():
            if not isinstance(name, str):
                raise self.error(f"a name is a {type(name).__name__}")
            kind = self.kind(value)
            if kind == "BytesStorageMetadata":
                objects[name] = self.item(name, ())
            elif kind == "TensorStorageMetadata":
                tensors[name] = self.entry(name, self.state(value, kind))
            else:
                raise self.error(f"{name} is a {kind}", "tensors and objects")
        if self.stored:
            name, offsets = next(iter(self.stored))
            raise self.error(f"an item of {name} at {list(offsets)} is not in the list of tensors")
        return Metadata(self.path, tensors, objects, self.shapes(state.get("mcore_data")))

    def check_apart(self) -> None:
        """Raises FormatError for two items that share bytes of a file."""
        last: tuple[ItemPlace, str] | None = None
        for item, name in sorted((item, name) for (name, _), item in self.stored.items()):
            if last and last[0].file == item.file and sum(last[0][1:]) > item.offset:
                raise self.error(
                    f"{name} at byte {item.offset} of {item.file} overlaps {last[1]}",
                    "items that do not overlap",
                )
            last = item, name

    def kind(self, value: object) -> str:
        """The name of a torch class that an object is of."""
        if isinstance(value, Inert) and isinstance(value.function, Global):
            if value.function.module.startswith("torch.distributed."):
                return value.function.name
            raise self.error(f"it names {value.function}")
        raise self.error(f"a {type(value).__name__} where an object of torch is expected")

    def state(self, value: object, kind: str) -> dict[str, object]:
        """The attributes of an object of a class."""
        if self.kind(value) != kind:
            raise self.error(f"a {self.kind(value)} where a {kind} is expected")
        state = cast("Inert", value).state
        if not is_dict(state):
            raise self.error(f"a {kind} without attributes")
        return cast("dict[str, object]", state)

    def items(self, found: object) -> Iterator[tuple[tuple[str, tuple[int, ...]], ItemPlace]]:
        if not is_dict(found):
            raise self.error("storage_data is not a dict")
        for key, value in found.items():
            index, where = self.state(key, "MetadataIndex"), self.state(value, "_StorageInfo")
            name, offset = index.get("fqn"), index.get("offset")
            if not isinstance(name, str):
                raise self.error("an item without a name")
            yield (name, () if offset is None else self.sizes(offset, name)), self.where(where)

    def where(self, state: Mapping[str, object]) -> ItemPlace:
        file, offset, nbytes = (state.get(k) for k in ("relative_path", "offset", "length"))
        if not isinstance(file, str) or not _is_plain(file):
            raise self.error(f"an item is in {file!r:.80}", "the name of a file in the folder")
        if not (_is_size(offset) and _is_size(nbytes)):
            raise self.error(f"an item in {file} is at {offset!r:.40}, {nbytes!r:.40} bytes")
        if descriptors := state.get("transform_descriptors"):
            raise self.error(
                f"the items in {file} were transformed when they were saved: {descriptors!r:.80}",
                "plain items",
            )
        return ItemPlace(file, cast("int", offset), cast("int", nbytes))

    def item(self, name: str, offsets: tuple[int, ...]) -> ItemPlace:
        """Takes the item of a piece."""
        found = self.stored.pop((name, offsets), None)
        if found is None:
            at = f" at {list(offsets)}" if offsets else ""
            raise TensorError(
                f"{self.path}: no item holds {name}{at}", "an item for each piece of each tensor"
            )
        return found

    def sizes(self, value: object, name: str) -> tuple[int, ...]:
        if is_tuple(value) and len(value) <= MAX_DIMS and all(map(_is_size, value)):
            return cast("tuple[int, ...]", value)
        raise self.error(f"{name}: {value!r:.80} is not a size")

    def entry(self, name: str, state: Mapping[str, object]) -> Entry:
        shape = self.sizes(state.get("size"), name)
        dtype = self.dtype(state.get("properties"), name)
        chunks = state.get("chunks")
        if not is_array(chunks) or prod(shape) >= _INT64:
            raise self.error(f"{name} {list(shape)} has no list of chunks")
        pieces: list[StoredChunk] = []
        for chunk in chunks:
            place = self.state(chunk, "ChunkStorageMetadata")
            offsets, sizes = (self.sizes(place.get(k), name) for k in ("offsets", "sizes"))
            if len(offsets) != len(shape) or len(sizes) != len(shape):
                raise self.error(f"{name} {list(shape)} has a piece at {list(offsets)}")
            pieces.append(StoredChunk(offsets, sizes, self.item(name, offsets)))
        self.check_tiles(name, shape, pieces)
        return Entry(dtype, shape, tuple(pieces))

    def dtype(self, properties: object, name: str) -> str:
        """The dtype, which is the first of the properties' state."""
        if self.kind(properties) != "TensorProperties":
            raise self.error(f"{name} has no properties")
        state = cast("Inert", properties).state
        first = state[0] if is_sequence(state) and state else None
        if is_dict(state):
            first = state.get("dtype")
        found = TORCH_DTYPE.get(first.name, "") if isinstance(first, Global) else ""
        if found not in ITEM_SIZE:
            raise self.error(f"{name} has the dtype {first}", "a dtype that safetensors has")
        return found

    def check_tiles(self, name: str, shape: tuple[int, ...], pieces: list[StoredChunk]) -> None:
        """Raises TensorError for pieces that leave a gap, overlap, or reach outside."""
        if len(pieces) == 1 and pieces[0].sizes == shape and not any(pieces[0].offsets):
            return
        if tile([(piece.offsets, piece.sizes) for piece in pieces], shape):
            return
        raise TensorError(
            f"{self.path}: the {len(pieces)} pieces of {name} do not fill its shape {list(shape)} "
            "exactly once",
            "pieces that tile the tensor",
            "the save is damaged or unfinished: take another checkpoint",
        )

    def shapes(self, found: object) -> dict[str, tuple[int, ...]]:
        """The shapes that Megatron notes of tensors that it stores flattened."""
        key = "nd_reformulated_orig_global_shape"
        listed = found.items() if is_dict(found) else ()
        return {
            name: self.sizes(value[key], name)
            for name, value in listed
            if isinstance(name, str) and is_dict(value) and value.get(key) is not None
        }


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < _INT64


def _is_plain(name: str) -> bool:
    """Whether it is the name of a file in the folder itself."""
    return bool(name) and "\0" not in name and "\\" not in name and Path(name).name == name

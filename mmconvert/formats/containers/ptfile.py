"""Reads the metadata of a ``.pt`` file (zip format of torch.save, torch 1.6 and later).

Nothing is executed and no tensor data is read: a tensor becomes its place in the file.  The
archive is checked in full, because offsets taken from it are read later without further checks.
Rules: ``_load`` in ``torch/serialization.py``, and the zip specification (PKWARE APPNOTE 4.3).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from mmconvert.errors import CheckpointError
from mmconvert.formats.containers.archive import Archive, Record
from mmconvert.formats.containers.pickles import Inert, StorageRef, TensorRef, load_pickle
from mmconvert.formats.containers.ptwriter import Slot, pt_image
from mmconvert.formats.reading import opened
from mmconvert.narrow import is_dict, is_frozenset, is_sequence, is_set
from mmconvert.stored import ITEM_SIZE, StoredTensor

__all__ = ["PtFile", "Slot", "pt_image", "read_pt", "read_tree"]

T = TypeVar("T")

# Largest data.pkl that is read into memory; one of 250,000 tensors has about 50 MiB.
MAX_PICKLE = 512 * 2**20
# Nesting of lists, dicts, tuples and objects in a checkpoint; Megatron's are below 20.
MAX_DEPTH = 100


@dataclass(frozen=True, slots=True)
class PtFile:
    """What a ``.pt`` file contains.

    Attributes:
        path: the file.
        content: the top-level dict.  Tensors among dict values, list and tuple items and in
            inert objects are StoredTensors, named by their key in the innermost dict; tensors
            used as dict keys or set items are left as TensorRefs.
        storage_bytes: key of a storage record -> its bytes.
    """

    path: Path
    content: dict[str, Any]
    storage_bytes: dict[str, int]
    _starts: list[tuple[int, str]] = field(repr=False)

    def storage_of(self, tensor: StoredTensor) -> tuple[int, str]:
        """Where the storage that a tensor is a view of begins in the file, and its key.

        A tensor begins at or after its storage's start and before the next one's.
        """
        return self._starts[bisect_right(self._starts, (tensor.offset, "\U0010ffff")) - 1]

    def referenced_bytes(self, subtree: object) -> int:
        """Bytes of the storages that anything in a part of ``content`` refers to.

        A storage counts once and in full, also when only views of it are referred to.
        """
        keys: set[str] = set()
        seen: set[int] = set()
        pending: list[object] = [subtree]
        while pending:
            item = pending.pop()
            if isinstance(item, StoredTensor):
                keys.add(self.storage_of(item)[1])
            elif isinstance(item, (TensorRef, StorageRef)):
                keys.add(item.storage.key if isinstance(item, TensorRef) else item.key)
            elif (
                is_dict(item)
                or is_sequence(item)
                or is_set(item)
                or is_frozenset(item)
                or isinstance(item, Inert)
            ) and id(item) not in seen:
                seen.add(id(item))
                if isinstance(item, Inert):
                    pending += [item.function, item.args, item.state, item.items, item.entries]
                else:
                    pending += item
                    pending += item.values() if is_dict(item) else ()
        return sum(self.storage_bytes.get(key, 0) for key in keys)


def read_pt(path: Path) -> PtFile:
    """Read a ``.pt`` file's structure and the places of its tensors.

    Args:
        path: the file.

    Raises:
        FormatError: it is not what torch.save writes, is damaged, or was written on a big-endian
            machine or in the format before torch 1.6.
        CheckpointError: the file cannot be read.
    """
    return _opened(path, _Reader.read)


def read_tree(path: Path) -> object:
    """What a ``.pt`` file holds where its top level is no dict with text keys.

    Raises:
        FormatError, CheckpointError: as :func:`read_pt`.
    """
    return _opened(path, lambda reader: reader.resolve(reader.tree(), "", 0))


def _opened(path: Path, read: Callable[[_Reader], T]) -> T:
    try:
        with opened(path) as file:
            return read(_Reader(path, file))
    except OSError as error:
        raise CheckpointError(
            f"{path}: {error.strerror or error}", expected="a readable .pt file"
        ) from error


def read_section(path: Path, file: BinaryIO, section: tuple[int, int], name: str) -> object:
    """Read what torch.save wrote into a section of a file: a tensor, or any object.

    Args:
        path, file: the file, and the same open for reading.
        section: where it begins, and its bytes.
        name: of the tensor.

    Returns:
        a StoredTensor, or a tree as in :class:`PtFile`.

    Raises:
        FormatError: as :func:`read_pt`.
    """
    reader = _Reader(path, file, section)
    return reader.resolve(reader.tree(), name, 0)


class _Reader:
    def __init__(self, path: Path, file: BinaryIO, section: tuple[int, int] | None = None) -> None:
        self.path = path
        self.archive = Archive(path, file, section)
        self.error = self.archive.error
        self.root = ""
        self.records: dict[str, Record] = {}
        self.done: dict[int, Any] = {}
        self.kept: list[Any] = []

    def tree(self) -> object:
        self.archive.check_start()
        self.records = self.archive.read_directory()
        pickles = [n for n in self.records if n.endswith("/data.pkl") and n.count("/") == 1]
        if len(pickles) != 1:
            raise self.error(f"{len(pickles)} records */data.pkl", expected="exactly one")
        self.root = pickles[0].removesuffix("data.pkl")
        self.check_byte_order()
        record = self.records[pickles[0]]
        if record.size > MAX_PICKLE:
            raise self.error(f"{pickles[0]} has {record.size} bytes", f"at most {MAX_PICKLE}")
        return load_pickle(
            self.archive.pread(record.size, record.start), f"{self.path}: {pickles[0]}"
        )

    def read(self) -> PtFile:
        tree = self.tree()
        if not is_dict(tree) or not all(isinstance(key, str) for key in tree):
            raise self.error(
                f"the top level is a {type(tree).__name__}",
                expected="a dict with text keys, such as {'model': ..., 'checkpoint_version': 3.0}",
                fix="save a dict of tensors: torch.save(model.state_dict(), file)",
            )
        self.resolve(tree, "", 0)
        prefix = f"{self.root}data/"
        storages = {
            n.removeprefix(prefix): r for n, r in self.records.items() if n.startswith(prefix)
        }
        starts = sorted((record.start, key) for key, record in storages.items())
        sizes = {key: record.size for key, record in storages.items()}
        return PtFile(self.path, cast("dict[str, Any]", tree), sizes, starts)

    def check_byte_order(self) -> None:
        record = self.records.get(f"{self.root}byteorder")
        if record is None:  # torch before 2.1
            return
        order = self.archive.pread(min(record.size, 16), record.start)
        if order != b"little":
            raise self.error(
                f"byte order {order!r}",
                expected="'little'",
                fix="load and save it with torch on a little-endian machine",
            )

    # The tree.

    def resolve(self, item: object, name: str, depth: int) -> object:
        """Replace TensorRefs by StoredTensors: in place in dicts, lists and inert objects.

        Args:
            item: what to replace or to look into.
            name: the key of the innermost dict around it.
            depth: containers around it.
        """
        if isinstance(item, TensorRef):
            return self.tensor(item, name)
        if isinstance(item, StorageRef):
            self.storage(item)
            return item
        if not (is_dict(item) or is_sequence(item) or isinstance(item, Inert)):
            return item
        if id(item) in self.done:
            return self.done[id(item)]
        if depth > MAX_DEPTH:
            raise self.error(f"the pickle is nested more than {MAX_DEPTH} deep")
        if isinstance(item, tuple):
            made = tuple([self.resolve(part, name, depth + 1) for part in item])
            self.done[id(item)] = made
            self.kept.append(item)  # an id is its own only while the object lives
            return made
        self.done[id(item)] = item  # before looking into it: it may contain itself
        self.resolve_within(item, name, depth + 1)
        return item

    def resolve_within(
        self, item: dict[object, object] | list[object] | Inert, name: str, depth: int
    ) -> None:
        """Replace, in place, what stands in a container."""
        if isinstance(item, dict):
            for key, value in item.items():
                # Other keys are not spelled out: the text of a nested one may be huge.
                inner = str(key) if isinstance(key, (str, int)) else type(key).__name__
                item[key] = self.resolve(value, inner, depth)
        elif isinstance(item, list):
            item[:] = [self.resolve(part, name, depth) for part in item]
        else:
            for part in ("args", "state", "items", "entries"):
                setattr(item, part, self.resolve(getattr(item, part), name, depth))

    def storage(self, ref: StorageRef) -> Record:
        """The record behind a storage."""
        record = self.records.get(f"{self.root}data/{ref.key}")
        if record is None:
            raise self.error(f"storage {ref.key[:80]!r} has no record in the archive")
        # torch counts a storage in whole elements, so a remainder is possible.
        if ref.dtype and ref.numel != record.size // ITEM_SIZE[ref.dtype]:
            raise self.error(
                f"storage {ref.key[:80]!r} has {record.size} bytes",
                expected=f"{ref.numel} elements of {ref.dtype}",
            )
        return record

    def tensor(self, ref: TensorRef, name: str) -> StoredTensor:
        record = self.storage(ref.storage)
        empty = 0 in ref.shape  # its offset may be anything; the start of the record is safe
        offset = (
            self.archive.base + record.start + (0 if empty else ref.offset * ITEM_SIZE[ref.dtype])
        )
        strides = None if empty or _is_contiguous(ref) else ref.strides
        return StoredTensor(name, ref.dtype, ref.shape, self.path, offset, strides)


def _is_contiguous(ref: TensorRef) -> bool:
    """Row-major without gaps; the stride of a dimension of one element means nothing."""
    expected = 1
    for size, stride in zip(reversed(ref.shape), reversed(ref.strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True

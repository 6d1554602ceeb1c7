"""Writes Hugging Face checkpoint folders: weight files without their data, index, side files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmconvert.errors import FormatError, RequestError, TensorError
from mmconvert.formats.containers.allocate import opened, write_all, write_file
from mmconvert.formats.containers.safetensors import Entry, layout_weight_file, parse_json
from mmconvert.formats.hf import bin as hf_bin
from mmconvert.formats.hf.folder import INDEX, SINGLE, HFCheckpoint
from mmconvert.stored import StoredTensor

# Where config.json names the dtype of the weights: torch_dtype until transformers 4.55, then dtype.
DTYPE_KEYS = ("torch_dtype", "dtype")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class WeightFilePlan:
    """A weight file to be written.

    Attributes:
        name: of the file.
        entries: its tensors, in the order of their data.
        head: all bytes before the data.
        starts: absolute offset of each tensor's data.
        size: bytes of the file.
    """

    name: str
    entries: tuple[Entry, ...]
    head: bytes
    starts: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class WeightsPlan:
    """All weight files, and the index; None for a checkpoint without one."""

    files: tuple[WeightFilePlan, ...]
    index: bytes | None


def plan_weights(model: HFCheckpoint, entries: Mapping[str, Entry], limit: int = 0) -> WeightsPlan:
    """The weight files to be written.

    Where tensors, dtypes and shapes are those of ``model``, headers and index are its own, byte
    for byte.

    Args:
        model: the checkpoint whose weight files, order, metadata and index are reproduced.
        entries: what to write; tensors of ``model`` that are not among them are left out.
        limit: bytes of tensors that a file may hold, in new files; 0 keeps those of ``model``.

    Raises:
        FormatError: two files whose names differ only in case, which not every disk tells apart.
    """
    if limit:
        return _new_files(model, entries, limit)
    names = [file.path.name.casefold() for file in model.files]
    if len(set(names)) < len(names):
        raise FormatError(f"{model.folder}: two weight files have the same name but for its case")
    files: list[WeightFilePlan] = []
    same = True
    for file in model.files:
        expected = [entries[t.name] for t in file.tensors if t.name in entries]
        if not expected:
            same = False
            continue
        if not file.header:  # a pickle: safetensors are written in its place
            same = False
            files.append(_laid_out(hf_bin.as_safetensors(file.path.name), expected, file.metadata))
        elif expected == [Entry(t.name, t.dtype, t.shape) for t in file.tensors]:
            head = len(file.header).to_bytes(8, "little") + file.header
            starts = tuple(t.offset for t in file.tensors)
            size = max(t.offset + t.nbytes for t in file.tensors)
            files.append(WeightFilePlan(file.path.name, tuple(expected), head, starts, size))
        else:
            same = False
            files.append(_laid_out(file.path.name, expected, file.metadata))
    index = model.index
    if index is not None and not same:
        index = _index(index, files)
    return WeightsPlan(tuple(files), index)


def _laid_out(name: str, entries: Sequence[Entry], metadata: Mapping[str, str]) -> WeightFilePlan:
    head, starts, size = layout_weight_file(list(entries), metadata)
    return WeightFilePlan(name, tuple(entries), head, tuple(starts), size)


def _new_files(model: HFCheckpoint, entries: Mapping[str, Entry], limit: int) -> WeightsPlan:
    """Files filled in the order of ``model``'s tensors, named as transformers names them."""
    groups: list[list[Entry]] = [[]]
    used = 0
    for file in model.files:
        for name in (t.name for t in file.tensors if t.name in entries):
            if groups[-1] and used + entries[name].nbytes > limit:
                groups.append([])
                used = 0
            groups[-1].append(entries[name])
            used += entries[name].nbytes
    metadata = model.files[0].metadata
    if len(groups) == 1:
        return WeightsPlan((_laid_out(SINGLE, groups[0], metadata),), None)
    files = tuple(
        _laid_out(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group, metadata)
        for i, group in enumerate(groups, 1)
    )
    return WeightsPlan(files, _index(model.index or b"{}", files))


def _index(old: bytes, files: Sequence[WeightFilePlan]) -> bytes:
    content = json.loads(old)
    weight_map = {entry.name: file.name for file in files for entry in file.entries}
    total = sum(entry.nbytes for file in files for entry in file.entries)
    metadata = content.get("metadata")
    content["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": total}
    content["weight_map"] = dict(sorted(weight_map.items()))
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def create_hf(folder: Path, plan: WeightsPlan) -> dict[str, StoredTensor]:
    """Creates weight files in a staging folder: headers only, holes for the data.

    Returns:
        where each tensor's data is to be written.
    """
    created: dict[str, StoredTensor] = {}
    for file in plan.files:
        path = folder / file.name
        with opened(path, file.size) as fd:
            write_all(fd, file.head, 0)
        for entry, start in zip(file.entries, file.starts, strict=True):
            created[entry.name] = StoredTensor(*entry, path, start)
    if plan.index is not None:
        write_file(folder / INDEX, plan.index)
    return created


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 2GiB, in transformers' sense; a plain number is bytes.

    Raises:
        RequestError: anything else.
    """
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?) ?([KMG]I?B)?", text.strip().upper())
    size = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if size < 1:
        raise RequestError(f"--max-shard-size {text}", "a size such as 5GB, 500MB or 2GiB")
    return size


def write_dtype(folder: Path, dtype: str) -> None:
    """Makes config.json name the dtype (as torch does) that the weights have now.

    Raises:
        TensorError: config.json is not there.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise TensorError(f"{path} was not written")
    config = parse_json(path.read_bytes(), path)  # ours: not watched as an input is
    changed = False
    for part in _objects(config):
        for key in DTYPE_KEYS:
            if isinstance(part.get(key), str) and part[key] != dtype:
                part[key] = dtype
                changed = True
    if not changed:  # the original, byte for byte
        return
    write_file(path, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())


def _objects(value: object) -> Iterator[dict[str, object]]:
    """Every JSON object in a value, at any depth: Qwen2.5-Omni's configs lie three deep."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _objects(inner)

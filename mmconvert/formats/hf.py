"""Hugging Face checkpoint folders: config.json, weight files and their map, side files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mmconvert.errors import CheckpointError, FormatError
from mmconvert.formats.allocate import allocate
from mmconvert.formats.safetensors import (
    Entry,
    WeightFile,
    layout_weight_file,
    parse_json,
    read_weight_file,
)
from mmconvert.stored import StoredTensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_JSON = 64 << 20  # bytes
MAX_NAME = 200  # characters of a file name; no file system takes more than 255 bytes

# Weights in any form, and what downloads and version control leave behind, are no side files.
WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"),
    *(".index.json", ".tmp", ".incomplete", ".lock"),
)
SKIPPED_FOLDERS = {".git", ".cache", "__pycache__", ".ipynb_checkpoints", ".mmconvert"}
SKIPPED_FILES = {"mmconvert.json", ".DS_Store"}


@dataclass(frozen=True)
class HFCheckpoint:
    """An HF checkpoint's headers.

    Attributes:
        folder: the folder.
        config: config.json.
        files: the weight files, in the order of their names.
        index: the index file, byte for byte; None if the checkpoint has none.
    """

    folder: Path
    config: Mapping[str, object]
    files: list[WeightFile]
    index: bytes | None

    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor by name."""
        return {t.name: t for file in self.files for t in file.tensors}


def read_json_file(path: Path) -> dict[str, object]:
    """A JSON object from a file.

    Raises:
        CheckpointError: unreadable; FormatError: not a JSON object.
    """
    value = parse_json(_read_small(path), path)
    if not isinstance(value, dict):
        raise FormatError(f"{path}: not a JSON object", "an object in braces")
    return value


def _read_small(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_JSON:
            raise FormatError(f"{path}: larger than {MAX_JSON} bytes", "a JSON file of a model")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", "a readable file") from error


def read_config(folder: Path) -> dict[str, object]:
    """config.json of a folder, as data: nothing that it names is loaded or run.

    Raises:
        CheckpointError: no such folder or file.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"hf_dir {folder} is not a folder",
            "a folder with config.json and *.safetensors",
            "check the path given to --cfg.hf_config.hf_dir",
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json",
            "a Hugging Face checkpoint folder",
            "point --cfg.hf_config.hf_dir at the folder of the original model",
        )
    return read_json_file(folder / "config.json")


def open_hf(folder: Path) -> HFCheckpoint:
    """Reads the headers of an HF checkpoint. Only the files that the index names are read.

    Raises:
        CheckpointError: missing files; FormatError: damaged ones; TensorError: an index that
            does not fit the files.
    """
    config = read_config(folder)
    if (folder / INDEX).is_file():
        raw = _read_small(folder / INDEX)
        weight_map = _weight_map(folder / INDEX, parse_json(raw, folder / INDEX))
        names = sorted(set(weight_map.values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise CheckpointError(
                f"{folder / INDEX} lists {', '.join(absent[:5])}, which "
                f"{'is' if len(absent) == 1 else 'are'} not there",
                f"all {len(names)} weight files of the index",
                "download the missing files again",
            )
        files = [read_weight_file(folder / name) for name in names]
        _check_map(folder / INDEX, weight_map, files)
        return HFCheckpoint(folder, config, files, raw)
    return HFCheckpoint(folder, config, [read_weight_file(_single_file(folder))], None)


def _single_file(folder: Path) -> Path:
    if (folder / SINGLE).is_file():
        return folder / SINGLE
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{folder} has {len(found)} *.safetensors files and no {INDEX}",
            "the index that says which tensor lies in which file",
            f"download {INDEX} from the model's page",
        )
    other = sorted(p.name for p in folder.glob("*.bin"))
    raise CheckpointError(
        f"{folder} has no *.safetensors files" + (f", only {other[0]} ..." if other else ""),
        f"{SINGLE}, or {INDEX} with its files",
        "save the model with safe_serialization=True" if other else "download the weights",
    )


def read_index(folder: Path) -> dict[str, str]:
    """The weight map of a folder's index: tensor name -> file name.

    Raises:
        CheckpointError: unreadable; FormatError: no weight map.
    """
    path = folder / INDEX
    return _weight_map(path, parse_json(_read_small(path), path))


def _weight_map(path: Path, index: object) -> dict[str, str]:
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path}: there is no weight_map", "an object: tensor name -> file name")
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and name.endswith(".safetensors") and "\0" not in name
        if not plain or Path(name).name != name or "\\" in name or len(name) > MAX_NAME:
            raise FormatError(
                f"{path}: weight_map puts {tensor!r:.80} into {name!r:.80}",
                "the name of a *.safetensors file in the same folder, without a path",
            )
    return weight_map


def _check_map(path: Path, weight_map: Mapping[str, str], files: list[WeightFile]) -> None:
    stored = {(file.path.name, t.name) for file in files for t in file.tensors}
    listed = {(name, tensor) for tensor, name in weight_map.items()}
    for name, tensor in sorted(listed - stored):
        raise FormatError(
            f"{path}: weight_map puts {tensor} into {name}, which does not hold it",
            "an index that fits its files",
            "download the index and the weight files from one revision of the model",
        )
    for name, tensor in sorted(stored - listed):
        other = weight_map.get(tensor)
        where = f"the index puts it into {other}" if other else "the index does not list it"
        raise FormatError(
            f"{path.parent / name}: holds {tensor}; {where}",
            "an index that fits its files",
            "download the index and the weight files from one revision of the model",
        )


def create_hf(
    folder: Path, model: HFCheckpoint, entries: Mapping[str, Entry]
) -> dict[str, StoredTensor]:
    """Creates weight files like those of ``model`` in ``folder``, headers only, data as holes.

    Where tensors, dtypes and shapes are those of ``model``, headers and index are its own, byte
    for byte.

    Args:
        folder: an empty folder.
        model: the checkpoint whose weight files, order, metadata and index are reproduced.
        entries: what to write; tensors of ``model`` that are not among them are left out.

    Returns:
        where each tensor's data is to be written.
    """
    created: dict[str, StoredTensor] = {}
    same = True
    for file in model.files:
        wanted = [entries[t.name] for t in file.tensors if t.name in entries]
        if not wanted:
            same = False
            continue
        if wanted == [Entry(t.name, t.dtype, t.shape) for t in file.tensors]:
            head = len(file.header).to_bytes(8, "little") + file.header
            starts = [t.offset for t in file.tensors]
            size = max(t.offset + t.nbytes for t in file.tensors)
        else:
            same = False
            head, starts, size = layout_weight_file(wanted, file.metadata)
        path = folder / file.path.name
        with path.open("xb") as out:
            allocate(out.fileno(), size)
            out.write(head)
        for entry, start in zip(wanted, starts, strict=True):
            created[entry.name] = StoredTensor(entry.name, entry.dtype, entry.shape, path, start)
    if model.index is not None:
        (folder / INDEX).write_bytes(model.index if same else _new_index(model.index, created))
    return created


def _new_index(index: bytes, created: Mapping[str, StoredTensor]) -> bytes:
    content = json.loads(index)
    if isinstance(content.get("metadata"), dict):
        content["metadata"]["total_size"] = sum(t.nbytes for t in created.values())
    content["weight_map"] = {t.name: t.path.name for t in sorted(created.values())}
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def side_files(folder: Path) -> list[Path]:
    """Relative paths of the files that belong to a model beside its weights, links followed.

    Weights in any format, indexes, caches and version control are left out.
    """
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()  # folders, so that linked folders cannot go in circles
    for here, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS)
        for name in sorted(files):
            path = Path(here, name)
            if name in SKIPPED_FILES or name.lower().endswith(WEIGHT_SUFFIXES):
                continue
            if path.is_file():  # follows links; leaves out broken ones, sockets and the like
                found.append(path.relative_to(folder))
    return found


def copy_side_files(source: Path, target: Path) -> list[Path]:
    """Copies the side files as real files; returns their relative paths."""
    paths = side_files(source)
    for path in paths:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, target / path)
    return paths

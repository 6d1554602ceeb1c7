"""Reading checkpoints with the public libraries and saying how they differ.

Nothing here uses mmconvert: rank files are read with ``torch.load(weights_only=True)``, weight
files with safetensors, so a file that only mmconvert can read is a failure.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "mmconvert.json"
INDEX = "model.safetensors.index.json"
SHORT_DTYPES = {torch.bfloat16: "bf16", torch.float32: "f32", torch.float16: "f16"}

Step = Mapping[str, Any]


class Row(NamedTuple):
    """A tensor without its data; `digest` is 16 hex digits of the SHA-256 of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    digest: str


class RankFile(NamedTuple):
    """A rank file: its scalars, and the tensors of its model chunks."""

    top: dict[str, Any]
    parts: dict[str, dict[str, Row]]


Checkpoint = dict[str, RankFile]


def tensor_data(tensor: torch.Tensor) -> bytes:
    """The contiguous little-endian bytes of a tensor."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def row_of(tensor: torch.Tensor) -> Row:
    """Dtype, shape and digest of a tensor."""
    dtype = SHORT_DTYPES.get(tensor.dtype, str(tensor.dtype))
    return Row(dtype, tuple(tensor.shape), hashlib.sha256(tensor_data(tensor)).hexdigest()[:16])


def files_in(folder: Path) -> set[str]:
    """The paths of all files below a folder, relative to it."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def modes(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The permission bits, in octal, of every folder and of every file."""
    folders, files = {}, {}
    for path in (folder, *folder.rglob("*")):
        kind = folders if path.is_dir() else files
        kind[path.relative_to(folder).as_posix()] = f"{path.stat().st_mode & 0o777:o}"
    return folders, files


# ------------------------------------------------------------------------ MM checkpoints
def _state(path: Path) -> tuple[int, ...]:
    """Another one for whatever was written since."""
    s = path.stat()
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns


def read_rank_file(path: Path) -> tuple[RankFile, list[str]]:
    """What a rank file holds, and what is odd about its tensors."""
    return _read_rank_file(path, _state(path))


@lru_cache(maxsize=256)  # what tests compare with is mostly the same
def _read_rank_file(path: Path, state: tuple[int, ...]) -> tuple[RankFile, list[str]]:
    top: dict[str, Any] = {}
    parts: dict[str, dict[str, Row]] = {}
    odd = []
    for key, value in torch.load(path, map_location="cpu", weights_only=True).items():
        if not isinstance(value, dict):
            top[key] = value
            continue
        parts[key] = {}
        for name, tensor in value.items():
            if not isinstance(tensor, torch.Tensor):
                odd.append(f"{key}/{name} is a {type(tensor).__name__}, want a tensor")
                continue
            parts[key][name] = row_of(tensor)
            if tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous():
                odd.append(f"{key}/{name} is a view of a larger or differently ordered storage")
    return RankFile(top, parts), odd


def read_mm(folder: Path) -> tuple[Checkpoint, list[str]]:
    """All rank files of a checkpoint folder by path, and what is odd about them."""
    found: Checkpoint = {}
    odd = []
    for path in sorted(files_in(folder)):
        if path.endswith(".pt"):
            found[path], lines = read_rank_file(folder / path)
            odd += [f"{path}: {line}" for line in lines]
    return found, odd


def recorded(step: Step) -> Checkpoint:
    """The rank files of a recorded step.

    A stage of a record stands for the files of all its tp ranks; a shape or a digest in which
    the ranks differ is a list with one entry for each.
    """
    expected: Checkpoint = {}
    for stage in step["stages"]:
        for rank, path in enumerate(stage["paths"]):
            parts = {}
            for part, table in stage["parts"].items():
                rows = parts[part] = {}
                for name, shape, digest, *dtype in table:
                    if shape and isinstance(shape[0], list):
                        shape = shape[rank]
                    if isinstance(digest, list):
                        digest = digest[rank]
                    rows[name] = Row(dtype[0] if dtype else "bf16", tuple(shape), digest)
            expected[path] = RankFile(stage["top"], parts)
    return expected


def _unequal_keys(where: str, want: Any, got: Any) -> Iterator[str]:
    for key in sorted(set(want) - set(got)):
        yield f"{where}{key} is missing"
    for key in sorted(set(got) - set(want)):
        yield f"{where}{key} should not be there"


def _rank_file_differences(path: str, want: RankFile, got: RankFile) -> Iterator[str]:
    if got.top != want.top:
        yield f"{path}: top level {got.top}, want {want.top}"
    yield from _unequal_keys(f"{path}: part ", want.parts, got.parts)
    for part in sorted(want.parts.keys() & got.parts.keys()):
        rows, others = want.parts[part], got.parts[part]
        yield from _unequal_keys(f"{path}: {part}/", rows, others)
        for name, row in rows.items():
            if name in others and others[name] != row:
                yield f"{path}: {part}/{name} is {tuple(others[name])}, want {tuple(row)}"


def _checkpoint_differences(want: Checkpoint, got: Checkpoint) -> Iterator[str]:
    yield from _unequal_keys("", want, got)
    for path in sorted(want.keys() & got.keys()):
        yield from _rank_file_differences(path, want[path], got[path])


def compare_record(step: Step, folder: Path) -> list[str]:
    """How an MM checkpoint folder differs from a recorded step; empty if it does not."""
    if not folder.is_dir():
        return [f"there is no folder {folder}"]
    expected = recorded(step)
    found, lines = read_mm(folder)
    others = {path for path in files_in(folder) if not path.endswith(".pt")}
    lines += _unequal_keys("", step["files"], others - {MANIFEST})
    tracker = folder / TRACKER
    text = tracker.read_bytes().decode() if tracker.is_file() else None
    if text != step["latest"]:
        lines.append(f"{TRACKER} holds {text!r}, want {step['latest']!r}")
    for kind, have in zip(("dirs", "files"), modes(folder), strict=True):
        allowed = step["modes"][kind]
        lines += [f"{p} has mode {m}, want {allowed}" for p, m in have.items() if m not in allowed]
    return lines + list(_checkpoint_differences(expected, found))


def compare_mm(want: Path, got: Path) -> list[str]:
    """How two MM checkpoint folders differ, their manifests aside."""
    for folder in (want, got):
        if not folder.is_dir():
            return [f"there is no folder {folder}"]
    (expected, _), (found, lines) = read_mm(want), read_mm(got)
    others = [{p for p in files_in(f) if not p.endswith(".pt")} - {MANIFEST} for f in (want, got)]
    lines += _unequal_keys("", *others)
    for path in sorted(others[0] & others[1]):
        if (want / path).read_bytes() != (got / path).read_bytes():
            lines.append(f"{path} differs")
    for expected_modes, have in zip(modes(want), modes(got), strict=True):
        lines += [
            f"{path} has mode {mode}, want {expected_modes[path]}"
            for path, mode in have.items()
            if mode != expected_modes.get(path, mode)
        ]
    return lines + list(_checkpoint_differences(expected, found))


# ------------------------------------------------------------------------ HF checkpoints
def read_weight_file(path: Path) -> tuple[dict[str, str], dict[str, Row]]:
    """The metadata and the tensors of a safetensors file."""
    return _read_weight_file(path, _state(path))


@lru_cache(maxsize=256)
def _read_weight_file(path: Path, state: tuple[int, ...]) -> tuple[dict[str, str], dict[str, Row]]:
    with safe_open(path, framework="pt") as file:
        rows = {name: row_of(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        return file.metadata() or {}, rows


def weight_files(folder: Path) -> set[str]:
    """The paths of all safetensors files below a folder, relative to it."""
    return {path for path in files_in(folder) if path.endswith(".safetensors")}


def _weight_map(folder: Path) -> dict[str, str] | None:
    index = folder / INDEX
    return json.loads(index.read_text())["weight_map"] if index.is_file() else None


def compare_hf(want: Path, got: Path) -> list[str]:
    """How the weights of two HF folders differ: files, tensors in them, bytes, weight map."""
    if not got.is_dir():
        return [f"there is no folder {got}"]
    expected, found = weight_files(want), weight_files(got)
    lines = list(_unequal_keys("", expected, found))
    for path in sorted(expected & found):
        (metadata, rows), (metadata2, others) = (read_weight_file(f / path) for f in (want, got))
        if metadata != metadata2:
            lines.append(f"{path}: metadata {metadata2}, want {metadata}")
        lines += _unequal_keys(f"{path}: ", rows, others)
        lines += [
            f"{path}: {name} is {tuple(others[name])}, want {tuple(row)}"
            for name, row in rows.items()
            if name in others and others[name] != row
        ]
    if _weight_map(got) != _weight_map(want):
        lines.append(f"{INDEX}: the weight map differs")
    return lines


def compare_side_files(want: Path, got: Path) -> list[str]:
    """The files beside the weights (sub-folders too) that `got` lacks or has changed."""
    lines = []
    for path in sorted(files_in(want) - weight_files(want) - {INDEX}):
        if not (got / path).is_file():
            lines.append(f"{path} is missing")
        elif (got / path).read_bytes() != (want / path).read_bytes():
            lines.append(f"{path} differs")
    return lines

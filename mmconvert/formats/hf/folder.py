"""Hugging Face checkpoint folders: config.json, weight files and their map, side files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mmconvert.causes.folders import PARTS, other_form, stale_index
from mmconvert.errors import CheckpointError, FormatError, TensorError
from mmconvert.formats.containers.safetensors import WeightFile, parse_json, read_weight_file
from mmconvert.formats.hf import bin as hf_bin
from mmconvert.formats.hf.choice import (
    INDEX,
    ORDER,
    SAFETENSORS,
    SINGLE,
    choose,
    not_read,
    weight_files,
)
from mmconvert.formats.reading import opened
from mmconvert.narrow import is_object
from mmconvert.stored import StoredTensor

MAX_JSON = 64 << 20  # bytes
MAX_NAME = 200  # characters of a file name; no file system takes more than 255 bytes


@dataclass(frozen=True)
class HFCheckpoint:
    """An HF checkpoint's headers.

    Attributes:
        folder: the folder.
        config: config.json.
        files: the weight files, in the order of their names.
        index: the index file, byte for byte; None if the checkpoint has none.
        notes: what is worth knowing, in words.
        read: names of the weight files, and of the index that lists them.
    """

    folder: Path
    config: Mapping[str, object]
    files: list[WeightFile]
    index: bytes | None
    notes: tuple[str, ...] = ()
    read: frozenset[str] = frozenset()

    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor by name."""
        return {t.name: t for file in self.files for t in file.tensors}


def read_json_file(path: Path) -> dict[str, object]:
    """A JSON object from a file.

    Raises:
        CheckpointError: unreadable; FormatError: not a JSON object.
    """
    value = parse_json(read_small(path), path)
    if not is_object(value):
        raise FormatError(f"{path}: not a JSON object", "an object in braces")
    return value


def read_small(path: Path) -> bytes:
    """The bytes of a file of a model's size.

    Raises:
        CheckpointError: unreadable; FormatError: too large.
    """
    try:
        with opened(path) as file:
            text = file.read(MAX_JSON + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", "a readable file") from error
    if len(text) > MAX_JSON:
        raise FormatError(f"{path}: larger than {MAX_JSON} bytes", "a JSON file of a model")
    return text


def _without_weights(folder: Path) -> CheckpointError | None:
    """What else a folder holds, if no weight file of a model stands there."""
    return None if has_weights(folder) else other_form(folder, "hf")


def has_weights(folder: Path) -> bool:
    """Whether a weight file that may hold a model, or an index, stands in a folder."""
    if any((folder / name).is_file() for name in ORDER):
        return True
    return bool(weight_files(folder)) and not (folder / PARTS).is_file()


def read_config(folder: Path) -> dict[str, object]:
    """config.json of a folder, as data: nothing that it names is loaded or run.

    Raises:
        CheckpointError: no such folder or file.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"hf_dir {folder} is not a folder",
            "a folder with config.json and weight files",
            "check the path given to --cfg.hf_config.hf_dir",
        )
    if not (folder / "config.json").is_file():
        raise _without_weights(folder) or CheckpointError(
            f"{folder} has no config.json",
            "a Hugging Face checkpoint folder",
            "give the folder of the original model, or download its config.json into this one",
        )
    return read_json_file(folder / "config.json")


def open_hf(folder: Path) -> HFCheckpoint:
    """Reads the headers of an HF checkpoint: of the files that transformers would load.

    Raises:
        CheckpointError: missing files; FormatError: damaged ones; TensorError: an index that
            does not fit the files.
    """
    config = read_config(folder)
    name = chosen(folder, config)
    if not name:
        raise _no_weights(folder)
    if name.endswith(".json"):
        found = _indexed(folder, config, name)
    else:
        found = HFCheckpoint(folder, config, [_read(folder / name)], None)
        check_single(found.files[0])
    read = frozenset({name, *(file.path.name for file in found.files)})
    return replace(found, notes=tuple(not_read(folder, read)), read=read)


def chosen(folder: Path, config: Mapping[str, object]) -> str:
    """As :func:`choose`; the index instead of a single file where it names that file alone."""
    name = choose(folder, config)
    if name != SINGLE or not (folder / INDEX).is_file():
        return name
    try:
        return INDEX if set(read_index(folder).values()) == {SINGLE} else name
    except CheckpointError:  # transformers does not look at it either
        return name


def check_single(file: WeightFile) -> None:
    """Raises TensorError for a single file that holds a part of the model alone, where an index
    beside it lists the whole: transformers would start the rest from random numbers.
    """
    folder = file.path.parent
    if file.path.name != SINGLE or not (folder / INDEX).is_file():
        return
    try:
        listed = set(read_index(folder))
    except CheckpointError:
        return
    held = {tensor.name for tensor in file.tensors}
    if held < listed:
        raise TensorError(
            f"{file.path} holds {len(held)} of the {len(listed)} tensors that {INDEX} lists; "
            "transformers reads this file, and not those of the index",
            "the whole model in the file, or no such file",
            f"move {file.path} away, if the files of the index are the model",
        )


def _read(path: Path) -> WeightFile:
    return hf_bin.read_bin(path) if path.name.endswith(hf_bin.SUFFIX) else read_weight_file(path)


def _indexed(folder: Path, config: Mapping[str, object], index: str) -> HFCheckpoint:
    path = folder / index
    raw = read_small(path)
    suffix = hf_bin.SUFFIX if index == hf_bin.INDEX else SAFETENSORS
    weight_map = _weight_map(path, parse_json(raw, path), suffix)
    names = sorted(set(weight_map.values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise stale_index(path, names) or CheckpointError(
            f"{path} lists {', '.join(absent[:5])}, which "
            f"{'is' if len(absent) == 1 else 'are'} not there",
            f"all {len(names)} weight files of the index",
            "download the missing files again",
        )
    files = [_read(folder / name) for name in names]
    _check_map(path, weight_map, files)
    return HFCheckpoint(folder, config, files, raw)


def _no_weights(folder: Path) -> CheckpointError:
    """What to say of a folder in which no weight file can be chosen."""
    found = weight_files(folder)
    if found:
        return CheckpointError(
            f"{folder} has {len(found)} *.safetensors files and no {INDEX}",
            "the index that says which tensor lies in which file",
            f"download {INDEX} from the model's page",
        )
    other = sorted(p.name for p in folder.glob("*.bin"))
    return other_form(folder, "hf") or CheckpointError(
        f"{folder} has no *.safetensors files" + (f", only {other[0]} ..." if other else ""),
        f"{SINGLE} or {INDEX} with its files; or {hf_bin.SINGLE} or {hf_bin.INDEX} with its files",
        f"download {hf_bin.INDEX} too" if other else "download the weights",
    )


def read_index(folder: Path, *, pickled: bool = False) -> dict[str, str]:
    """The weight map of a folder's index: tensor name -> file name.

    Args:
        pickled: the index of ``pytorch_model*.bin`` files.

    Raises:
        CheckpointError: unreadable; FormatError: no weight map.
    """
    path = folder / (hf_bin.INDEX if pickled else INDEX)
    suffix = hf_bin.SUFFIX if pickled else SAFETENSORS
    return _weight_map(path, parse_json(read_small(path), path), suffix)


def _weight_map(path: Path, index: object, suffix: str = SAFETENSORS) -> dict[str, str]:
    weight_map = index.get("weight_map") if is_object(index) else None
    if not is_object(weight_map) or not weight_map:
        raise FormatError(f"{path}: there is no weight_map", "an object: tensor name -> file name")
    found: dict[str, str] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_plain(name, suffix):
            raise FormatError(
                f"{path}: weight_map puts {tensor!r:.80} into {name!r:.80}",
                f"the name of a *{suffix} file in the same folder, without a path",
            )
        found[tensor] = name
    return found


def _is_plain(name: str, suffix: str) -> bool:
    """Whether it is the name of a file of that kind, without a path."""
    if not name.endswith(suffix) or "\0" in name:
        return False
    return Path(name).name == name and "\\" not in name and len(name) <= MAX_NAME


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

"""Hugging Face checkpoint folders: config.json, weight files and their map, side files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mmconvert.causes.folders import PARTS, TRACKER, other_form, stale_index
from mmconvert.errors import CheckpointError, FormatError, TensorError, blamed, cannot_read
from mmconvert.formats.containers.safetensors import WeightFile, parse_json
from mmconvert.formats.faults import STRICT, Faults
from mmconvert.formats.hf import bin as hf_bin
from mmconvert.formats.hf.bin import read_weights
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
from mmconvert.names import number, summarise
from mmconvert.narrow import is_object
from mmconvert.stored import StoredTensor

MAX_JSON = 64 << 20  # bytes
ANOTHER_CONFIG = "take config.json from the model's page"
MAX_NAME = 200  # characters of a file name; no file system takes more than 255 bytes

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # ORGANISATION/MODEL


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
        complete: all of these could be read.
        added: names of tensors that are in ``files``, and not yet in the files themselves.
    """

    folder: Path
    config: Mapping[str, object]
    files: list[WeightFile]
    index: bytes | None
    notes: tuple[str, ...] = ()
    read: frozenset[str] = frozenset()
    complete: bool = True
    added: frozenset[str] = frozenset()

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
        raise cannot_read(path, error) from error
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
            f"hf_dir {folder} {'is not a folder' if folder.exists() else 'does not exist'}",
            "a folder with config.json and weight files",
            f"check the path; a model of the hub is downloaded first: hf download {folder} "
            f"--local-dir {folder.name}"
            if _HUB_NAME.fullmatch(str(folder)) and not folder.parent.exists()
            else "check the path given to --cfg.hf_config.hf_dir",
        )
    if not (folder / "config.json").is_file():
        raise _without_weights(folder) or CheckpointError(
            f"{folder} has no config.json",
            "a Hugging Face checkpoint folder",
            "it is an MM checkpoint: mm_to_hf and resplit read it"
            if (folder / TRACKER).is_file()
            else "give the folder of the original model, or download its config.json into this one",
            cause="missing-config",
            path=folder / "config.json",
        )
    with blamed("damaged-config", folder / "config.json", fix=ANOTHER_CONFIG):
        return read_json_file(folder / "config.json")


def open_hf(folder: Path, faults: Faults = STRICT) -> HFCheckpoint:
    """Reads the headers of an HF checkpoint: of the files that transformers would load.

    Args:
        faults: where those go after which reading goes on.

    Raises:
        CheckpointError: missing files; FormatError: damaged ones; TensorError: an index that
            does not fit the files.
    """
    config = faults.attempt(lambda: read_config(folder), {})
    unknown: str | None = None
    name = faults.attempt(lambda: chosen(folder, config), unknown)
    if name is None:  # config.json names a file of another kind
        name = chosen(folder, {})
    if name.endswith(".json"):
        found = _indexed(folder, config, name, faults)
    else:
        if not name:
            faults.add(_no_weights(folder))
        names = [name] if name else weight_files(folder)
        found = _files(HFCheckpoint(folder, config, [], None), names, faults)
    if len(found.files) == 1 and (fault := partial_single(found.files[0])) is not None:
        faults.add(fault)
        return replace(found, files=[], complete=False)
    read = frozenset({name, *found.read} - {""})
    remarks = not_read(folder, read) if found.files else []
    for remark in remarks:
        faults.remark(remark)
    notes = tuple("warning: " + "; ".join(filter(None, (r.what, r.fix))) for r in remarks)
    return replace(found, notes=notes, read=read)


def _files(found: HFCheckpoint, names: list[str], faults: Faults) -> HFCheckpoint:
    """A checkpoint with the weight files of these names, as far as they can be read."""
    none: WeightFile | None = None
    files = [faults.attempt(lambda n=n: read_weights(found.folder / n), none) for n in names]
    kept = [file for file in files if file is not None]
    whole = found.complete and bool(names) and len(kept) == len(names)
    return replace(found, files=kept, read=found.read | set(names), complete=whole)


def chosen(folder: Path, config: Mapping[str, object]) -> str:
    """As :func:`choose`; the index instead of a single file where it names that file alone."""
    name = choose(folder, config)
    if name != SINGLE or not (folder / INDEX).is_file():
        return name
    try:
        return INDEX if set(read_index(folder).values()) == {SINGLE} else name
    except CheckpointError:  # transformers does not look at it either
        return name


def partial_single(file: WeightFile) -> TensorError | None:
    """The fault of a single file that holds a part of the model alone, where an index beside it
    lists the whole: transformers would start the rest from random numbers.
    """
    folder = file.path.parent
    if file.path.name != SINGLE or not (folder / INDEX).is_file():
        return None
    try:
        listed = set(read_index(folder))
    except CheckpointError:
        return None
    held = {tensor.name for tensor in file.tensors}
    if not held < listed:
        return None
    return TensorError(
        f"{file.path} holds {len(held)} of the {len(listed)} tensors that {INDEX} lists; "
        "transformers reads this file, and not those of the index",
        "the whole model in the file, or no such file",
        f"move {file.path} away, if the files of the index are the model",
        cause="partial-weight-file",
        path=file.path,
        aside=[file.path],
    )


def _indexed(
    folder: Path, config: Mapping[str, object], index: str, faults: Faults
) -> HFCheckpoint:
    path = folder / index
    suffix = hf_bin.SUFFIX if index == hf_bin.INDEX else SAFETENSORS
    weight_map = faults.attempt(lambda: _map_of(path, suffix), {})
    if not weight_map:
        names = [name for name in weight_files(folder) if name.endswith(suffix)]
        return _files(HFCheckpoint(folder, config, [], None), names, faults)
    raw = read_small(path)
    names = sorted(set(weight_map.values()))
    there = [name for name in names if (folder / name).is_file()]
    found = HFCheckpoint(folder, config, [], raw, (), frozenset(names), there == names)
    if not there and (stale := stale_index(path, names)) is not None:
        faults.add(stale)
        return found
    for name in names:
        if name not in there:
            faults.add(_absent(path, name, weight_map, len(there)))
    found = _files(found, there, faults)
    fits = _check_map(path, weight_map, found.files, faults)
    return replace(found, complete=found.complete and fits)


def _absent(index: Path, name: str, weight_map: Mapping[str, str], there: int) -> CheckpointError:
    """A weight file of the index that is not there."""
    path, names = index.parent / name, set(weight_map.values())
    link = " (a link to nowhere)" if path.is_symlink() else ""
    what = "is a folder, a pipe or a device" if path.exists() else f"is not there{link}"
    inside = [tensor for tensor, file in weight_map.items() if file == name]
    return CheckpointError(
        f"{path} {what}; {index.name} puts {number(inside, 'tensor')} into it ({there} of "
        f"{len(names)} weight files are there)",
        f"all {len(names)} weight files of the index",
        "download the missing files again",
        cause="missing-weight-file",
        path=path,
    )


def _no_weights(folder: Path) -> CheckpointError:
    """What to say of a folder in which no weight file can be chosen."""
    found = weight_files(folder)
    if found:
        return CheckpointError(
            f"{folder} has {len(found)} *.safetensors files and no {INDEX}",
            "the index that says which tensor is in which file",
            f"download {INDEX} from the model's page",
            cause="missing-index",
            path=folder / INDEX,
        )
    other = sorted(p.name for p in folder.glob("*.bin"))
    return other_form(folder, "hf") or CheckpointError(
        f"{folder} has no *.safetensors files" + (f", only {summarise(other)}" if other else ""),
        f"{SINGLE} or {INDEX} with its files; or {hf_bin.SINGLE} or {hf_bin.INDEX} with its files",
        f"download {hf_bin.INDEX} too, or save the model with safe_serialization=True"
        if other
        else "download the weights",
        cause="no-safetensors",
        path=folder,
    )


def read_index(folder: Path, *, pickled: bool = False) -> dict[str, str]:
    """The weight map of a folder's index: tensor name -> file name.

    Args:
        pickled: the index of ``pytorch_model*.bin`` files.

    Raises:
        CheckpointError: unreadable; FormatError: no weight map.
    """
    path = folder / (hf_bin.INDEX if pickled else INDEX)
    return _map_of(path, hf_bin.SUFFIX if pickled else SAFETENSORS)


def _map_of(path: Path, suffix: str) -> dict[str, str]:
    with blamed("damaged-index", path, fix="download the file again"):
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


def _check_map(
    path: Path, weight_map: Mapping[str, str], files: list[WeightFile], faults: Faults
) -> bool:
    """Whether every tensor of the index is in its file, and no other."""
    fits = True
    for file in files:
        stored = {tensor.name for tensor in file.tensors}
        listed = {tensor for tensor, name in weight_map.items() if name == file.path.name}
        for wrong, words in (
            (listed - stored, "lacks {} that the index puts into it"),
            (stored - listed, "holds {} that the index does not list there"),
        ):
            if not wrong:
                continue
            fault = FormatError(
                f"{file.path} {words.format(number(wrong, 'tensor'))}: {summarise(wrong)}",
                f"an index that fits its files ({path.name})",
                "weight files of two checkpoints are mixed: download the index and all weight "
                "files from one revision of the model",
                cause="index-mismatch",
                path=file.path,
                tensors=sorted(wrong),
            )
            faults.add(fault)
            fits = False
    return fits

"""The index of a Hugging Face folder: which tensor is in which weight file, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmconvert.errors import CheckpointError, FormatError, TensorError, blamed
from mmconvert.formats.containers.safetensors import WeightFile, parse_json
from mmconvert.formats.faults import Faults
from mmconvert.formats.hf import bin as hf_bin
from mmconvert.formats.hf.choice import INDEX, SAFETENSORS, SINGLE
from mmconvert.formats.jsonfile import read_small
from mmconvert.names import number, summarise
from mmconvert.narrow import is_object

MAX_NAME = 200  # characters of a file name; no file system takes more than 255 bytes


def suffix_of(index: str) -> str:
    """How the names of weight files end that an index of this name lists."""
    return hf_bin.SUFFIX if index == hf_bin.INDEX else SAFETENSORS


def weight_map(path: Path) -> dict[str, str]:
    """The weight map of an index file: tensor name -> file name.

    Raises:
        CheckpointError: unreadable; FormatError: no weight map.
    """
    with blamed("damaged-index", path, fix="download the file again"):
        return _weight_map(path, parse_json(read_small(path), path))


def _weight_map(path: Path, index: object) -> dict[str, str]:
    listed = index.get("weight_map") if is_object(index) else None
    if not is_object(listed) or not listed:
        raise FormatError(f"{path}: there is no weight_map", "an object: tensor name -> file name")
    suffix, found = suffix_of(path.name), dict[str, str]()
    for tensor, name in listed.items():
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


def check_map(
    path: Path, listed: Mapping[str, str], files: list[WeightFile], faults: Faults
) -> bool:
    """Whether every tensor of the index is in its file, and no other."""
    fits = True
    for file in files:
        stored = {tensor.name for tensor in file.tensors}
        expected = {tensor for tensor, name in listed.items() if name == file.path.name}
        for wrong, words in (
            (expected - stored, "lacks {} that the index puts into it"),
            (stored - expected, "holds {} that the index does not list there"),
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


def absent(index: Path, name: str, listed: Mapping[str, str], there: int) -> CheckpointError:
    """A weight file of the index that is not there."""
    path, names = index.parent / name, set(listed.values())
    link = " (a link to nowhere)" if path.is_symlink() else ""
    what = "is a folder, a pipe or a device" if path.exists() else f"is missing{link}"
    inside = [tensor for tensor, file in listed.items() if file == name]
    return CheckpointError(
        f"{path} {what}; {index.name} lists {number(inside, 'tensor')} in it ({there} of "
        f"{len(names)} weight files found)",
        f"all {len(names)} weight files of the index",
        "download the missing files again",
        cause="missing-weight-file",
        path=path,
    )


def partial_single(file: WeightFile) -> TensorError | None:
    """The fault of a single file that holds a part of the model alone, where an index beside it
    lists the whole: transformers would start the rest from random numbers.
    """
    folder = file.path.parent
    if file.path.name != SINGLE or not (folder / INDEX).is_file():
        return None
    try:
        listed = set(weight_map(folder / INDEX))
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

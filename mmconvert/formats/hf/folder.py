"""Hugging Face checkpoint folders: config.json, weight files and their map, side files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mmconvert.causes.downloads import way_to
from mmconvert.causes.folders import PARTS, TRACKER, other_form, stale_index
from mmconvert.errors import CheckpointError, blamed
from mmconvert.formats.containers.safetensors import WeightFile
from mmconvert.formats.faults import STRICT, Faults
from mmconvert.formats.hf import bin as hf_bin
from mmconvert.formats.hf.bin import read_weights
from mmconvert.formats.hf.choice import (
    INDEX,
    ORDER,
    SINGLE,
    choose,
    not_read,
    weight_files,
)
from mmconvert.formats.hf.index import absent, check_map, partial_single, suffix_of, weight_map
from mmconvert.formats.jsonfile import read_json_file, read_small
from mmconvert.names import summarise
from mmconvert.stored import StoredTensor

ANOTHER_CONFIG = "take config.json from the model's page"


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
            way_to(folder),
        )
    if not (folder / "config.json").is_file():
        raise _without_weights(folder) or CheckpointError(
            f"{folder} has no config.json",
            "a Hugging Face checkpoint folder",
            "it is an MM checkpoint: give it as mm_dir, or source_dir of resplit"
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
        return INDEX if set(weight_map(folder / INDEX).values()) == {SINGLE} else name
    except CheckpointError:  # transformers does not look at it either
        return name


def _indexed(
    folder: Path, config: Mapping[str, object], index: str, faults: Faults
) -> HFCheckpoint:
    path = folder / index
    listed = faults.attempt(lambda: weight_map(path), {})
    if not listed:
        suffix = suffix_of(index)
        names = [name for name in weight_files(folder) if name.endswith(suffix)]
        return _files(HFCheckpoint(folder, config, [], None), names, faults)
    raw = read_small(path)
    names = sorted(set(listed.values()))
    there = [name for name in names if (folder / name).is_file()]
    found = HFCheckpoint(folder, config, [], raw, (), frozenset(names), there == names)
    if not there and (stale := stale_index(path, names)) is not None:
        faults.add(stale)
        return found
    for name in names:
        if name not in there:
            faults.add(absent(path, name, listed, len(there)))
    found = _files(found, there, faults)
    fits = check_map(path, listed, found.files, faults)
    return replace(found, complete=found.complete and fits)


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

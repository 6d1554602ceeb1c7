"""The files of an HF checkpoint: config.json, index, weight files, what belongs beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmconvert.causes.downloads import LFS
from mmconvert.causes.folders import stale_index
from mmconvert.errors import CheckpointError, FormatError, TensorError
from mmconvert.formats.containers.safetensors import WeightFile, expected_size, read_weight_file
from mmconvert.formats.hf import bin as hf_bin
from mmconvert.formats.hf.choice import ADAPTER, INDEX, SINGLE
from mmconvert.formats.hf.choice import weight_files as safetensors_files
from mmconvert.formats.hf.folder import check_single, chosen, read_config, read_index
from mmconvert.names import number, summarise
from mmconvert.tools.doctor.rankfiles import lfs_pointer
from mmconvert.tools.doctor.report import DoctorReport
from mmconvert.tools.doctor.shell import line, move_aside, operand, unused

AGAIN = "download the file again"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "qwen.tiktoken")
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")


def look_at_config(folder: Path, report: DoctorReport) -> Mapping[str, object] | None:
    """config.json, if it can be read."""
    path = folder / "config.json"
    if not path.is_file():
        report.add(
            "missing-config",
            f"{folder} has weights and no config.json",
            "download config.json from the model's page",
            path=path,
        )
        return None
    try:
        return read_config(folder)
    except CheckpointError as error:
        report.add("damaged-config", error.what, AGAIN, path=path)
        return None


def look_at_side_files(folder: Path, report: DoctorReport, *, preprocessor: bool = True) -> None:
    """What a model needs beside its weights to be used.

    Args:
        preprocessor: whether that is a configuration of its image processor.
    """
    if not any((folder / name).is_file() for name in TOKENIZERS):
        report.add(
            "missing-tokenizer",
            f"{folder} has no tokenizer: none of {', '.join(TOKENIZERS)}",
            "download the tokenizer's files from the model's page; converting needs none",
            path=folder,
        )
    if preprocessor and not any((folder / name).is_file() for name in PREPROCESSORS):
        report.add(
            "missing-preprocessor",
            f"{folder} has no {PREPROCESSORS[0]}: images cannot be prepared for the model",
            "download it from the model's page; converting needs none",
            path=folder,
        )


def weight_files(folder: Path, report: DoctorReport) -> tuple[list[WeightFile], bool]:
    """The readable weight files, and whether they are all there: those that are converted."""
    name = chosen(folder, {})
    pickled = name.startswith(hf_bin.SINGLE)
    indexed = name in (INDEX, hf_bin.INDEX)
    weight_map = _weight_map(folder, report, pickled=pickled) if indexed else None
    there = safetensors_files(folder)
    if weight_map is not None:
        names = sorted(set(weight_map.values()))
    elif pickled and indexed:  # the index is damaged, and reported
        names = []
    else:
        names = [name] if name and not indexed else there
    if not name and there:
        report.add(
            "missing-index",
            f"{folder} has {len(there)} *.safetensors files and no {INDEX}",
            f"download {INDEX} from the model's page",
            path=folder / INDEX,
        )
    absent = [name for name in names if not (folder / name).is_file()]
    if name == SINGLE and (folder / INDEX).is_file():
        if _is_partial(folder, report):
            return [], False
        _index_not_read(folder / INDEX, report)
    if weight_map is not None and _is_stale(folder / name, names, report):
        return [], False
    _absent(folder, names, absent, weight_map or {}, report)
    if not names and not pickled:
        _no_safetensors(folder, report)
    stray = [name for name in there if name not in names]
    files = [_read(folder / name, report) for name in names if name not in absent]
    readable = [file for file in files if file is not None]
    report.files += len(readable)
    report.tensors += sum(len(file.tensors) for file in readable)
    if weight_map is not None:
        _index_fits(folder, weight_map, readable, report)
    _stray(folder, stray, weight_map is not None, report)
    if readable:
        look_at_adapter(folder, report)
    return readable, bool(names) and len(readable) == len(names)


def look_at_adapter(folder: Path, report: DoctorReport) -> None:
    """An adapter that lies beside the weights."""
    found = sorted(path.name for path in folder.iterdir() if ADAPTER.fullmatch(path.name))
    if found:
        report.add(
            "adapter-not-applied",
            f"{folder} holds an adapter beside the model: {summarise(found)}; conversions do not "
            "apply it, and transformers loads its base model instead where PEFT is installed",
            "merge it into the model (PEFT's merge_and_unload) if its training is expected, else "
            "move it away",
            path=folder / found[0],
            command=move_aside([folder / name for name in found], Path(os.path.normpath(folder))),
        )


def _weight_map(folder: Path, report: DoctorReport, *, pickled: bool) -> dict[str, str] | None:
    try:
        return read_index(folder, pickled=pickled)
    except CheckpointError as error:
        path = folder / (hf_bin.INDEX if pickled else INDEX)
        report.add("damaged-index", error.what, AGAIN, path=path)
        return None


def _is_stale(index: Path, names: Sequence[str], report: DoctorReport) -> bool:
    """An index of another save; the weights beside it stay where they are."""
    fault = stale_index(index, names)
    if fault is not None:
        report.add(fault.cause, fault.what, fault.fix, path=index, command=_away(index))
    return fault is not None


def _is_partial(folder: Path, report: DoctorReport) -> bool:
    """A single file that hides the files of the index: it alone is in the way."""
    try:
        check_single(read_weight_file(folder / SINGLE))
    except TensorError as error:
        report.add(
            "partial-weight-file",
            error.what,
            error.fix,
            path=folder / SINGLE,
            command=_away(folder / SINGLE),
        )
        return True
    except CheckpointError:  # said where the file is read
        pass
    return False


def _index_not_read(index: Path, report: DoctorReport) -> None:
    report.add(
        "index-not-read",
        f"{index} is not read: the model is read from {SINGLE}, as transformers does",
        "move it away, if it is of another save",
        path=index,
        command=_away(index),
    )


def _away(index: Path) -> str:
    """The command that sets an index aside."""
    return line(["mv", operand(index), operand(unused(index, ".old"))])


def _absent(
    folder: Path,
    names: Sequence[str],
    absent: Sequence[str],
    weight_map: Mapping[str, str],
    report: DoctorReport,
) -> None:
    for name in absent:
        path = folder / name
        link = " (a link to nowhere)" if path.is_symlink() else ""
        what = "is a folder, a pipe or a device" if path.exists() else f"is not there{link}"
        inside = [tensor for tensor, file in weight_map.items() if file == name]
        if weight_map:
            what += f"; the index puts {number(inside, 'tensor')} into it "
            what += f"({len(names) - len(absent)} of {len(names)} weight files are there)"
        report.add(
            "missing-weight-file",
            f"{path} {what}",
            AGAIN,
            path=folder / name,
        )


def _no_safetensors(folder: Path, report: DoctorReport) -> None:
    others = sorted(path.name for path in folder.glob("*.bin"))
    report.add(
        "no-safetensors",
        f"{folder} has no *.safetensors files" + (f", only {summarise(others)}" if others else ""),
        f"download {hf_bin.INDEX} too, or save the model with safe_serialization=True"
        if others
        else "download the weights",
        path=folder,
    )


def _read(path: Path, report: DoctorReport) -> WeightFile | None:
    try:
        pickled = path.name.endswith(hf_bin.SUFFIX)
        return hf_bin.read_bin(path) if pickled else read_weight_file(path)
    except FormatError as error:
        look_at_damage(path, error, report)
    except CheckpointError as error:
        report.add_error("cannot-read", error, path=path)
    return None


def look_at_damage(path: Path, error: FormatError, report: DoctorReport) -> None:
    """What has happened to a weight file that cannot be read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(len(LFS))
    begins = len(head) < 9 or (head[8:9] == b"{" and int.from_bytes(head[:8], "little") > size - 8)
    if head == LFS:
        lfs_pointer(path, report)
        return
    expected = expected_size(path)
    if expected is not None and expected > size:
        what = f"{path} is cut off at byte {size}: its header asks for {expected} bytes, so "
        what += f"{expected - size} are missing"
    elif expected is None and begins:
        what = f"{path} is cut off at byte {size}, within its header"
    else:
        report.add("damaged-weight-file", error.what, error.fix or AGAIN, path=path)
        return
    report.add("truncated-weight-file", what, AGAIN, path=path)


def _index_fits(
    folder: Path, weight_map: Mapping[str, str], files: Sequence[WeightFile], report: DoctorReport
) -> None:
    """Every tensor of the index in its file, and no other."""
    for file in files:
        name = file.path.name
        stored = {t.name for t in file.tensors}
        listed = {tensor for tensor, where in weight_map.items() if where == name}
        for lacking, words in (
            (sorted(listed - stored), "lacks {} that the index puts into it"),
            (sorted(stored - listed), "holds {} that the index does not put into it"),
        ):
            if lacking:
                report.add(
                    "index-mismatch",
                    f"{file.path} {words.format(number(lacking, 'tensor'))}: {summarise(lacking)}",
                    "weight files of two checkpoints are mixed: download the index and all "
                    "weight files from one revision of the model",
                    path=file.path,
                    tensor=lacking[0],
                )


def _stray(folder: Path, stray: Sequence[str], indexed: bool, report: DoctorReport) -> None:
    if stray:
        stand = "stands" if len(stray) == 1 else "stand"
        why = "the index does not name" if indexed else f"{stand} beside {SINGLE}"
        report.add(
            "stray-weight-file",
            f"{number(stray, 'weight file')} that {why}: {summarise(stray)}; not read here, but "
            "other tools read every *.safetensors file of a folder",
            "move them away",
            path=folder / stray[0],
            command=move_aside([folder / name for name in stray], Path(os.path.normpath(folder))),
        )

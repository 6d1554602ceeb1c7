"""MindSpore checkpoints on disk: one file, or ``rank_R`` folders with strategy files."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmconvert.causes.folders import unified
from mmconvert.errors import CheckpointError, LayoutError, cannot_read
from mmconvert.formats.containers.ckpt import check_crc, read_ckpt
from mmconvert.formats.containers.safetensors import read_weight_file
from mmconvert.formats.faults import STRICT, Faults
from mmconvert.formats.mindspore.output import STRATEGIES
from mmconvert.formats.mindspore.strategy import MAX_STRATEGY, Strategy, read_strategy
from mmconvert.formats.mindspore.strategy_writer import merge_strategies
from mmconvert.formats.reading import opened, size_of_file
from mmconvert.names import number, summarise
from mmconvert.stored import StoredTensor

SUFFIXES = (".ckpt", ".safetensors")
_RANK = re.compile(r"rank_(\d{1,5})")
_STRATEGY = re.compile(r".*rank_(\d{1,5})\.(ckpt|json)")

# What MindSpore and MindFormers save beside the weights: optimizer state by prefix, scalars.
TRAINING_PREFIXES = (
    *("adam_m.", "adam_v.", "accu_grads.", "moment1.", "moment2.", "moments.", "momentum."),
    *("exp_avg.", "exp_avg_sq.", "accum."),
)
TRAINING_NAMES = frozenset(
    {
        *("epoch_num", "step_num", "global_step", "loss_scale", "current_iterator_step"),
        *("last_overflow_iterator_step", "learning_rate", "beta1_power", "beta2_power"),
        *("data_sink_size", "global_batch_size", "scale_sense"),
    }
)


@dataclass
class MSCheckpoint:
    """A MindSpore checkpoint's headers.

    Attributes:
        path: as it was given.
        parts: for each rank its tensors by name, in the order of the file.
        strategy: how they are sliced; None for a complete checkpoint in one file.
        training: number of records of training that are left out, and an example.
        notes: what is worth knowing, in words.
    """

    path: Path
    parts: list[dict[str, StoredTensor]]
    strategy: Strategy | None
    training: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list[str])


def is_ms(path: Path) -> bool:
    """Whether a path looks like a MindSpore checkpoint: by its name, or its rank folders."""
    if path.is_file():
        return path.name.endswith(SUFFIXES)
    return path.is_dir() and bool(_rank_folders(path))


def open_ms(path: Path, strategy: Path | None = None, faults: Faults = STRICT) -> MSCheckpoint:
    """Reads the headers of a MindSpore checkpoint.

    Args:
        path: a file, or a folder of ``rank_R`` folders.
        strategy: a strategy file, or a folder of them; None looks beside the rank folders. A
            checkpoint of one rank is complete, and needs none.
        faults: where those go after which reading goes on.

    Raises:
        CheckpointError: missing or ambiguous files; FormatError: damaged ones; LayoutError: files
            that do not fit the strategy.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist", "a .ckpt or safetensors file, or a folder of rank_R folders"
        )
    if not path.is_dir():
        found = _Opened([path], faults)
        return found.checkpoint(path, _given(strategy))
    files = _rank_files(path)
    found = _Opened(files, faults)
    given = _given(strategy)
    if given is None and (len(files) > 1 or (path / STRATEGIES).is_dir()):
        given = _beside(path, found.notes)
    if given is not None:
        _check_ranks(path, given, len(files))
    return found.checkpoint(path, given)


class _Opened:
    """The tensors of some files, records of training apart."""

    def __init__(self, files: Sequence[Path], faults: Faults) -> None:
        self.notes: list[str] = []
        self.parts: list[dict[str, StoredTensor]] = []
        self.training: dict[str, None] = {}
        others: dict[str, None] = {}
        for file in files:
            try:
                tensors, leftovers = _read(file)
            except CheckpointError as error:
                faults.add(error)
                self.parts.append({})
                continue
            part: dict[str, StoredTensor] = {}
            for tensor in tensors:
                if is_training(tensor.name):
                    self.training[tensor.name] = None
                else:
                    part[tensor.name] = tensor
            others |= dict.fromkeys(leftovers)
            if not part:
                faults.add(CheckpointError(f"{file} holds no weights", "a checkpoint of a model"))
            self.parts.append(part)
        if self.training:
            self.notes.append(
                f"{number(self.training, 'record')} of training left out (optimizer state, "
                f"counters): {summarise(self.training)}"
            )
        if others:
            words = f"{number(others, 'record')} left out that hold text or tables"
            self.notes.append(f"{words}: {summarise(others)}")

    def checkpoint(self, path: Path, strategy: Strategy | None) -> MSCheckpoint:
        if len(self.parts) == 1 and (strategy is None or strategy.devices() == 1):
            return MSCheckpoint(path, self.parts, None, tuple(self.training), self.notes)
        if path.is_file():
            raise LayoutError(
                f"{path} is one file, and the strategy given is for several devices",
                "the folder with the rank_R folders, or no strategy for a complete file",
            )
        return MSCheckpoint(path, self.parts, strategy, tuple(self.training), self.notes)


def is_training(name: str) -> bool:
    """Whether a record is of training, not a weight."""
    return name in TRAINING_NAMES or name.startswith(TRAINING_PREFIXES)


def _read(path: Path) -> tuple[list[StoredTensor], list[str]]:
    """A file's tensors, and the names of records that are none."""
    if path.name.endswith(".safetensors"):
        file = read_weight_file(path)
        return file.tensors, []
    found = read_ckpt(path)
    check_crc(found)
    return found.tensors, [left.name for left in found.leftovers]


# ------------------------------------------------------------------------------------ folders


def _entries(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise cannot_read(folder, error, "a readable folder") from error


def _rank_folders(folder: Path) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for name in _entries(folder):
        match = _RANK.fullmatch(name)
        if match and (folder / name).is_dir():
            if int(match[1]) in found:
                raise CheckpointError(
                    f"{folder} has {found[int(match[1])].name} and {name}", "each rank once"
                )
            found[int(match[1])] = folder / name
    return found


def _rank_files(folder: Path) -> list[Path]:
    """The weight file of each rank, in order."""
    ranks = _rank_folders(folder)
    if not ranks:
        raise unified(folder) or CheckpointError(
            f"{folder} has no rank_R folders",
            "rank_0, rank_1, ... with one .ckpt file each, or one file in place of the folder",
            "give the folder right above rank_0, or the .ckpt file itself",
        )
    missing = [f"rank_{rank}" for rank in range(max(ranks) + 1) if rank not in ranks]
    if missing:
        raise CheckpointError(
            f"{folder} has no {', '.join(missing[:5])}"
            + (f" and {len(missing) - 5} more" if len(missing) > 5 else ""),
            f"every folder from rank_0 to rank_{max(ranks)}",
            "copy the folders of all ranks",
        )
    return [_only_file(ranks[rank]) for rank in sorted(ranks)]


def _only_file(folder: Path) -> Path:
    files = [name for name in _entries(folder) if name.endswith(SUFFIXES)]
    if len(files) != 1:
        shown = f": {summarise(files, 3)}" if files else ""
        raise CheckpointError(
            f"{folder} has {number(files, 'weight file')}{shown}",
            "one .ckpt (or safetensors) file in each rank folder",
            "copy or link the files of one step into rank_R folders of their own"
            if files
            else "copy the folder of this rank again",
        )
    return folder / files[0]


# --------------------------------------------------------------------------------- strategies


def _given(path: Path | None) -> Strategy | None:
    return None if path is None else read_strategies(path)


def _beside(folder: Path, notes: list[str]) -> Strategy:
    """The strategy of a checkpoint: below its folder, or beside it as MindFormers has it."""
    for place in (folder / STRATEGIES, folder.parent / STRATEGIES):
        if place.is_dir():
            notes.append(f"slices are those of the strategy files in {place}")
            return read_strategies(place)
    raise CheckpointError(
        f"{folder} has several ranks, and there is no strategy folder in it or beside it",
        "the strategy files that training wrote (ckpt_strategy_rank_R.ckpt): they say how tensors "
        "are sliced",
        "give them: a file or folder, with --cfg.strategy (resplit: --cfg.source_strategy)",
    )


def read_strategies(path: Path) -> Strategy:
    """One strategy, from a file or from a folder with one file for each rank.

    Raises:
        CheckpointError: there is none; FormatError: a damaged one; LayoutError: files that
            contradict each other.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist", "a strategy file, or a folder of them")
    if not path.is_dir():
        return read_strategy(path)
    names = _entries(path)
    ranks = [name for name in names if _STRATEGY.fullmatch(name)]
    if not ranks:
        merged = [name for name in names if name.endswith((".ckpt", ".json"))]
        if len(merged) == 1:
            return read_strategy(path / merged[0])
        raise CheckpointError(
            f"{path} has no files *_rank_R.ckpt" + (f", but {summarise(merged)}" if merged else ""),
            "strategy files, one for each rank; or one merged file",
            "give the file itself",
        )
    known: dict[bytes, Strategy] = {}
    for name in sorted(ranks):  # ranks of one stage have the same file: read once
        digest = _digest(path / name)
        if digest not in known:
            known[digest] = read_strategy(path / name)
    return merge_strategies(known.values())


def _digest(path: Path) -> bytes:
    try:
        if size_of_file(path) > MAX_STRATEGY:
            return str(path).encode()  # read_strategy refuses it
        with opened(path) as file:
            return hashlib.sha256(file.read()).digest()
    except OSError as error:
        raise cannot_read(path, error) from error


def _check_ranks(folder: Path, strategy: Strategy, ranks: int) -> None:
    """Raises LayoutError unless there are as many ranks as the strategy asks for."""
    devices = strategy.devices(str(folder))
    stages = sorted(strategy.stages)
    if stages != list(range(len(stages))):
        raise LayoutError(
            f"the strategy is for the pipeline stages {', '.join(map(str, stages))} only",
            "every stage from 0 on",
            "give the folder with the strategy files of all ranks, or the merged file",
        )
    if devices * len(stages) != ranks:
        raise LayoutError(
            f"{folder} holds {ranks} ranks; its strategy is for {devices} devices in each of "
            f"{len(stages)} pipeline stages, {devices * len(stages)} in all",
            "the strategy files of this checkpoint",
        )

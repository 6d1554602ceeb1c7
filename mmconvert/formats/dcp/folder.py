"""DCP folders: with a tracker file above them as trainers have it, or by themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mmconvert.errors import CheckpointError
from mmconvert.formats.dcp.items import Items, orphans
from mmconvert.formats.dcp.metadata import NAME, Metadata, read_metadata
from mmconvert.formats.mm.ranks import TRACKER
from mmconvert.formats.mm.tracker import tracker_text
from mmconvert.names import number, summarise
from mmconvert.stored import StoredTensor

RELEASE = "release"
COMMON = "common.pt"  # what Megatron-Core keeps beside .metadata
STATE = re.compile(r"optimizer(\..*)?|chained_\d+\.optimizer\..*")  # of training, not of the model
_EXTRA = re.compile(r".*\._extra_state(\..*|/.*)?")


@dataclass(frozen=True)
class DCPCheckpoint:
    """A DCP folder's headers.

    Attributes:
        folder: the folder with .metadata.
        iteration: ``release``, the number of an iteration, or "" where none is told.
        metadata: what it holds.
        tensors: of the model, by flat name.
        notes: what else it holds, in words.
    """

    folder: Path
    iteration: str
    metadata: Metadata
    tensors: Mapping[str, StoredTensor]
    notes: tuple[str, ...] = ()


def find_dcp(path: Path) -> tuple[Path, str] | None:
    """The folder with the data, and its iteration; None if there is none."""
    if not path.is_dir():
        return None
    if _holds(path):
        hit = re.fullmatch(r"iter_(\d{7,12})", path.resolve().name)
        return path, str(int(hit[1])) if hit else ""
    if (path / TRACKER).is_file():
        try:
            text = tracker_text(path / TRACKER)
        except CheckpointError:
            return None
        name = RELEASE if text == RELEASE else f"iter_{int(text):07d}"
        return (path / name, text) if _holds(path / name) else None
    return (path / RELEASE, RELEASE) if _holds(path / RELEASE) else None


def _holds(folder: Path) -> bool:
    if (folder / NAME).is_file():
        return True
    return folder.is_dir() and next(folder.glob("*.distcp"), None) is not None


def is_torch_dist(folder: Path) -> bool:
    """Whether a folder with .metadata is Megatron-Core's."""
    return (folder / COMMON).is_file()


def open_dcp(path: Path) -> DCPCheckpoint:
    """Reads the headers of a folder: of the model's tensors alone, not of an optimizer's.

    Raises:
        CheckpointError: no such folder, or files that are missing; FormatError: damaged ones.
    """
    found = find_dcp(path)
    if found is None:
        raise CheckpointError(
            f"{path} is not a folder of torch.distributed.checkpoint",
            f"a folder with {NAME} and *.distcp files, or the folder above it",
            "check the path",
        )
    folder, iteration = found
    metadata = read_metadata(folder)
    names = [name for name in metadata.tensors if not STATE.fullmatch(name)]
    state = [name for name in metadata.tensors if STATE.fullmatch(name)]
    with Items(metadata) as items:
        tensors = {name: items.tensor(name, metadata.tensors[name]) for name in names}
    return DCPCheckpoint(folder, iteration, metadata, tensors, tuple(_notes(metadata, state)))


def _notes(metadata: Metadata, state: list[str]) -> list[str]:
    """What is not read of a folder."""
    notes: list[str] = []
    if state:
        pieces = [p for name in state for p in metadata.tensors[name].pieces]
        nbytes = sum(piece.item.nbytes for piece in pieces)
        notes.append(f"optimizer: {number(state, 'tensor')}, {nbytes} bytes, not read")
    objects = [name for name in metadata.objects if not _EXTRA.fullmatch(name)]
    objects = [n for n in objects if not STATE.fullmatch(n) and n != "checkpoint_version"]
    if objects:
        notes.append(f"{number(objects, 'object')} beside the tensors: {summarise(objects)}")
    if left := orphans(metadata.path.parent, metadata):
        notes.append(
            f"warning: {number(left, 'file')} that {metadata.path} does not name, not read: "
            f"{summarise(left)}"
        )
    return notes

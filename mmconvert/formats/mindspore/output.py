"""Writes MindSpore checkpoints: files without their data, and strategy files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmconvert.formats.containers.allocate import opened, write_all, write_file
from mmconvert.formats.containers.ckpt_layout import CkptLayout, create_ckpt, layout_ckpt, seal
from mmconvert.formats.containers.safetensors import Entry, layout_weight_file
from mmconvert.stored import StoredTensor

METADATA = {"format": "ms"}  # what MindSpore's own save_checkpoint writes into safetensors
STRATEGIES = "strategy"  # folder, as in MindFormers' output


@dataclass(frozen=True)
class MSFile:
    """A weight file to be written.

    Attributes:
        path: below the output folder.
        entries: its tensors, in order.
        targets: their numbers among the plan's targets.
        layout: of a .ckpt; None for safetensors.
        head: all bytes before the data of a safetensors file.
        starts: absolute offsets of the tensors of a safetensors file.
        size: bytes of the file.
    """

    path: str
    entries: tuple[Entry, ...]
    targets: tuple[int, ...]
    layout: CkptLayout | None
    head: bytes
    starts: tuple[int, ...]
    size: int


def plan_file(
    path: str, entries: Sequence[Entry], targets: Sequence[int], *, ckpt: bool, crc: bool
) -> MSFile:
    """Lays a file out.

    Raises:
        RequestError: a tensor that the format cannot hold.
    """
    if ckpt:
        layout = layout_ckpt(entries, crc=crc)
        return MSFile(path, tuple(entries), tuple(targets), layout, b"", (), layout.size)
    head, starts, size = layout_weight_file(list(entries), METADATA)
    return MSFile(path, tuple(entries), tuple(targets), None, head, tuple(starts), size)


def create_files(
    folder: Path, files: Sequence[MSFile], beside: Mapping[str, bytes]
) -> list[StoredTensor]:
    """Creates the files in a staging folder, their data as holes; small files complete.

    Args:
        beside: further files: path below the folder -> content.

    Returns:
        where each of the plan's targets is to be written, in their order.

    Raises:
        OSError, OutputError: the file system refuses.
    """
    places: dict[int, StoredTensor] = {}
    for file in files:
        path = folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.layout is not None:
            found = create_ckpt(path, file.layout, file.entries)
        else:
            with opened(path, file.size) as fd:
                write_all(fd, file.head, 0)
            found = [
                StoredTensor(*entry, path, start)
                for entry, start in zip(file.entries, file.starts, strict=True)
            ]
        places |= dict(zip(file.targets, found, strict=True))
    for name, content in beside.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
    return [places[i] for i in range(len(places))]


def seal_files(folder: Path, files: Sequence[MSFile]) -> None:
    """Writes the checksums of files whose data is complete, where they have room for one.

    Raises:
        OutputError: a file cannot be read back or written.
    """
    for file in files:
        if file.layout is not None:
            seal(folder / file.path, file.layout)


def rank_path(rank: int, suffix: str) -> str:
    """Path of a rank's weight file, as ``transform_checkpoints`` and MindFormers expect it."""
    return f"rank_{rank}/checkpoint_{rank}.{suffix}"


def strategy_path(rank: int) -> str:
    """Path of a rank's strategy file."""
    return f"{STRATEGIES}/ckpt_strategy_rank_{rank}.ckpt"


MERGED = f"{STRATEGIES}/merged_ckpt_strategy.ckpt"

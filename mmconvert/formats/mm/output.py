"""The files of an MM checkpoint that is to be written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mmconvert.formats.containers.image import FileImage, small
from mmconvert.formats.containers.ptfile import Slot, pt_image
from mmconvert.formats.mm.folder import RANK_FILE, TRACKER
from mmconvert.sharding.layout import Layout, Rank
from mmconvert.stored import Target

VERSION = 3.0  # Megatron's checkpoint_version: the order of q, k, v within linear_qkv


def rank_images(
    layout: Layout, targets: Sequence[Target], iteration: str = "release"
) -> Iterator[FileImage]:
    """The rank files and the tracker file.

    Args:
        targets: every tensor with its chunk.
    """
    parts: dict[Rank, dict[str, dict[str, Slot]]] = {
        rank: {layout.part(v): {} for v in range(layout.vpp_size)} for rank in layout.ranks()
    }
    for number, t in enumerate(targets):
        assert t.chunk is not None  # noqa: S101 - narrows the type of an MM target
        part = parts[t.chunk.rank][layout.part(t.chunk.virtual)]
        part[t.name] = Slot(t.dtype, t.shape, number)
    base = Path(iteration if iteration == "release" else f"iter_{int(iteration):07d}")
    for rank, chunks in parts.items():
        path = base / layout.folder(rank) / RANK_FILE
        yield pt_image(str(path), {**chunks, "checkpoint_version": VERSION})
    yield small(TRACKER, iteration.encode(), pointer=True)

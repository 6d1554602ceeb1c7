"""The files of an MM checkpoint that is to be written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmconvert.formats.containers.image import FileImage, small
from mmconvert.formats.containers.ptwriter import Slot, pt_image
from mmconvert.formats.mm.ranks import DISTRIBUTED, RANK_FILE, TRACKER
from mmconvert.sharding.layout import Layout, Rank
from mmconvert.stored import Target

if TYPE_CHECKING:
    from mmconvert.formats.mm.optimizer.writing import StateWriter

VERSION = 3.0  # Megatron's checkpoint_version: the order of q, k, v within linear_qkv


def rank_images(
    layout: Layout,
    targets: Sequence[Target],
    iteration: str = "release",
    state: StateWriter | None = None,
) -> Iterator[FileImage]:
    """The rank files and the tracker file.

    Args:
        targets: every weight with its chunk.
        state: of the optimizer, if it goes with them.
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
        folder = base / layout.folder(rank)
        content: dict[str, object] = {**chunks, "checkpoint_version": VERSION}
        if state is not None:
            more = state.rank(rank)
            content = {name: state.ordered(chunk) for name, chunk in chunks.items()}
            content |= {"checkpoint_version": VERSION, **more.content}
            if more.beside is not None:
                yield pt_image(str(folder / DISTRIBUTED), more.beside)
        yield pt_image(str(folder / RANK_FILE), content)
    yield small(TRACKER, iteration.encode(), pointer=True)

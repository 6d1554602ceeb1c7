"""What a checkpoint is, from its headers: for looking at it and for reading single tensors."""

from __future__ import annotations

from pathlib import Path

from mmconvert.causes.downloads import way_to
from mmconvert.errors import CheckpointError
from mmconvert.formats.contents import Look
from mmconvert.formats.registry import load, recognise


def look(path: Path) -> Look:
    """Looks at a checkpoint of any format, at an adapter's folder, or at a single weight file.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    from mmconvert.formats import single

    if path.is_file():
        return single.look(path)
    if single.adapter_of(path) is not None:
        return load("peft").look(path)
    if not path.is_dir():
        raise CheckpointError(
            f"{path} does not exist", "a checkpoint's folder, or a weight file", way_to(path)
        )
    return load(recognise(path) or "mm").look(path)

"""The formats: one line each, loaded when they are asked for; and what a path is."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path

from mmconvert.errors import RequestError
from mmconvert.formats.base import Format
from mmconvert.formats.reading import unwatched

ENTRY_POINTS = "mmconvert.formats"  # third-party packages register a Format here

# The order is that in which they are asked whether a path is theirs.
BUILT_IN = {
    "hf": "mmconvert.formats.hf.format",
    "peft": "mmconvert.formats.peft.format",
    "ms": "mmconvert.formats.mindspore.format",
    "dcp": "mmconvert.formats.dcp.format",
    "torch_dist": "mmconvert.formats.dcp.torch_dist",
    "mm": "mmconvert.formats.mm.format",
}


def names() -> list[str]:
    """The names of all formats, built in and third-party; imports none of them."""
    return [*BUILT_IN, *(name for name in _third_party() if name not in BUILT_IN)]


def load(name: str) -> Format:
    """The format of a name.

    Raises:
        RequestError: there is none, or it is no format.
    """
    if name in BUILT_IN:
        return import_module(BUILT_IN[name]).FORMAT
    entry = _third_party().get(name)
    if entry is None:
        raise RequestError(f"there is no format {name}", f"one of {', '.join(names())}")
    found = entry.load()
    if not isinstance(found, Format):
        raise RequestError(f"the entry point {name} is {found!r}", "a formats.base.Format")
    return found


def recognise(path: Path) -> str:
    """The name of the format that a path is a checkpoint of; "" if it looks like none."""
    try:
        return next((name for name in names() if load(name).recognise(path)), "")
    except OSError:  # a folder that may not be listed
        return ""


def strangers(folder: Path, present: Iterable[str]) -> list[str] | None:
    """What belongs to no checkpoint in a folder that ``--overwrite`` is to replace.

    Args:
        present: the names of what is in the folder.

    Returns:
        those that no conversion writes there; None if the folder is no output of any format.
    """
    with unwatched():  # another conversion may well replace it before this one does
        owner = next((found for name in names() if (found := load(name)).owns(folder)), None)
    if owner is None:
        return None
    own = re.compile(rf"{owner.own_names}|mmconvert\.json|\.DS_Store", re.DOTALL)
    return sorted(name for name in present if not own.fullmatch(name))


@cache
def _third_party():  # noqa: ANN202 - the type EntryPoint would cost the import it avoids
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}


def of_naming(naming: str) -> str:
    """The name of the format whose tensors are named so.

    Raises:
        RequestError: there is none.
    """
    found = next((name for name in names() if load(name).naming == naming), "")
    if not found:
        raise RequestError(f"no format here has names of {naming}", "a family of a format here")
    return found

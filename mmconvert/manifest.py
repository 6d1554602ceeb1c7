"""``mmconvert.json``: what an MM checkpoint was made of. It never overrules the data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from mmconvert.converters.family import Dims
from mmconvert.errors import MMConvertError
from mmconvert.formats.hf import read_json_file
from mmconvert.formats.megatron import RANK_FILE
from mmconvert.version import VERSION

NAME = "mmconvert.json"


def write(folder: Path, content: Mapping[str, object]) -> None:
    """Writes the manifest of a finished checkpoint, with the sizes of its rank files."""
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob(RANK_FILE))}
    whole = {"mmconvert": VERSION, **content, "files": files}
    (folder / NAME).write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")


def read(folder: Path) -> tuple[dict[str, object] | None, str]:
    """The manifest of a checkpoint that is still the one it was written for, and a note.

    A manifest that is damaged, or whose rank files have other sizes now, is ignored: the note
    then says so.
    """
    path = folder / NAME
    if not path.is_file():
        return None, ""
    try:
        content = read_json_file(path)
    except MMConvertError as error:
        return None, f"{path} is ignored: {error.what}"
    files = content.get("files")
    if not isinstance(files, dict):
        return None, f"{path} is ignored: it lists no files"
    for name, size in files.items():
        file = folder / str(name)
        if not file.is_file() or file.stat().st_size != size:
            return None, f"{path} is ignored: {name} has changed since it was written"
    return content, ""


def sizes(content: Mapping[str, object]) -> Dims:
    """The model's sizes from a manifest; whatever is no plain number is left out."""
    found = content.get("dims")
    if not isinstance(found, dict):
        return {}
    return {
        str(name): value
        for name, value in found.items()
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31
    }

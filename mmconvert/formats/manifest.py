"""``mmconvert.json``: what a checkpoint was made of, and how. It never overrules the data."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from mmconvert.converters.configs import Dims
from mmconvert.converters.family import Variant
from mmconvert.errors import MMConvertError
from mmconvert.formats.containers.allocate import write_file
from mmconvert.formats.jsonfile import read_json_file
from mmconvert.formats.reading import State
from mmconvert.narrow import is_array, is_object, is_texts
from mmconvert.version import VERSION

NAME = "mmconvert.json"
WEIGHTS = {".pt", ".safetensors", ".ckpt", ".distcp"}  # endings of files whose state it notes


def write(folder: Path, content: Mapping[str, object], weights: Collection[str]) -> None:
    """Writes the manifest of a finished checkpoint, with size and time of its weight files.

    Args:
        weights: paths below the folder of those that were written.
    """
    suffixes = WEIGHTS | {Path(name).suffix for name in weights}
    files = {str(path.relative_to(folder)): state(path) for path in _ending(folder, suffixes)}
    whole = {"mmconvert": VERSION, **content, "files": files}
    text = json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
    # A file name that is no UTF-8 has lone surrogates in it; JSON's escape is Python's.
    write_file(folder / NAME, text.encode(errors="backslashreplace"))


def _ending(folder: Path, suffixes: Collection[str]) -> list[Path]:
    return sorted(path for suffix in suffixes for path in folder.rglob(f"*{suffix}"))


def state(path: Path) -> list[int]:
    """What changes with a file's bytes: size, time of modification, of its inode, its number.

    Not the device, which may have another number after the next boot.
    """
    found = State.of(path.stat())
    return [found.nbytes, found.mtime_ns, found.ctime_ns, found.inode]


def read(folder: Path) -> tuple[dict[str, object] | None, str]:
    """The manifest of a checkpoint that is still the one it was written for, and a note.

    A manifest that is damaged, or whose weight files have other sizes now, is ignored: the note
    then says so. Times are no matter here, as a copy of a checkpoint has others.
    """
    path = folder / NAME
    if not path.is_file():
        return None, ""
    try:
        content = read_json_file(path)
    except MMConvertError as error:
        return None, f"{path} is ignored: {error.what}"
    changed = _changed(folder, content, times=False)
    return (None, f"{path} is ignored: {changed}") if changed else (content, "")


def listed(folder: Path) -> dict[str, int]:
    """Path below the folder -> bytes of each weight file that its manifest lists; {} if none."""
    path = folder / NAME
    try:
        files = read_json_file(path).get("files") if path.is_file() else None
    except MMConvertError:
        return {}
    noted = {
        name: state[0] if is_array(state) and state else state
        for name, state in (files.items() if is_object(files) else ())
    }
    return {name: size for name, size in noted.items() if isinstance(size, int)}


def iteration(folder: Path, told: str) -> int:
    """The iteration of training that a checkpoint's weights are of; 0 where there is none.

    Args:
        told: by the tracker file: a number, or ``release``. Of a release it is that of the
            checkpoint that was resplit to it, once or several times.
    """
    if told.isdigit():
        return int(told)
    content, _ = read(folder)
    found = (content or {}).get("iteration", 0)
    return found if type(found) is int and found > 0 else 0


def digests(folder: Path) -> tuple[dict[str, str] | None, str]:
    """The digests of a checkpoint whose weight files are untouched since, or None and why not."""
    content, note = read(folder)
    if content is None:
        return None, note or f"{folder} has no {NAME}"
    found = content.get("digests")
    if not is_texts(found):
        return None, f"{folder / NAME} holds no digests (a conversion writes them with --digests)"
    changed = _changed(folder, content, times=True) or _added(folder, content)
    return (None, f"{folder / NAME} is not relied on: {changed}") if changed else (found, "")


def _changed(folder: Path, content: Mapping[str, object], *, times: bool) -> str:
    """What does not fit the files that are there; "" if all does."""
    files = content.get("files")
    if not is_object(files) or not files:
        return "it lists no files"
    for name, noted in files.items():
        try:
            now = state(folder / name)
        except (OSError, ValueError):  # gone, or no name of a file
            now = []
        size = noted[0] if is_array(noted) and noted else noted
        if not now or type(size) is not int or now[0] != size:
            return f"{name} has changed since it was written"
        if times and now != noted:
            return f"{name} has another time or inode than when it was written, as a copy has"
    return ""


def _added(folder: Path, content: Mapping[str, object]) -> str:
    """A weight file that is not listed; "" if there is none. Training may have gone on here."""
    files = content.get("files")
    listed = set(files) if is_object(files) else set[str]()
    suffixes = WEIGHTS | {Path(name).suffix for name in listed}
    names = (str(path.relative_to(folder)) for path in _ending(folder, suffixes))
    new = [name for name in names if name not in listed]
    return f"{new[0]} has come since it was written" if new else ""


def sizes(content: Mapping[str, object]) -> Dims:
    """The model's sizes from a manifest; whatever is no plain number is left out."""
    found = content.get("dims")
    if not is_object(found):
        return {}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31
    }


def variant(content: Mapping[str, object]) -> Variant:
    """The variant of the family's table from a manifest, as far as it tells."""
    said, listed = content.get("variant"), content.get("lists")
    said = said if is_object(said) else {}
    traits = said.get("traits")
    lists = listed.items() if is_object(listed) else ()
    return Variant(
        tied=said.get("tied") is True,
        canonical=said.get("canonical") is True,
        traits=frozenset(t for t in traits if isinstance(t, str))
        if is_array(traits)
        else frozenset(),
        lists=tuple(
            (name, tuple(n for n in layers if isinstance(n, int)))
            for name, layers in lists
            if is_array(layers)
        ),
    )

"""Conversations out of data files, whatever dialect they are written in.

One reader for all: ``messages`` with role and content (LLaMA-Factory's mllm files, ms-swift),
``conversations`` with from and value (ShareGPT, LLaVA, InternVL), Qwen-VL's ``<img>path</img>``;
JSON lists and JSON lines. Which it is, each entry tells, or data.json says by its ``attr``.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from mmconvert.errors import DatasetError
from mmconvert.runtime.samples import (
    AUDIO,
    KINDS,
    PLACE,
    Clip,
    Columns,
    Sample,
    SampleSource,
    SamplesRead,
)

QWEN_VL_PICTURE = re.compile(r"<img>(.*?)</img>")
ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "system": "system",
}  # fmt: skip
FORM = '{"images": ["a.png"], "messages": [{"role": "user", "content": "<image>..."}, ...]}'
LARGEST = 1 << 32  # bytes of a data file: it is read whole


def read_source(source: SampleSource, *, strict: bool = False) -> SamplesRead:
    """The conversations of a source.

    Raises:
        DatasetError: a file cannot be read, or nothing in it can be used; with ``strict``, the
            first entry that cannot.
    """
    found = SamplesRead()
    count = 0
    for path in source.files:
        entries = _shared(list(_entries(path)), source.share)
        for name, item in entries:
            if source.most and count == source.most:
                break
            count += 1
            try:
                found.samples.append(_sample(item, source, path.parent, name, found.unread))
            except DatasetError as error:
                if strict:
                    raise
                found.faults.append(error)
    if not found.samples:
        first = found.faults[0] if found.faults else None
        if first is not None and len(found.faults) == 1:
            raise first
        raise DatasetError(
            "there are no conversations in the data"
            + (f" that can be used: {first.what}, and so on" if first else ""),
            first.expected if first else "at least one",
        )
    return found


def _shared(entries: list[tuple[str, Any]], share: float) -> list[tuple[str, Any]]:
    if share < 1:
        return entries[: int(len(entries) * share)]
    return entries * int(share)


# -------------------------------------------------------------------------------------- files
def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Each entry of a data file with its name; a line that is no JSON as the error it makes.

    Raises:
        DatasetError: the file cannot be read, or is neither a list nor lines.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise DatasetError(f"{path} has {path.stat().st_size} bytes", "several smaller files")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}", "a data file (JSON)") from None
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path} is not valid JSON: {error}", "a list of conversations"
        ) from None
    if text.lstrip()[:1] == "{":
        yield from _lines(path, text)
        return
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DatasetError(
            f"{path} is not valid JSON: {error}", "a list of conversations, or one on each line"
        ) from None
    if not isinstance(content, list):
        raise DatasetError(f"{path} holds no list", "a list of conversations, or one on each line")
    for number, item in enumerate(cast("list[object]", content)):
        yield f"{path}, entry {number}", item


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        name = f"{path}, line {number}"
        try:
            yield name, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield (
                name,
                DatasetError(f"{name} is not valid JSON: {error}", "one conversation on each line"),
            )


# ------------------------------------------------------------------------------------ entries
def _sample(item: Any, source: SampleSource, folder: Path, name: str, unread: set[str]) -> Sample:  # noqa: ANN401 - a stranger's JSON
    """A conversation out of an entry.

    Raises:
        DatasetError: naming the entry and what is wrong with it.
    """
    if isinstance(item, DatasetError):
        raise item
    if not isinstance(item, dict):
        raise DatasetError(f"{name} has no messages", FORM)
    entry = cast("dict[str, Any]", item)
    columns = source.columns or _recognised(entry)
    unread |= {str(key) for key in entry.keys() - columns.known}
    messages = _messages(entry, columns, name)
    files = {kind: file_names(entry, columns.files[kind], name) for kind in KINDS}
    if not files["image"]:
        messages, files["image"] = _inline_pictures(messages)
    _learnable(messages, name, strict=source.columns is not None)
    _places(messages, files, columns.front, name)
    paths = {
        kind: [find_file(source.folders, folder, text, name) for text in some]
        for kind, some in files.items()
    }
    videos: list[Any] = [_clip(path, entry.get("clip"), name) for path in paths["video"]]
    return Sample(messages, paths["image"], videos, paths[AUDIO], name)


def _recognised(entry: Mapping[str, Any]) -> Columns:
    """The columns of an entry, by its keys and those of its messages."""
    key = "conversations" if "conversations" in entry and "messages" not in entry else "messages"
    said = entry.get(key)
    first: object = cast("list[object]", said)[0] if isinstance(said, list) and said else None
    plain = not (isinstance(first, dict) and "from" in first)
    role, content = ("role", "content") if plain else ("from", "value")
    if not plain and isinstance(first, dict) and "value" not in first:
        content = "content"
    files = {
        kind: next((name for name in (f"{kind}s", kind) if entry.get(name)), f"{kind}s")
        for kind in KINDS
    }
    return Columns(key, role, content, ROLES, "system", files)


def _messages(entry: Mapping[str, Any], columns: Columns, name: str) -> list[tuple[str, str]]:
    said = entry.get(columns.messages)
    if not isinstance(said, list) or not said:
        raise DatasetError(f"{name} has no {columns.messages}", FORM)
    messages: list[tuple[str, str]] = []
    system = entry.get(columns.system) if columns.system else None
    if isinstance(system, str) and system:
        messages.append(("system", system))
    for message in cast("list[object]", said):
        fields = cast("dict[str, object]", message) if isinstance(message, dict) else {}
        word, text = fields.get(columns.role), fields.get(columns.content)
        role = columns.roles.get(word) if isinstance(word, str) else None
        if role is None:
            raise DatasetError(
                f"{name} has a message of role {word!r}"[:200],
                f"{columns.role} {', '.join(columns.roles)}, and {columns.content}",
            )
        if not isinstance(text, str):
            raise DatasetError(f"{name} has a message of role {word!r} without text", FORM)
        messages.append((role, text))
    return messages


def _learnable(messages: Sequence[tuple[str, str]], name: str, *, strict: bool) -> None:
    """There is an answer; where data.json says the dialect, questions and answers in turn."""
    roles = [role for role, _ in messages]
    if "assistant" not in roles:
        raise DatasetError(f"{name} has nothing to learn", "a message of role assistant")
    turns = roles[1:] if roles[0] == "system" else roles
    if strict and turns != ["user", "assistant"] * (len(turns) // 2):
        raise DatasetError(
            f"{name}: its messages are of {', '.join(roles)}"[:200],
            "user and assistant in turn, after a system message at most",
        )


def file_names(entry: Mapping[str, Any], key: str | None, name: str) -> list[str]:
    """The file names in a column: a list, or one alone."""
    value = entry.get(key) if key is not None else None
    if value is None or value == "":
        return []
    found = cast("list[object]", value) if isinstance(value, list) else [value]
    paths = [
        cast("dict[str, object]", one).get("path") if isinstance(one, dict) else one
        for one in found
    ]
    if not all(isinstance(path, str) and path for path in paths):
        raise DatasetError(f"{name}: {key} is {value!r}"[:200], "a list of file names")
    return cast("list[str]", paths)


def _inline_pictures(messages: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[str]]:
    """Qwen-VL's form: ``Picture 1: <img>path</img>`` in the text."""
    pictures = [path for _, text in messages for path in QWEN_VL_PICTURE.findall(text)]
    if not pictures:
        return messages, []
    return [(role, QWEN_VL_PICTURE.sub("<image>", text)) for role, text in messages], pictures


def _places(
    messages: list[tuple[str, str]], files: Mapping[str, Sequence[str]], front: str, name: str
) -> None:
    """As many places as files; where no place is marked, they are put before the first question."""
    marks = [m[1] for _, text in messages for m in PLACE.finditer(text)]
    for kind in KINDS:
        places, given = marks.count(kind), len(files[kind])
        if given and not places:
            first = next((i for i, (role, _) in enumerate(messages) if role == "user"), 0)
            text = (f"<{kind}>{front}") * given + messages[first][1]
            messages[first] = (messages[first][0], text)
        elif places > given:
            raise DatasetError(
                f"{name} has {places} <{kind}> in its text and {given} such files",
                f"one file for each <{kind}>",
            )
        elif places < given:
            raise DatasetError(
                f"{name} has {given} files and only {places} <{kind}> in its text",
                f"one <{kind}> for each file",
            )


def find_file(folders: Sequence[Path], folder: Path, text: str, name: str) -> Path:
    """A file that an entry names: from the data file's own folder or from the working directory,
    as trainers read what ``mm-convert data`` writes; with data.json from its folders, then from
    the working directory.

    Raises:
        DatasetError: it is nowhere, or something else than a file or a folder of pictures.
    """
    usual = (Path(text), folder / text) if folders else (folder / text, Path(text))
    for path in (*(base / text for base in folders), *usual):
        try:
            mode = path.stat().st_mode
        except (OSError, ValueError):
            continue
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            return path
        raise DatasetError(
            f"{name}: {path} is not a regular file", "a file or a folder of pictures"
        )
    where = (folders[0] if folders else folder) / text
    raise DatasetError(
        f"{name}: {where} is missing",
        "every file, by a path from the data file's folder or the working directory",
    )


def _clip(path: Path, clip: object, name: str) -> Path | Clip:
    """A video, or the part of it that InternVL's ``clip`` names."""
    if clip is None:
        return path
    ends = cast("list[object]", clip) if isinstance(clip, list) else []
    numbers = [float(x) for x in ends if isinstance(x, (int, float)) and not isinstance(x, bool)]
    if len(ends) != 2 or len(numbers) != 2 or not 0 <= numbers[0] < numbers[1]:
        raise DatasetError(
            f"{name}: clip is {clip!r}"[:200], "clip: [start, end] in seconds, start below end"
        )
    return Clip(path, *numbers)

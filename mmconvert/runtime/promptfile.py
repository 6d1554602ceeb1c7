"""A file of prompts: a text on each line, or a JSON object with its files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from mmconvert.errors import DatasetError
from mmconvert.runtime.conversation import prompt
from mmconvert.runtime.dialects import LARGEST, file_names, find_file
from mmconvert.runtime.samples import AUDIO, IMAGE, KINDS, VIDEO, Sample

FORM = '{"prompt": "What is this?", "image": "a.png"}'
KNOWN = {"prompt", "id", *KINDS, *(f"{kind}s" for kind in KINDS)}


def read_prompts(path: Path) -> tuple[list[Sample], list[str]]:
    """(prompts, notes on what is not read). Empty lines are left out.

    A line that begins with ``{`` is a JSON object: ``prompt``, and ``image``, ``video`` and
    ``audio``, each a name or a list of names, from the file's own folder or the working directory.

    Raises:
        DatasetError: the file cannot be read, or a line of it makes no sense; it is named.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise DatasetError(f"{path} has {path.stat().st_size} bytes", "several smaller files")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}", "a file of prompts") from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not text: {error}", "a prompt on each line") from None
    unread: set[str] = set()
    found = list(_samples(path, lines, unread))
    if not found:
        raise DatasetError(f"{path} has no prompts", f"on each line a text, or {FORM}")
    named = f"note: keys of the prompts that are not read: {', '.join(sorted(unread)[:10])}"
    return found, [named] if unread else []


def _samples(path: Path, lines: list[str], unread: set[str]) -> Iterator[Sample]:
    for number, line in enumerate(lines, 1):
        name = f"{path}, line {number}"
        if line.startswith("{"):
            yield _entry(line, path.parent, name, unread)
        elif line.strip():
            yield replace(prompt(line, (), ()), name=name)


def _entry(line: str, folder: Path, name: str, unread: set[str]) -> Sample:
    try:
        item: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{name} is not valid JSON: {error}", FORM) from None
    entry = cast("dict[str, Any]", item)
    text = entry.get("prompt")
    if not isinstance(text, str) or not text:
        raise DatasetError(f"{name}: prompt is {text!r}"[:200], FORM)
    unread |= {str(key) for key in entry.keys() - KNOWN}
    files = {
        kind: [
            find_file((), folder, one, name)
            for key in (kind, f"{kind}s")
            for one in file_names(entry, key, name)
        ]
        for kind in KINDS
    }
    made = prompt(text, files[IMAGE], files[AUDIO], files[VIDEO])
    return replace(made, name=name)

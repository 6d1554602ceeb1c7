"""Reads command lines without tyro, which costs more time than planning a model.

Only lines on which nothing can be misunderstood: every flag once, each with values of its type.
Whatever else there is, help and mistakes among it, is left to tyro (``parsing``), whose words
those are; on the lines that are read here, both find the same.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from mmconvert.cli.spelling import folders_of, path_of
from mmconvert.config import (
    Folders,
    MaybeBool,
    MaybeFloat,
    MaybeGrid,
    MaybeInt,
    MaybePath,
    Patterns,
)
from mmconvert.sharding.stages import parse_grid

Given = dict[str, list[str]]


class FlagPart(NamedTuple):
    """A dataclass whose flags stand on a command line.

    Attributes:
        form: the class.
        prefix: of its flags, ``--cfg.`` or ``--``.
        switches: its boolean flags stand alone, without True or False.
    """

    form: type
    prefix: str
    switches: bool


def read(parts: Sequence[FlagPart], words: Sequence[str]) -> list[Any] | None:
    """An object of each part's class; None where the line is not plain.

    Args:
        words: as ``spelling.normalise`` gives them: no ``=`` between a flag and its value.
    """
    given: Given = {}
    flag = ""
    for word in words:
        if word.startswith("-"):
            if word in given:
                return None
            flag = word
            given[flag] = []
        elif not flag:
            return None
        else:
            given[flag].append(word)
    try:
        found = [_filled(part, given) for part in parts]
    except ValueError:  # MMConvertErrors of grids are none: see _grid
        return None
    return None if given else found


def _filled(part: FlagPart, given: Given) -> Any:  # noqa: ANN401 - of the class that is given
    """An object of a class, filled with its flags, which are taken out of ``given``.

    Raises:
        ValueError: a flag that must be given is not, or has no plain value.
    """
    kinds = get_type_hints(part.form)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(part.form):
        kind, flag = kinds[field.name], part.prefix + field.name
        if dataclasses.is_dataclass(kind):
            inner = FlagPart(kind, f"{flag}.", part.switches)  # pyright: ignore[reportArgumentType] - a class
            if any(name.startswith(inner.prefix) for name in given) or not _optional(field):
                values[field.name] = _filled(inner, given)
        elif (words := given.pop(flag, None)) is not None:
            values[field.name] = _value(kind, words, part.switches)
        elif not _optional(field):
            raise ValueError(flag)
    return part.form(**values)


def _optional(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def _value(kind: Any, words: list[str], switches: bool) -> Any:  # noqa: ANN401 - any type's
    if kind is bool and switches:
        if words:
            raise ValueError(words)
        return True
    (word,) = words  # ValueError for more, or none
    if get_origin(kind) is Literal:
        if word not in get_args(kind):
            raise ValueError(word)
        return word
    return READERS[kind](word) if kind in READERS else _unknown(word)


def _unknown(word: str) -> Any:  # noqa: ANN401 - none at all
    raise ValueError(word)


def _whole(word: str) -> int:
    return int(word) if re.fullmatch(r"[0-9]{1,18}", word) else _unknown(word)


def _number(word: str) -> float:
    return float(word) if re.fullmatch(r"[0-9]{1,18}(\.[0-9]{1,18})?", word) else _unknown(word)


def _truth(word: str) -> bool:
    return {"True": True, "False": False}[word] if word in ("True", "False") else _unknown(word)


def _grid(word: str) -> Any:  # noqa: ANN401 - a grid
    from mmconvert.errors import LayoutError

    try:
        return parse_grid(json.loads(word), word)
    except (LayoutError, RecursionError):
        return _unknown(word)


def _texts(kind: type) -> Callable[[str], Any]:
    """Reads what ``spelling`` has joined into one word."""
    return lambda word: kind(json.loads(word))


def _path(word: str) -> Path:
    return path_of(word) if word != "None" else _unknown(word)


READERS: dict[Any, Callable[[str], Any]] = {
    str: str,
    int: _whole,
    float: _number,
    bool: _truth,
    Path: _path,
    Patterns: _texts(Patterns),
    Folders: folders_of,
    MaybeBool: _truth,
    MaybeFloat: _number,
    MaybeGrid: _grid,
    MaybeInt: _whole,
    MaybePath: _path,
}

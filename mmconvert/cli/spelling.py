"""The reference tool's way of writing flags, brought to the one that tyro reads."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_type_hints

from mmconvert.config import Folders, MaybeBool, MaybePath
from mmconvert.errors import RequestError
from mmconvert.narrow import is_array, is_dict

REPEATED = (
    "--drop",
    "--layout",
    "--cfg.lora_dir",
    "--lora",
)  # flags that may be given several times
PATHS = (Path, MaybePath)  # types of flags that name a folder


def path_of(word: str) -> Path:
    """A path with ``~`` for the home folder, which shells leave standing behind a ``=``."""
    return Path(os.path.expanduser(word))


def folders_of(word: str) -> Folders:
    """The folders of a flag that may be repeated, from the one word that they are joined into."""
    return Folders(str(path_of(folder)) for folder in json.loads(word))


class FileWord(str):
    """A flag that stands in a ``--config`` file.

    Attributes:
        where: the file, and the line if it is known.
    """

    where: str

    def __new__(cls, flag: str, where: str) -> FileWord:
        """The flag with its place."""
        word = super().__new__(cls, flag)
        word.where = where
        return word


OWN_FLAGS = (
    "--overwrite",
    "--dry_run",
    "--no_sync",
    "--crc",
    "--dequantize",
    "--json",
    "--quiet",
    "--debug",
)


def flag_paths(config: type, prefix: str = "--cfg") -> dict[str, type]:
    """Every flag of a config class, dotted, with its type."""
    found: dict[str, type] = {}
    for name, kind in get_type_hints(config).items():
        flag = f"--{name}" if prefix == "-" else f"{prefix}.{name}"
        if dataclasses.is_dataclass(kind):
            found |= flag_paths(kind, flag)  # pyright: ignore[reportArgumentType] - a dataclass
        else:
            found[flag] = kind
    return found


def normalise(words: Sequence[str], config: type, prefix: str = "--cfg") -> list[str]:
    """The words as tyro wants them.

    ``-`` and ``_`` are alike, lists may contain spaces, ``--config FILE.yaml`` stands for the
    flags in it (flags on the command line win), a boolean under ``--cfg`` may stand without a
    value, and one of ours (``--overwrite``) with one.

    Raises:
        RequestError: a --config without a file, or with an unreadable one.
    """
    flags = flag_paths(config, prefix)
    given = _pairs([underscored(word) for word in words])
    from_files: list[list[str]] = []
    from_line: list[list[str]] = []
    for pair in given:
        if pair[0] == "--config":
            if len(pair) != 2:
                raise RequestError("--config has no file", "--config FILE.yaml")
            from_files += _flags_of(path_of(pair[1]), flags)
        else:
            from_line.append(pair)
    said = {pair[0] for pair in from_line}
    pairs = [pair for pair in from_files if pair[0] not in said] + from_line
    out: list[str] = []
    for flag, *values in pairs:
        if flags.get(flag) in PATHS and values == [""]:  # to pathlib this is the current folder
            raise RequestError(
                f"{flag} is empty", "a folder", "see whether the variable in it is set"
            )
        if flag.endswith("_pp_layers") and len(values) > 1:
            values = ["".join(values)]
        if flags.get(flag) in (bool, MaybeBool):
            values = [value.capitalize() for value in values] or ["True"]
        elif flag in OWN_FLAGS and values[:1] and values[0].lower() == "false":
            continue
        elif flag in OWN_FLAGS and values[:1] and values[0].lower() == "true":
            values = values[1:]
        out += [flag, *values]
    return repeated_joined(out)


def configured(words: list[str]) -> list[str]:
    """A tool's words with the flags of its ``--config`` files."""
    line: list[str] = []
    files: list[list[str]] = []
    rest = iter(words)
    for word in rest:
        flag, _, value = word.partition("=")
        if flag != "--config":
            line.append(word)
            continue
        path = value or next(rest, "")
        if not path:
            raise RequestError("--config has no file", "--config FILE.yaml")
        files += _flags_of(path_of(path), {})
    said = {word.partition("=")[0] for word in line}
    switches: dict[str, list[str] | None] = {"True": [], "False": None}
    for flag, value in files:
        values = switches.get(value, [value])
        if flag not in said and values is not None:
            line += [flag, *values]
    return line


def repeated_joined(words: Sequence[str], flags: Collection[str] = REPEATED) -> list[str]:
    """All occurrences of a repeatable flag as one, with a JSON list; other words untouched."""
    given: dict[str, list[str]] = {}
    out: list[str] = []
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag not in flags:
            out.append(word)
        elif equals:
            given.setdefault(flag, []).append(value)
        else:
            following = next(rest, None)
            if following is None or following.startswith("--"):  # for tyro to refuse
                return [*out, word]
            given.setdefault(flag, []).append(following)
    return out + [word for flag, values in given.items() for word in (flag, json.dumps(values))]


def underscored(word: str) -> str:
    """A word whose flag, if it is one, has _ for -; its value stays."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _pairs(words: Sequence[str]) -> list[list[str]]:
    """Each flag with the words that follow it."""
    pairs: list[list[str]] = []
    for word in words:
        if word.startswith("-") and not word[1:2].isdigit():
            name, equals, value = word.partition("=")
            pairs.append([name, value] if equals else [word])
        elif pairs:
            pairs[-1].append(word)
        else:
            pairs.append([word])
    return pairs


def _flags_of(path: Path, flags: Mapping[str, object]) -> list[list[str]]:
    """The flags that a YAML file stands for: its keys, nested, joined with dots.

    Raises:
        RequestError: it cannot be read, or has a number where a folder is expected.
    """
    found: list[list[str]] = []
    from mmconvert.cli.settings import read_settings  # where there is a --config

    content, lines = read_settings(path, "--config")
    places = {underscored(f"--{key}"): f", line {line}" for key, line in lines.items()}
    for flag, value in _flatten(content):
        where = f"--config {path}{places.get(flag, '')}"
        if flags.get(flag) in PATHS and not isinstance(value, str):
            raise RequestError(
                f"{where}: {flag} is {value!r}, not text",  # 0123 is the number 83 in YAML
                "a folder",
                "put the name in quotes",
            )
        word = json.dumps(value, default=str) if isinstance(value, list) else str(value)
        found.append([FileWord(flag, where), word])
    return found


def placed(error: RequestError, words: Sequence[str]) -> RequestError:
    """An error about a flag of a ``--config`` file, with the file, its line and the flag as key.

    Args:
        words: the command line, with :class:`FileWord` for flags of such files.
    """
    for word in words:
        if isinstance(word, FileWord) and word in error.what.replace(":", " ").split():
            what = error.what.replace(f"there is no flag {word}", f"there is no key {word[2:]}")
            error.what = f"{word.where}: {what.replace(word, word[2:])}"
            error.fix = error.fix.replace("did you mean --", "did you mean ")
    return error


def _flatten(content: Mapping[object, object]) -> Iterator[tuple[str, object]]:
    """Each flag of nested keys with its value; a repeatable flag's values one by one."""
    waiting = [("-", content)]
    for prefix, content in waiting:  # grows while it is read
        for key, value in content.items():
            flag = underscored(f"--{key}" if prefix == "-" else f"{prefix}.{key}")
            if is_dict(value):
                waiting.append((flag, value))
            elif is_array(value) and flag in REPEATED:
                yield from ((flag, item) for item in value)
            elif value is not None:
                yield flag, value

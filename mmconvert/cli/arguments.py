"""The command line's spelling: the reference tool's way of writing flags, brought to tyro's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from mmconvert.cli.parsing import parse
from mmconvert.cli.settings import read_yaml
from mmconvert.config import Folders, MaybeBool, MaybePath, Options, Patterns
from mmconvert.errors import LayoutError, RequestError
from mmconvert.narrow import is_array, is_dict
from mmconvert.sharding.stages import StageGrid, parse_grid, show

REGISTRY = ConstructorRegistry()


@REGISTRY.primitive_rule  # pyright: ignore[reportUnknownMemberType] - open in tyro
def _grid(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """A stage grid is one word: ``[1,10,10,7]`` or ``[[0,1],[4,4]]``."""
    if info.type != StageGrid:  # pyright: ignore[reportUnknownMemberType] - as above
        return None

    def read(words: list[str]) -> StageGrid:
        try:
            return parse_grid(json.loads(words[0]), words[0])
        except (LayoutError, ValueError, RecursionError):
            raise ValueError(
                f"{words[0]} is no list of layer counts such as [1,10,10,7] or [[0,1],[4,4]]"
            ) from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="[INT,...]",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda grid: [show(grid)],
    )


@REGISTRY.primitive_rule  # pyright: ignore[reportUnknownMemberType] - open in tyro
def _patterns(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """The --drop patterns: one word, which ``_repeated_joined`` has made of them all."""
    if info.type != Patterns:  # pyright: ignore[reportUnknownMemberType] - as above
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATTERN",
        instance_from_str=lambda words: Patterns(json.loads(words[0])),
        is_instance=lambda value: isinstance(value, Patterns),
        str_from_instance=lambda patterns: [" ".join(patterns) or "none"],
    )


@REGISTRY.primitive_rule  # pyright: ignore[reportUnknownMemberType] - open in tyro
def _folders(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """The folders of a repeated flag: one word, as of the patterns."""
    if info.type != Folders:  # pyright: ignore[reportUnknownMemberType] - as above
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: Folders(json.loads(words[0])),
        is_instance=lambda value: isinstance(value, Folders),
        str_from_instance=lambda folders: [" ".join(folders) or "none"],
    )


@dataclasses.dataclass(frozen=True)
class Screen:
    """What is shown, and how."""

    json: bool = False
    """Print the result, or the error, as JSON."""
    quiet: bool = False
    """Print nothing but errors (and JSON, if asked for)."""
    debug: bool = False
    """Add the traceback to errors."""


def by_module(flags: object, end: str) -> dict[str, Any]:
    """The values of the flags KEY + ``end`` of a command, by module key."""
    given = {name: value for name, value in vars(flags).items() if name.endswith(end)}
    return {name.removesuffix(end): value for name, value in given.items()}


Plain = TypeVar("Plain")


def read_plain(form: type[Plain], words: Sequence[str], prog: str, description: str) -> Plain:
    """Reads the command line of a tool.

    ``--config FILE.yaml`` stands for the flags in it; flags on the command line win.

    Raises:
        SystemExit: 0, help was printed.
        RequestError: flags that make no sense, an unusable --config.
    """
    given = [_underscored(word) for word in words]
    if "config" not in get_type_hints(form):  # of MindFormers' own scripts
        given = _configured(given)
    return parse(
        tyro.conf.FlagCreatePairsOff[form],
        _repeated_joined(given),
        prog,
        description,
        use_underscores=True,
        registry=REGISTRY,
    )


@dataclasses.dataclass(frozen=True)
class Command:
    """One command line, read."""

    cfg: Any
    options: Any
    screen: Screen


def read(
    config: type,
    words: Sequence[str],
    prog: str,
    description: str,
    *,
    bare: bool = False,
) -> Command:
    """Reads a command line into a config class.

    Args:
        bare: the class's flags have no ``cfg.`` before them.

    Raises:
        SystemExit: 0, help was printed.
        RequestError: flags that make no sense, an unusable --config.
    """
    flat, flags = tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff
    form = dataclasses.make_dataclass(
        "Form",
        [
            ("cfg", Annotated[(config, tyro.conf.FlagConversionOff, *([flat] if bare else []))]),
            ("conversion", Annotated[Options, flat, flags]),
            ("screen", Annotated[Screen, flat, flags]),
        ],
    )
    made = parse(  # pyright: ignore[reportUnknownVariableType] - a class made here
        form,
        normalise(words, config, "-" if bare else "--cfg"),
        prog,
        description,
        use_underscores=True,
        registry=REGISTRY,
        config=(tyro.conf.DisallowNone,),
    )
    found = cast("Any", made)
    return Command(found.cfg, found.conversion, found.screen)


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
    given = _pairs([_underscored(word) for word in words])
    from_files: list[list[str]] = []
    from_line: list[list[str]] = []
    for pair in given:
        if pair[0] == "--config":
            if len(pair) != 2:
                raise RequestError("--config has no file", "--config FILE.yaml")
            from_files += _flags_of(Path(pair[1]), flags)
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
    return _repeated_joined(out)


def _configured(words: list[str]) -> list[str]:
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
        files += _flags_of(Path(path), {})
    said = {word.partition("=")[0] for word in line}
    switches: dict[str, list[str] | None] = {"True": [], "False": None}
    for flag, value in files:
        values = switches.get(value, [value])
        if flag not in said and values is not None:
            line += [flag, *values]
    return line


REPEATED = ("--drop", "--layout", "--cfg.lora_dir")  # flags that may be given several times


def _repeated_joined(words: Sequence[str]) -> list[str]:
    """All occurrences of a repeatable flag as one, with a JSON list; other words untouched."""
    given: dict[str, list[str]] = {}
    out: list[str] = []
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag not in REPEATED:
            out.append(word)
        elif equals:
            given.setdefault(flag, []).append(value)
        else:
            following = next(rest, None)
            if following is None:  # for tyro to refuse
                return [*out, word]
            given.setdefault(flag, []).append(following)
    return out + [word for flag, values in given.items() for word in (flag, json.dumps(values))]


PATHS = (Path, MaybePath)  # types of flags that name a folder

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


def _underscored(word: str) -> str:
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
    for flag, value in _flatten(read_yaml(path, "--config")):
        if flags.get(flag) in PATHS and not isinstance(value, str):
            raise RequestError(
                f"--config {path}: {flag} is {value!r}, no text",  # 0123 is the number 83 in YAML
                "a folder",
                "put the name in quotes",
            )
        word = json.dumps(value, default=str) if isinstance(value, list) else str(value)
        found.append([flag, word])
    return found


def _flatten(content: Mapping[object, object]) -> Iterator[tuple[str, object]]:
    """Each flag of nested keys with its value; a repeatable flag's values one by one."""
    waiting = [("-", content)]
    for prefix, content in waiting:  # grows while it is read
        for key, value in content.items():
            flag = _underscored(f"--{key}" if prefix == "-" else f"{prefix}.{key}")
            if is_dict(value):
                waiting.append((flag, value))
            elif is_array(value) and flag in REPEATED:
                yield from ((flag, item) for item in value)
            elif value is not None:
                yield flag, value

"""A command line, read into dataclasses by tyro."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar, cast, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from mmconvert.cli.parsing import parse
from mmconvert.cli.spelling import configured, normalise, repeated_joined, underscored
from mmconvert.config import Folders, Options, Patterns
from mmconvert.errors import LayoutError
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
    """The --drop patterns: one word, which ``repeated_joined`` has made of them all."""
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
    given = [underscored(word) for word in words]
    if "config" not in get_type_hints(form):  # of MindFormers' own scripts
        given = configured(given)
    return parse(
        tyro.conf.FlagCreatePairsOff[form],
        repeated_joined(given),
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

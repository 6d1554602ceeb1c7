"""A command line, read into dataclasses: here where it is plain, else by tyro."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, TypeVar, get_type_hints

from mmconvert.cli import plain
from mmconvert.cli.spelling import REPEATED, configured, normalise, repeated_joined, underscored
from mmconvert.config import Options


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


def read_plain(
    form: type[Plain],
    words: Sequence[str],
    prog: str,
    description: str,
    repeated: Collection[str] = REPEATED,
) -> Plain:
    """Reads the command line of a tool.

    ``--config FILE.yaml`` stands for the flags in it; flags on the command line win.

    Args:
        repeated: the flags that may be repeated, of which all values count.

    Raises:
        SystemExit: 0, help was printed.
        RequestError: flags that make no sense, an unusable --config.
    """
    given = [underscored(word) for word in words]
    if "config" not in get_type_hints(form):  # of MindFormers' own scripts
        given = configured(given)
    from mmconvert.cli import parsing  # not at the top: it costs a tenth of a second

    return parsing.tool(form, repeated_joined(given, repeated), prog, description)


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
    given = normalise(words, config, "-" if bare else "--cfg")
    parts = (
        plain.FlagPart(config, "--" if bare else "--cfg.", switches=False),
        plain.FlagPart(Options, "--", switches=True),
        plain.FlagPart(Screen, "--", switches=True),
    )
    if (found := plain.read(parts, given)) is not None:
        return Command(*found)
    from mmconvert.cli import parsing  # not at the top: it costs a tenth of a second

    return Command(*parsing.command([part.form for part in parts], given, prog, description, bare))

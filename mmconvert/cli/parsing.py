"""tyro in the words of this program: help without boxes, and complaints in our three lines."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from mmconvert.cli import helptext
from mmconvert.cli.spelling import folders_of, path_of, placed
from mmconvert.config import Folders, Patterns
from mmconvert.errors import LayoutError, RequestError
from mmconvert.sharding.stages import StageGrid, parse_grid, show

FlagsT = TypeVar("FlagsT")
HELP = ("-h", "--help")
FIRST_WORD = re.compile(r"^(An?|The|Folder|File|Number|What)\b")
FLAG = re.compile(r"^ *(--\w[\w.-]*)", re.MULTILINE)


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
                f"{words[0]} is not a list of layer counts; expected: [1,10,10,7], or one list for "
                "each virtual stage"
            ) from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="[INT,...]",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda grid: [show(grid)],
    )


@REGISTRY.primitive_rule  # pyright: ignore[reportUnknownMemberType] - open in tyro
def _path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """A path, ``~`` in it expanded."""
    if info.type != Path:  # pyright: ignore[reportUnknownMemberType] - as above
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: path_of(words[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


def _repeated(kind: type[Patterns | Folders], metavar: str, made: Callable[[str], Any]) -> None:
    """The values of a flag that may be repeated: one word, which ``repeated_joined`` makes of
    them all.

    Args:
        made: the values of that word.
    """

    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        if info.type != kind:  # pyright: ignore[reportUnknownMemberType] - as above
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=metavar,
            instance_from_str=lambda words: made(words[0]),
            is_instance=lambda value: isinstance(value, kind),
            str_from_instance=lambda values: [" ".join(values) or "none"],
        )

    REGISTRY.primitive_rule(rule)  # pyright: ignore[reportUnknownMemberType] - open in tyro


_repeated(Patterns, "PATTERN", lambda word: Patterns(json.loads(word)))
_repeated(Folders, "PATH", folders_of)


def tool(form: type[FlagsT], words: Sequence[str], prog: str, description: str) -> FlagsT:
    """Reads the words of a tool: see :func:`parse`."""
    return parse(tyro.conf.FlagCreatePairsOff[form], words, prog, description)


def command(
    forms: Sequence[type], words: Sequence[str], prog: str, description: str, bare: bool
) -> tuple[Any, Any, Any]:
    """Reads the words of a conversion: see :func:`parse`.

    Args:
        forms: the classes of its request, of the options, and of what is shown.
        bare: the flags of the first one have no ``cfg.`` before them.
    """
    flat, flags = tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff
    config, options, screen = forms
    if bare:
        options = _without(options, {field.name for field in dataclasses.fields(config)})
    form = dataclasses.make_dataclass(
        "Form",
        [
            ("cfg", Annotated[(config, tyro.conf.FlagConversionOff, *([flat] if bare else []))]),
            ("conversion", Annotated[options, flat, flags]),
            ("screen", Annotated[screen, flat, flags]),
        ],
    )
    made = parse(form, words, prog, description, config=(tyro.conf.DisallowNone,))  # pyright: ignore[reportUnknownVariableType] - a class made here
    found = cast("Any", made)
    return found.cfg, found.conversion, found.screen


def _without(form: type, names: set[str]) -> type:
    """A class of flags without those that another has too: these keep their defaults."""
    hints = get_type_hints(form)
    hidden: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(form):
        if field.name in names:  # a name of its own, for tyro looks at that of hidden flags too
            other = tyro.conf.arg(name=f"options.{field.name}")
            kind = Annotated[(hints[field.name], tyro.conf.Fixed, tyro.conf.Suppress, other)]
            hidden.append((field.name, kind, dataclasses.field(default=field.default)))
    return dataclasses.make_dataclass(form.__name__, hidden, bases=(form,), frozen=True)


def parse(
    form: type[FlagsT],
    words: Sequence[str],
    prog: str,
    description: str,
    **more: Any,  # noqa: ANN401 - what tyro takes
) -> FlagsT:
    """Reads words into a dataclass.

    Args:
        more: as ``tyro.cli`` takes them.

    Raises:
        SystemExit: 0, help was printed.
        RequestError: a flag that is not known, missing, or has a value that makes no sense.
    """

    def read(words: Sequence[str]) -> FlagsT:
        told: Any = {"prog": prog, "description": description, "args": words, **more}
        return cast("FlagsT", tyro.cli(form, use_underscores=True, registry=REGISTRY, **told))

    if any(word in HELP for word in words):
        print(helptext.arranged(_help(read), shutil.get_terminal_size().columns))
        raise SystemExit(0)
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint), _columns(10_000):  # to be read again, so never wrapped
            return read(words)
    except SystemExit:
        lines = helptext.unframed(complaint.getvalue())
        said = "\n".join(line for line in lines if not helptext.RULE.match(line))
    raise placed(complaint_of(said, _help(read), prog), words)


@contextmanager
def _columns(width: int) -> Generator[None]:
    """The width of the terminal, as far as tyro is told."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(width)
    try:
        yield
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


def _help(read: Any) -> str:  # noqa: ANN401 - a closure of parse
    """The help in a width in which tyro does not yet lay parts out side by side."""
    shown = io.StringIO()
    with redirect_stdout(shown), suppress(SystemExit), _columns(helptext.WIDTH):
        read([HELP[0]])
    return helptext.unboxed(shown.getvalue()).rstrip()


def complaint_of(said: str, text: str, prog: str) -> RequestError:
    """The error for what tyro has said.

    Args:
        said: its message.
        text: the command's help, which has every flag.
    """
    see = f"see {prog} -h"
    unknown = re.search(r"Unrecognized options:\s+(?:Unrecognized options: )?([^\s,]+)", said)
    if unknown and unknown[1].startswith("-"):
        return _unknown(unknown[1], FLAG.findall(text), see)
    if missing := _listed(said):
        return _missing(missing, see)
    if unknown:
        return RequestError(
            f"{unknown[1]} is one word too many", f"the flags of {prog}, each with its value", see
        )
    valueless = re.search(r"Missing value for argument '(\S+)'", said)
    if valueless:
        name = valueless[1]
        if not name.startswith("-"):
            return RequestError(f"{name.upper()} is missing", "all words of the command", see)
        return RequestError(f"{name} has no value", "a value after it", see)
    choice = re.search(
        r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of \((.*)\)", said
    )
    if choice:
        return RequestError(f"{choice[2]} is {choice[1]!r}", f"one of {choice[3]}", see)
    return _unreadable(said, see)


def _listed(said: str) -> list[tuple[str, str]]:
    """What is missing: names, and below each, further in, what it is."""
    found: list[tuple[str, str]] = []
    lines = said.partition("Missing from ")[2].splitlines()[1:]
    depths = [len(line) - len(line.lstrip()) for line in lines]
    for line, depth in zip(lines, depths, strict=True):
        if depth < depths[0]:
            break
        if depth == depths[0]:
            found.append((line.split()[0], ""))
        else:
            found[-1] = (found[-1][0], f"{found[-1][1]} {line}")
    return found


def _missing(found: list[tuple[str, str]], see: str) -> RequestError:
    """What must be given and is not: all of it, and the first sentence on each."""
    names = [" or ".join(name.strip("{}").split(",")) for name, _ in found]
    abouts = [" ".join(text.split()).removesuffix("(required)").strip() for _, text in found]
    firsts = [about.partition(". ")[0].rstrip(".") for about in abouts]
    firsts = [FIRST_WORD.sub(lambda word: word[0].lower(), first) for first in firsts]
    *others, last = names
    if not others:
        return RequestError(f"{last} is missing", firsts[0], see)
    expected = "; ".join(f"{name}: {first}" for name, first in zip(names, firsts, strict=True))
    return RequestError(f"{', '.join(others)} and {last} are missing", expected, see)


def _unknown(flag: str, known: list[str], see: str) -> RequestError:
    """A flag that is not there: the one that was probably meant."""
    last = flag.lstrip("-").rpartition(".")[2]
    inside = [f for f in known if f.endswith(f".{last}")]
    near = [*inside, *get_close_matches(flag, known, n=1)]
    hint = f"did you mean {near[0]}? " if near else ""
    return RequestError(f"there is no flag {flag}", "a flag of this command", f"{hint}{see}")


def _unreadable(said: str, see: str) -> RequestError:
    """A value of the wrong kind."""
    value = re.search(r"Error parsing (\S+): (.*)", said)
    if not value:
        return RequestError(" ".join(said.split()), "flags with values of the right kind", see)
    flag, why = value.groups()
    reasons = re.findall(r"^\s*- [^:]+: (.*)$", said, re.MULTILINE)
    why = reasons[-1] if reasons else why
    number = re.fullmatch(r"invalid literal for int\(\) with base 10: '(.*)'", why)
    number = number or re.fullmatch(r"could not convert string to float: '(.*)'", why)
    if number:
        return RequestError(f"{flag} is {number[1]!r}", "a number", see)
    why, _, expected = why.partition("; expected: ")
    return RequestError(f"{flag}: {why}", expected or "a value that this flag takes", see)

"""tyro in the words of this program: help without boxes, and complaints in our three lines."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar, cast, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from mmconvert.cli import helptext
from mmconvert.config import Folders, Patterns
from mmconvert.errors import LayoutError, RequestError
from mmconvert.sharding.stages import StageGrid, parse_grid, show

FlagsT = TypeVar("FlagsT")
HELP = ("-h", "--help")
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
                f"{words[0]} is no list of layer counts such as [1,10,10,7] or [[0,1],[4,4]]"
            ) from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="[INT,...]",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda grid: [show(grid)],
    )


def _repeated(kind: type[Patterns | Folders], metavar: str) -> None:
    """The values of a flag that may be repeated: one word, which ``repeated_joined`` makes of
    them all.
    """

    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        if info.type != kind:  # pyright: ignore[reportUnknownMemberType] - as above
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=metavar,
            instance_from_str=lambda words: kind(json.loads(words[0])),
            is_instance=lambda value: isinstance(value, kind),
            str_from_instance=lambda values: [" ".join(values) or "none"],
        )

    REGISTRY.primitive_rule(rule)  # pyright: ignore[reportUnknownMemberType] - open in tyro


_repeated(Patterns, "PATTERN")
_repeated(Folders, "PATH")


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
    raise complaint_of(said, _help(read), prog)


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
    missing = re.search(r"Missing from [^\n]*:\s+(\S+)[^\n]*\n\s*([^\n]*)", said)
    if missing:
        about = missing[2].removesuffix("(required)").strip()
        return RequestError(f"{missing[1]} is missing", about.rstrip("."), see)
    if unknown:
        return RequestError(f"{unknown[1]} is one word too many", f"what {prog} takes", see)
    valueless = re.search(r"Missing value for argument '(\S+)'", said)
    if valueless:
        name = valueless[1] if valueless[1].startswith("-") else valueless[1].upper()
        return RequestError(f"{name} has no value", "one behind it", see)
    choice = re.search(
        r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of \((.*)\)", said
    )
    if choice:
        return RequestError(f"{choice[2]} is {choice[1]!r}", f"one of {choice[3]}", see)
    return _unreadable(said, see)


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
        return RequestError(" ".join(said.split()), "flags that make sense", see)
    flag, why = value.groups()
    reasons = re.findall(r"^\s*- [^:]+: (.*)$", said, re.MULTILINE)
    why = reasons[-1] if reasons else why
    number = re.fullmatch(r"invalid literal for int\(\) with base 10: '(.*)'", why)
    number = number or re.fullmatch(r"could not convert string to float: '(.*)'", why)
    if number:
        return RequestError(f"{flag} is {number[1]!r}", "a number", see)
    return RequestError(f"{flag}: {why}", "a value that it can have", see)

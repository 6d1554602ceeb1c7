"""The commands ``CONVERTER VERB``: one conversion each."""

from __future__ import annotations

import json
from dataclasses import field, make_dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mmconvert.cli.arguments import Command, Screen, read
from mmconvert.cli.commands import AUTO, MS_VERBS, VERBS, verbs_of
from mmconvert.cli.screen import print_lines, screen_events
from mmconvert.cli.spelling import normalise, path_of
from mmconvert.config import OptionalHFConfig
from mmconvert.executor import group
from mmconvert.names import number
from mmconvert.words import amount

if TYPE_CHECKING:
    from mmconvert.config import Options
    from mmconvert.converters.family import Family
    from mmconvert.events import Events
    from mmconvert.result import Result


class Direction(Protocol):
    """One of ``directions``."""

    def __call__(self, family: Family, cfg: Any, options: Options, events: Events) -> Result:  # noqa: ANN401 - of the verb's class
        """Runs it."""
        ...


def convert(converter: str, verb: str, flags: list[str]) -> int:
    """Runs one conversion."""
    form, text, example = _form(converter, verb, flags)
    module, _, name = form.partition(".")
    at = "mmconvert.config" if module == "mm" else f"mmconvert.config.{module}"
    prog = f"mm-convert {converter} {verb}"
    about = f"{text}.\n\nexample:\n  {prog} {example}"
    command = read(getattr(import_module(at), name), flags, prog, about)
    run(converter, module, verb, command)
    return 0


def _form(converter: str, verb: str, flags: list[str]) -> tuple[str, str, str]:
    """The class of a verb's flags, what it does, an example. Of ``resplit``, which two kinds of
    checkpoints have, AutoConverter takes the one that fits the source.
    """
    if (converter, verb) == (AUTO, "resplit"):
        from mmconvert.config.mindspore import MSResplit
        from mmconvert.formats.registry import recognise

        words = normalise(flags, MSResplit)
        given = dict(pairwise(words))
        given |= {
            flag: value for flag, _, value in (word.partition("=") for word in words) if value
        }
        source = path_of(given.get("--cfg.source_dir", ""))
        if source.suffix == ".ckpt" or recognise(source) == "ms":
            return MS_VERBS[verb]
        form, text, example = VERBS[verb]
        return form, f"{text}; --cfg.source_dir X.ckpt -h shows the flags for MindSpore", example
    return verbs_of(converter)[verb]


def between(converter: str, verb: str, formats: tuple[str, str], flags: list[str]) -> int:
    """Runs a conversion from or to a format of another package."""
    from mmconvert.formats.registry import load

    reader, writer = map(load, formats)
    form = make_dataclass(
        "Direction",
        [
            ("source", Path),
            ("target", Path),
            ("hf_config", OptionalHFConfig, field(default_factory=OptionalHFConfig)),
            ("source_layout", reader.Layout, field(default_factory=reader.Layout)),
            ("target_layout", writer.Layout, field(default_factory=writer.Layout)),
        ],
        frozen=True,
    )
    prog = f"mm-convert {converter} {verb}"
    command = read(form, flags, prog, f"{reader.title} -> {writer.title}.")
    from mmconvert import convert, directions

    def conversion(family: Family, cfg: object, options: Options, events: Events) -> Result:
        return convert.convert(family, directions.between(verb, cfg), options, events)

    _run(converter, verb, command, conversion)
    return 0


def run(converter: str, module: str, verb: str, command: Command) -> None:
    """Runs a verb of a module of ``directions``, and shows what came of it."""
    # Not before the flags are understood: help need not pay for it.
    directions = import_module(f"mmconvert.directions.{module}")
    _run(converter, verb, command, getattr(directions, verb))


def _run(converter: str, verb: str, command: Command, conversion: Direction) -> None:
    from mmconvert import converters

    if converter != AUTO:
        family = converters.load(converter)
    else:
        from mmconvert.formats.recognise import family_of

        family = family_of(*_inputs(verb, command.cfg), naming="mm" if _lora(verb) else "")
    with screen_events(quiet=command.screen.quiet) as events:
        result = conversion(family, command.cfg, command.options, events)
    show(verb, result, command.screen)


def _lora(verb: str) -> bool:
    return verb.startswith("lora_")


def show(verb: str, result: Result, screen: Screen) -> None:
    """Shows what came of a conversion; of several processes the first one does."""
    if not group.current().leads:
        return
    if screen.json:
        print(json.dumps(result.as_dict()))
    elif not screen.quiet:
        if result.estimate is not None:
            from mmconvert.cli.dry_run import preview

            print_lines(preview(result))
        print_lines(_summary(verb, result))


def _inputs(verb: str, cfg: Any) -> list[Path]:  # noqa: ANN401 - one of many dataclasses
    """The input folders of a request, that of the original model first."""
    if _lora(verb):
        from mmconvert.directions import lora

        return lora.inputs(cfg)
    names = {"hf": ("source",), "dcp": ("source", "dcp_dir")}.get(
        verb.partition("_to_")[0], ("mm_dir", "ms_path", "source_dir", "source")
    )
    paths = [cfg.hf_config.hf_dir, *(getattr(cfg, name, None) for name in names)]
    return [path for path in paths if path is not None]


def _summary(verb: str, result: Result) -> list[str]:
    done = "would write" if not result.written else "wrote"
    size = result.plan.nbytes
    moved = size - result.moved.resumed
    rate = f", {amount(moved / result.seconds)}/s" if result.written else ""
    where = "from" if verb.endswith("_to_hf") else "layout"
    layout = [] if verb == "moe_expert" else [f"{where}: {result.layout.describe()}"]
    copies = number(result.plan.copies, "copy writes", "copies write")
    return [
        f"{done} {result.output}: {number(result.plan.targets, 'tensor')}, {amount(size)} in "
        f"{result.seconds:.2f} s{rate}",
        *layout,
        f"proven: {copies} every byte once and "
        f"{'uses' if len(result.plan.copies) == 1 else 'use'} every source",
    ]

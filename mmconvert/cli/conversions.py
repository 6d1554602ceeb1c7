"""The commands ``CONVERTER VERB``: one conversion each."""

from __future__ import annotations

import json
from dataclasses import field, make_dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmconvert import config, msconfig
from mmconvert.cli.arguments import Command, Screen, read
from mmconvert.cli.commands import AUTO, DCP_VERBS, MS_VERBS, VERBS, verbs_of
from mmconvert.cli.screen import print_lines, screen_events
from mmconvert.cli.spelling import normalise
from mmconvert.config import OptionalHFConfig
from mmconvert.names import number
from mmconvert.words import amount

if TYPE_CHECKING:
    from mmconvert.result import Result


def convert(converter: str, verb: str, flags: list[str]) -> int:
    """Runs one conversion."""
    form, text, example = _form(converter, verb, flags)
    prog = f"mm-convert {converter} {verb}"
    command = read(_class(form), flags, prog, f"{text}.\n\nexample:\n  {prog} {example}")
    run(converter, verb, command)
    return 0


def _class(form: str) -> type:
    if form.startswith("Lora"):
        from mmconvert import loraconfig

        return getattr(loraconfig, form)
    return getattr(msconfig if hasattr(msconfig, form) else config, form)


def _form(converter: str, verb: str, flags: list[str]) -> tuple[str, str, str]:
    """The class of a verb's flags, what it does, an example. Of ``resplit``, which two kinds of
    checkpoints have, AutoConverter takes the one that fits the source.
    """
    if (converter, verb) == (AUTO, "resplit"):
        from mmconvert.formats.registry import recognise

        words = normalise(flags, msconfig.MSResplit)
        given = dict(pairwise(words))
        given |= {
            flag: value for flag, _, value in (word.partition("=") for word in words) if value
        }
        source = Path(given.get("--cfg.source_dir", ""))
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
        "Conversion",
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
    run(converter, verb, command)
    return 0


def run(converter: str, verb: str, command: Command) -> None:
    """Runs a conversion that has been read, and shows what came of it."""
    show(verb, _converted(converter, verb, command), command.screen)


def show(verb: str, result: Result, screen: Screen) -> None:
    """Shows what came of a conversion."""
    if screen.json:
        print(json.dumps(result.as_dict()))
    elif not screen.quiet:
        if result.estimate is not None:
            from mmconvert.cli.dry_run import preview

            print_lines(preview(result))
        print_lines(_summary(verb, result))


def _converted(converter: str, verb: str, command: Command) -> Result:
    # Not before the flags are understood: help need not pay for it.
    from mmconvert import convert, converters, directions
    from mmconvert.executor import group
    from mmconvert.formats.recognise import family_of

    if verb.startswith("lora_"):
        return _of_adapter(converter, verb, command)
    directions_of = {
        "hf_to_mm": directions.hf_to_mm,
        "mm_to_hf": directions.mm_to_hf,
        "hf_to_ms": directions.hf_to_ms,
        "ms_to_hf": directions.ms_to_hf,
        "resplit": directions.resplit,
        "hf_to_mm_dcp": directions.hf_to_mm_dcp,
    }
    inputs = _inputs(command.cfg)
    family = family_of(*inputs, naming="") if converter == AUTO else converters.load(converter)
    with screen_events(quiet=command.screen.quiet or not group.current().leads) as events:
        if verb in directions_of:
            return directions_of[verb](family, command.cfg, command.options, events)
        if verb in DCP_VERBS:
            return directions.with_dcp(family, verb, command.cfg, command.options, events)
        asked = directions.between(verb, command.cfg)
        return convert.convert(family, asked, command.options, events)


def _of_adapter(converter: str, verb: str, command: Command) -> Result:
    """Runs a conversion or a merge of adapters."""
    from mmconvert import converters, lora
    from mmconvert.executor import group
    from mmconvert.formats.recognise import family_of

    inputs = lora.inputs(command.cfg)
    family = family_of(*inputs) if converter == AUTO else converters.load(converter)
    with screen_events(quiet=command.screen.quiet or not group.current().leads) as events:
        return getattr(lora, verb)(family, command.cfg, command.options, events)


def _inputs(cfg: Any) -> list[Path]:  # noqa: ANN401 - one of many dataclasses
    """The input folders of a request, that of the original model first."""
    names = ("mm_dir", "ms_path", "source_dir", "source")
    if isinstance(cfg, (config.HFToMM, msconfig.HFToMS, config.HFToDCP)):
        names = ()
    elif isinstance(cfg, (config.DCPToMM, config.DCPToHF)):
        names = ("dcp_dir",)
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

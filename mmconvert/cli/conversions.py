"""The commands ``CONVERTER VERB``: one conversion each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from mmconvert import config
from mmconvert.cli import AUTO, verbs_of
from mmconvert.cli.arguments import Command, read
from mmconvert.cli.screen import screen_events
from mmconvert.config import HFToMM, MMToHF, Resplit
from mmconvert.words import amount

if TYPE_CHECKING:
    from mmconvert.result import Result


def convert(converter: str, verb: str, flags: list[str]) -> int:
    """Runs one conversion."""
    form, text, example = verbs_of(converter)[verb]
    prog = f"mm-convert {converter} {verb}"
    command = read(getattr(config, form), flags, prog, f"{text}.\n\nexample:\n  {prog} {example}")
    run(converter, verb, command)
    return 0


def run(converter: str, verb: str, command: Command) -> None:
    """Runs a conversion that has been read, and shows what came of it."""
    result, screen = _converted(converter, verb, command), command.screen
    if screen.json:
        print(json.dumps(result.as_dict()))
    elif not screen.quiet:
        if result.estimate is not None:
            from mmconvert.cli.dry_run import preview

            print(preview(result))
        print(_summary(verb, result))


def _converted(converter: str, verb: str, command: Command) -> Result:
    # Not before the flags are understood: help need not pay for it.
    from mmconvert import convert as directions
    from mmconvert import converters
    from mmconvert.executor import group
    from mmconvert.formats.recognise import family_of

    direction = {
        "hf_to_mm": directions.hf_to_mm,
        "mm_to_hf": directions.mm_to_hf,
        "hf_to_ms": directions.hf_to_ms,
        "ms_to_hf": directions.ms_to_hf,
        "resplit": directions.resplit,
    }[verb]
    auto = converter == AUTO
    family = family_of(*_inputs(command.cfg)) if auto else converters.load(converter)
    with screen_events(quiet=command.screen.quiet or not group.current().leads) as events:
        return direction(family, command.cfg, command.options, events)


def _inputs(cfg: object) -> list[Path]:
    """The input folders of a request, that of the original model first."""
    if isinstance(cfg, Resplit):
        return [path for path in (cfg.hf_config.hf_dir, cfg.source_dir) if path is not None]
    if isinstance(cfg, (HFToMM, MMToHF)):
        return [cfg.hf_config.hf_dir]
    raise TypeError(f"no conversion request: {cfg!r}")


def _summary(verb: str, result: Result) -> str:
    done = "would write" if not result.written else "wrote"
    size = result.plan.nbytes
    moved = size - result.moved.resumed
    rate = f", {amount(moved / result.seconds)}/s" if result.written else ""
    where = "from" if verb in ("mm_to_hf", "ms_to_hf") else "layout"
    return (
        f"{done} {result.output}: {len(result.plan.targets)} tensors, {amount(size)} in "
        f"{result.seconds:.2f} s{rate}\n{where}: {result.layout.describe()}\n"
        f"proven: {len(result.plan.copies)} copies write every byte once and use every source"
    )

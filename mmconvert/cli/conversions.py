"""The commands ``CONVERTER hf_to_mm``, ``mm_to_hf`` and ``resplit``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from mmconvert import config
from mmconvert.cli import AUTO, VERBS
from mmconvert.cli.arguments import Command, Screen, read
from mmconvert.cli.screen import screen_events
from mmconvert.config import HFToMM, MMToHF, Resplit
from mmconvert.words import amount

if TYPE_CHECKING:
    from mmconvert.result import Result


def convert(converter: str, verb: str, flags: list[str]) -> int:
    """Runs one conversion."""
    form, text, example = VERBS[verb]
    prog = f"mm-convert {converter} {verb}"
    command = read(getattr(config, form), flags, prog, f"{text}.\n\nexample:\n  {prog} {example}")
    result = _run(converter, verb, command)
    show(verb, result, command.screen)
    return 0


def show(verb: str, result: Result, screen: Screen) -> None:
    """Prints what a conversion did, or would do."""
    if screen.json:
        print(json.dumps(result.as_dict()))
    elif not screen.quiet:
        if result.estimate is not None:
            from mmconvert.cli.dry_run import preview

            print(preview(result))
        print(_summary(verb, result))


def _run(converter: str, verb: str, command: Command) -> Result:
    # Not before the flags are understood: help need not pay for it.
    from mmconvert import convert as directions
    from mmconvert import converters
    from mmconvert.executor import group
    from mmconvert.formats.recognise import family_of

    direction = {
        "hf_to_mm": directions.hf_to_mm,
        "mm_to_hf": directions.mm_to_hf,
        "resplit": directions.reshard,
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

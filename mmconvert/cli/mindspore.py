"""The commands ``CONVERTER hf_to_ms``, ``ms_to_hf`` and ``resplit`` of MindSpore's converters."""

from __future__ import annotations

from mmconvert import config_ms
from mmconvert.cli import MS_VERBS
from mmconvert.cli.arguments import Command, read
from mmconvert.cli.conversions import show
from mmconvert.cli.screen import screen_events
from mmconvert.config_ms import MSOptions


def convert(converter: str, verb: str, flags: list[str]) -> int:
    """Runs one conversion."""
    form, text, example = MS_VERBS[verb]
    prog = f"mm-convert {converter} {verb}"
    about = f"{text}.\n\nexample:\n  {prog} {example}"
    run(converter, verb, read(getattr(config_ms, form), flags, prog, about, MSOptions))
    return 0


def run(converter: str, verb: str, command: Command) -> None:
    """Runs a conversion that has been read, and shows what came of it."""
    # Not before the flags are understood: help need not pay for it.
    from mmconvert import convert_ms, converters
    from mmconvert.executor import group

    direction = {
        "hf_to_ms": convert_ms.hf_to_ms,
        "ms_to_hf": convert_ms.ms_to_hf,
        "resplit": convert_ms.reshard_ms,
    }[verb]
    family = converters.load_ms(converter)
    screen = command.screen
    with screen_events(quiet=screen.quiet or not group.current().leads) as events:
        result = direction(family, command.cfg, command.options, events)
    show(verb, result, screen)

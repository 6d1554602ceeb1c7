"""How a command line ends otherwise than well: its message, its exit code, its signals."""

from __future__ import annotations

import atexit
import errno
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from mmconvert.cli import screen
from mmconvert.errors import (
    CheckpointError,
    DatasetError,
    DifferenceError,
    Interrupted,
    MMConvertError,
    OutputError,
    RequestError,
)
from mmconvert.executor import group
from mmconvert.words import one_line

INTERRUPTED = 130
CLOSED_PIPE = 141  # what a shell says of a program that SIGPIPE ends: 128 + 13


def terminated(signum: int, frame: object) -> NoReturn:
    """Handles SIGTERM as Ctrl-C is handled."""
    raise KeyboardInterrupt


def heed_no_more() -> None:
    """From here on signals interrupt nothing: the end is being told, or is there already.

    Where nobody reads what is told, it would never end: after one more second it does.
    """

    def hasten(signum: int, frame: object) -> None:
        if not hasattr(signal, "SIGALRM"):  # Windows
            os._exit(INTERRUPTED)
        signal.signal(signal.SIGALRM, lambda signum, frame: os._exit(INTERRUPTED))
        signal.alarm(1)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, hasten)
    atexit.register(_told)


def _told() -> None:
    """All is told: what is left is the interpreter's end, which has no handlers of ours, so that
    a signal, or the alarm, would change the exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):
        signal.alarm(0)


def interrupted(stop: KeyboardInterrupt, words: Sequence[str]) -> int:
    """Says that the command was interrupted, and how to go on."""
    heed_no_more()
    what, fix = (stop.what, stop.fix) if isinstance(stop, Interrupted) else ("interrupted", "")
    if asked(words, "--json") and group.current().leads:
        told = {
            "error": "Interrupted",
            "what": what,
            "expected": "a command that runs to its end",
            "fix": fix or "run the command again",
            "exit_code": INTERRUPTED,
        }
        print(json.dumps(told))
    screen.say(f"{what}; {fix}" if fix else what)
    return INTERRUPTED


class InternalError(MMConvertError):
    """A fault of mmconvert itself."""

    exit_code = 70

    def __init__(self, what: str) -> None:
        super().__init__(
            f"a fault of mmconvert itself: {what}",
            "no such fault; an output under its final name is complete",
            "run again with --debug and report what it prints",
        )


def fail(error: MMConvertError, words: Sequence[str]) -> int:
    """Says what went wrong; returns the exit code."""
    error.fix = error.fix or _way_out(error, words)
    if asked(words, "--debug"):
        import traceback

        traceback.print_exc()
    if asked(words, "--json") and group.current().leads:
        print(json.dumps(error.as_dict()))
    # Names in messages come from files. A terminal must not obey what is in them.
    first, *rest = map(one_line, error.lines())
    screen.say("\n".join([f"error: {first}", *("  " + line for line in rest)]))
    return error.exit_code


def _way_out(error: MMConvertError, words: Sequence[str]) -> str:
    """What can always be done about an error that has no way out of its own."""
    if error.what.endswith(os.strerror(errno.ENOENT)):
        return "check the path"
    told = [word for word in words[:2] if not word.startswith("-")]
    if isinstance(error, CheckpointError) and told[:1] != ["doctor"]:
        return "mm-convert doctor PATH examines a whole checkpoint"
    if isinstance(error, DifferenceError):
        return "mm-convert diff A B shows how far apart they are"
    if isinstance(error, DatasetError):
        return "correct the file"
    verb = told[1:] if told[:1] and told[0].endswith("Converter") else []
    return f"see {' '.join(['mm-convert', *told[:1], *verb])} -h"


def failed_output(error: OSError) -> MMConvertError:
    """Files' errors are MMConvertErrors: one without a file's name is the standard output's."""
    if error.filename is not None:
        return _unusable(error)
    screen.abandon(sys.stdout)
    return _unprinted(error)


def _unusable(error: OSError) -> RequestError:
    """What the system says of a path that no other part of the program has looked at before."""
    return RequestError(
        f"{os.fsdecode(error.filename)}: {error.strerror or error}",  # pyright: ignore[reportArgumentType]
        "a path that the system can use",
    )


def _unprinted(error: OSError) -> OutputError:
    return OutputError(
        f"the result could not be printed: {error.strerror or error}",
        "a standard output that can be written; what the command was to write to files is there",
        "free some space, or send the output elsewhere",
    )


def asked(words: Sequence[str], flag: str) -> bool:
    """Whether one of our own flags is set, in any of its spellings, a --config file included."""
    from mmconvert.cli.spelling import normalise
    from mmconvert.config import HFToMM

    try:
        return flag in normalise(words, HFToMM)
    except MMConvertError:
        return flag in words

"""The command ``mm-convert``: the only place that prints or exits.

This file reads the first words of a command line; flags and work are imported when needed, so
that help is fast.
"""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Iterable, Sequence

from mmconvert.cli import commands, ending, screen
from mmconvert.errors import MMConvertError, RequestError
from mmconvert.executor import group, ranks
from mmconvert.version import VERSION

# Plans are millions of small tuples, none of them garbage: looking for some took a third of the
# time of a large plan.
SELDOM = (100_000, 50, 50)


def main(argv: Sequence[str] | None = None, *, launched: bool = False) -> int:
    """Runs one command line; returns the exit code (see the error tree).

    Args:
        launched: whether torchrun may have started this process as one of several.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    thresholds = gc.get_threshold()
    signal.signal(signal.SIGTERM, ending.terminated)
    screen.prepare()
    try:
        if _tool_of(words) not in commands.RUNTIME:
            gc.set_threshold(*SELDOM)
        group.expect(_ranks(words, launched=launched))
        return _guarded(words)
    except MMConvertError as error:  # of a launcher's variables
        return ending.fail(error, words)
    finally:
        gc.set_threshold(*thresholds)
        group.leave()
        group.expect(ranks.ALONE)  # what a program calls after this command is not part of it
        if argv is None:
            gc.freeze()  # the process ends, and all it holds with it


def _tool_of(words: list[str]) -> str:
    return _of_script(words)[0] if words else "--help"


def _ranks(words: list[str], *, launched: bool) -> ranks.Ranks:
    """Which of several processes this one is, as far as a launcher's variables tell."""
    tool = _tool_of(words)
    if tool in commands.RUNTIME:
        return ranks.ALONE
    found = ranks.of_environment(launched=launched)
    if tool not in commands.TOOLS or tool in commands.CONVERTING:
        return found
    if found.size > 1 and found.certain:
        raise RequestError(
            f"mm-convert {tool} runs in one process",
            "torchrun with a conversion only",
            "run it without torchrun",
        )
    return ranks.ALONE


def _guarded(words: list[str]) -> int:
    """Runs one command line; whatever goes wrong becomes a message and an exit code."""
    try:
        try:
            return _reported(words)
        finally:
            ending.heed_no_more()
    except KeyboardInterrupt:  # while something else was being told
        screen.say("interrupted")
        return ending.INTERRUPTED


def _reported(words: list[str]) -> int:
    try:
        code = _dispatch(words)
        _note_broken(words)
        sys.stdout.flush()  # here and not when Python ends, where a full disk is exit code 120
        return code
    except MMConvertError as error:
        return ending.fail(error, words)
    except SystemExit as stop:  # help has been shown
        return stop.code if isinstance(stop.code, int) else RequestError.exit_code
    except KeyboardInterrupt as stop:  # whoever was writing says what is left, and nobody else
        return ending.interrupted(stop, words)
    except BrokenPipeError:  # the reader of our output went away
        screen.abandon(sys.stdout)
        return ending.CLOSED_PIPE
    except OSError as error:
        return ending.fail(ending.failed_output(error), words)
    except MemoryError:
        return ending.fail(
            MMConvertError("out of memory", "a few hundred MiB of free memory"), words
        )
    except Exception as error:  # the last line of defence: named, never a bare traceback
        before = error.__context__
        if isinstance(before, KeyboardInterrupt):  # a pool that it had ended, and the like
            return ending.interrupted(before, words)
        return ending.fail(ending.InternalError(f"{type(error).__name__}: {error}"), words)


def _note_broken(words: Sequence[str]) -> None:
    """Families of other packages that a search has left out, though nobody asked for them."""
    from mmconvert.converters import BROKEN

    if BROKEN and not ending.asked(words, "--quiet"):
        for what in BROKEN.values():
            screen.say(screen.labelled(f"left out: {what}"))


def _dispatch(words: list[str]) -> int:
    from mmconvert.converters import BUILT_IN, MINDSPORE, REFUSED, converter_names

    if words[:1] == ["--version"]:
        print(f"mm-convert {VERSION}")
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(commands.top_help([commands.AUTO, *converter_names()], list(MINDSPORE)))
        return 0 if words else 2
    converter, *rest = _of_script(words)
    if converter in commands.TOOLS:
        return _tool(converter, rest)
    if converter in (*commands.DCP_CONVERTERS, *commands.DCP_SCRIPTS):
        from mmconvert.cli import dcp

        return dcp.run(converter, rest)
    # Installed packages are searched for converters only when none of ours is meant: it is slow.
    own = (commands.AUTO, *BUILT_IN, *MINDSPORE)
    if converter not in own and converter not in converter_names():
        if converter in REFUSED:
            raise RequestError(*REFUSED[converter])
        raise _unknown_command(converter, [*own, *converter_names(), *commands.DCP_CONVERTERS])
    if not rest or rest[0] in ("-h", "--help"):
        print(commands.converter_help(converter))
        return 0 if rest else 2
    verb, flags = rest[0], rest[1:]
    verbs = commands.verbs_of(converter)
    from mmconvert.cli.conversions import between, convert

    if verb in verbs:
        return convert(converter, verb, flags)
    if (formats := _formats_of(verb)) is None:
        raise RequestError(
            f"there is no verb {verb!r}",
            f"one of {', '.join(verbs)}",
            f"{_meant(verb, verbs)}see mm-convert {converter} -h",
        )
    return between(converter, verb, formats, flags)


def _of_script(words: list[str]) -> list[str]:
    """The words, in which mm-convert may stand for python before a script or -m and a module."""
    if words[0] == "-m" and len(words) > 1:
        words = words[1:]
    name, _, suffix = words[0].rpartition(".")
    script = name.rpartition("/")[2] if suffix in ("py", "sh") else words[0]
    return [*commands.SCRIPTS.get(script, words[:1]), *words[1:]]


def _formats_of(verb: str) -> tuple[str, str] | None:
    """The formats that a verb such as hf_to_npy goes between; None if it is no such verb, or one
    between our own, which have verbs of their own.
    """
    from mmconvert.formats.registry import names

    first, _, second = verb.partition("_to_")
    known = names()
    own = verb in commands.NAMED or "peft" in (first, second)
    if first in known and second in known and not own and (first != second or first == "dcp"):
        return first, second
    return None


def _tool(name: str, words: list[str]) -> int:
    from importlib import import_module

    return import_module(f"mmconvert.cli.tools.{name}").run(words)


def _unknown_command(word: str, converters: list[str]) -> RequestError:
    """The first word is no converter and no tool: what was probably meant."""
    if word in commands.VERBS:
        fix = f"put a converter before it: mm-convert {commands.AUTO} {word} takes any family"
        return RequestError(f"{word} is a verb of the converters", "a converter or a tool", fix)
    kind = "converter" if word.endswith("Converter") else "command"
    expected = f"one of {', '.join(sorted(set(converters)))}"
    known = [*converters, *commands.TOOLS, "--help", "--version"]
    return RequestError(
        f"there is no {kind} {word!r}",
        expected if kind == "converter" else "a converter or a tool",
        f"{_meant(word, known)}see mm-convert -h",
    )


def _meant(word: str, known: Iterable[str]) -> str:
    """A question after the name that is most like a word, whatever their cases; "" if none is."""
    plain = {name.lower().strip("-"): name for name in known}
    plain |= {name.removesuffix("converter"): full for name, full in plain.items()}
    from difflib import get_close_matches

    near = get_close_matches(word.lower().strip("-"), plain, n=1)
    return f"did you mean {plain[near[0]]}? " if near else ""

"""The command ``mm-convert``: the only file that prints or exits."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mmconvert.errors import MMConvertError
from mmconvert.version import VERSION

if TYPE_CHECKING:  # costs start-up time that --help should not pay
    from mmconvert.arguments import Command
    from mmconvert.convert import Result

AUTO = "AutoConverter"  # the family is told by the checkpoint
DIFFERENT, INTERRUPTED = 1, 130
SHOWN = 5  # differences that verify prints

LAYOUT = "--cfg.parallel_config.llm_pp_layers [12,16] --cfg.parallel_config.vit_pp_layers [32,0]"
VERBS = {
    "hf_to_mm": (
        "HFToMM",
        "Hugging Face -> MM: before training",
        "--cfg.hf_config.hf_dir HF_DIR --cfg.mm_dir MM_DIR "
        f"{LAYOUT} --cfg.parallel_config.tp_size 2",
    ),
    "mm_to_hf": (
        "MMToHF",
        "MM -> Hugging Face: after training; the layout is read off the folder",
        "--cfg.mm_dir MM_DIR --cfg.hf_config.hf_dir HF_DIR --cfg.save_hf_dir NEW_HF_DIR",
    ),
    "resplit": (
        "Resplit",
        "MM -> MM in another parallel layout",
        "--cfg.source_dir MM_DIR --cfg.target_dir NEW_MM_DIR "
        "--cfg.target_parallel_config.llm_pp_layers [28] "
        "--cfg.target_parallel_config.vit_pp_layers [32]",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit code (see the error tree)."""
    words = list(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        return _dispatch(words)
    except MMConvertError as error:
        return _fail(error, words)
    except KeyboardInterrupt:
        print("interrupted: nothing was left under the final name", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError:
        return _fail(MMConvertError("out of memory", "a few hundred MiB of free memory"), words)


def _terminated(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _fail(error: MMConvertError, words: Sequence[str]) -> int:
    if "--debug" in words:
        traceback.print_exc()
    if "--json" in words:
        print(json.dumps(error.as_dict()))
    first, *rest = error.lines()
    print("\n".join([f"error: {first}", *("  " + line for line in rest)]), file=sys.stderr)
    return error.exit_code


def _dispatch(words: list[str]) -> int:
    from mmconvert.converters import converter_names

    if words[:1] == ["--version"]:
        print(f"mm-convert {VERSION}")
        return 0
    names = [AUTO, *converter_names()]
    if not words or words[0] in ("-h", "--help"):
        print(_top_help(names))
        return 0 if words else 2
    converter, rest = words[0], words[1:]
    if converter == "verify":
        return _verify(rest)
    if converter not in names:
        return _unknown("converter", converter, [*names, "verify"], "mm-convert -h")
    if not rest or rest[0] in ("-h", "--help"):
        print(_converter_help(converter))
        return 0 if rest else 2
    verb, flags = rest[0], rest[1:]
    if verb not in VERBS:
        return _unknown("verb", verb, list(VERBS), f"mm-convert {converter} -h")
    return _convert(converter, verb, flags)


def _unknown(kind: str, word: str, known: list[str], help_command: str) -> int:
    near = get_close_matches(word, known, n=1, cutoff=0.4)
    print(f"error: there is no {kind} {word!r}", file=sys.stderr)
    print(f"  wanted: one of {', '.join(known)}", file=sys.stderr)
    hint = f"did you mean {near[0]}? " if near else ""
    print(f"  to fix: {hint}see {help_command}", file=sys.stderr)
    return 2


def _top_help(names: list[str]) -> str:
    verbs = "\n".join(f"  {verb:<10} {text}" for verb, (_, text, _) in VERBS.items())
    about = {AUTO: "   the family that config.json or the MM checkpoint tells"}
    converters = "\n".join(f"  {name}{about.get(name, '')}" for name in names)
    return f"""usage: mm-convert CONVERTER VERB [flags]
       mm-convert verify A B

Moves multimodal checkpoints between Hugging Face and MM format, and from any parallel
layout to any other: complete or not at all, in bounded memory, without torch or an NPU.

converters:
{converters}

verbs:
{verbs}

verify A B compares two checkpoints, Hugging Face or MM, in any two layouts.

mm-convert CONVERTER VERB -h shows the flags. Exit codes: 0 done, 1 a comparison differs,
2 the request is impossible, 3 a checkpoint is missing or damaged, 130 interrupted.

example:
  mm-convert Qwen2VLConverter hf_to_mm {VERBS["hf_to_mm"][2]}"""


def _converter_help(converter: str) -> str:
    lines = [f"usage: mm-convert {converter} VERB [flags]", "", "verbs and an example of each:"]
    for verb, (_, text, example) in VERBS.items():
        lines += [f"  {verb:<10} {text}", f"             mm-convert {converter} {verb} {example}"]
    return "\n".join([*lines, "", f"mm-convert {converter} VERB -h shows the flags."])


def _convert(converter: str, verb: str, flags: list[str]) -> int:
    from mmconvert import config
    from mmconvert.arguments import read

    form, text, example = VERBS[verb]
    prog = f"mm-convert {converter} {verb}"
    command = read(getattr(config, form), flags, prog, f"{text}.\n\nexample:\n  {prog} {example}")
    result = _run(converter, verb, command)
    if command.screen.json:
        print(json.dumps(result.as_dict()))
    elif not command.screen.quiet:
        print(_summary(verb, result))
    return 0


def _verify(words: list[str]) -> int:
    from mmconvert import compare
    from mmconvert.arguments import read_pair
    from mmconvert.config import Options
    from mmconvert.progress import screen_events
    from mmconvert.verify import verify

    text = "Are two checkpoints the same model? Exit code 0 if so, 1 if not."
    prog = "mm-convert verify"
    pair = read_pair(words, prog, f"{text}\n\nexample:\n  {prog} HF_DIR MM_DIR")
    with screen_events(quiet=pair.quiet) as events:
        verdict = verify(pair.a, pair.b, Options(workers=pair.workers), events)
    found = [compare.as_dict(d) for d in verdict.differences]
    if pair.json:
        print(json.dumps({"equal": not found, "tensors": verdict.tensors, "differences": found}))
    elif not pair.quiet:
        if not found:
            size = amount(verdict.nbytes)
            print(f"equal: {verdict.tensors} tensors, {size} compared, every copy included")
        for d in verdict.differences[:SHOWN]:
            print(compare.in_words(d))
        if len(found) > SHOWN:
            print(f"and {len(found) - SHOWN} more tensors differ")
    return DIFFERENT if found else 0


def _run(converter: str, verb: str, command: Command) -> Result:
    from mmconvert import convert, converters
    from mmconvert.progress import screen_events
    from mmconvert.recognise import family_of

    direction = {
        "hf_to_mm": convert.hf_to_mm,
        "mm_to_hf": convert.mm_to_hf,
        "resplit": convert.reshard,
    }[verb]
    auto = converter == AUTO
    family = family_of(*_inputs(command.cfg)) if auto else converters.load(converter)
    with screen_events(quiet=command.screen.quiet) as events:
        return direction(family, command.cfg, command.options, events)


def _inputs(cfg: object) -> list[Path]:
    """The input folders of a request, that of the original model first."""
    from mmconvert.config import HFToMM, MMToHF, Resplit

    if isinstance(cfg, Resplit):
        return [path for path in (cfg.hf_config.hf_dir, cfg.source_dir) if path is not None]
    if isinstance(cfg, (HFToMM, MMToHF)):
        return [cfg.hf_config.hf_dir]
    raise TypeError(f"no conversion request: {cfg!r}")


def _summary(verb: str, result: Result) -> str:
    done = "would write" if not result.written else "wrote"
    size = result.plan.nbytes
    rate = f", {amount(size / result.seconds)}/s" if result.written else ""
    where = "from" if verb == "mm_to_hf" else "layout"
    return (
        f"{done} {result.output}: {len(result.plan.targets)} tensors, {amount(size)} in "
        f"{result.seconds:.2f} s{rate}\n{where}: {result.layout.describe()}\n"
        f"proven: {len(result.plan.copies)} copies write every byte once and use every source"
    )


def amount(nbytes: float) -> str:
    """Bytes in words: 12.3 MB, 4.42 GB."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"

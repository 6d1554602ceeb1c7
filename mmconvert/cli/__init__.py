"""The command ``mm-convert``: the only place that prints or exits.

This file reads the first words of a command line; flags and work are imported when needed, so
that help is fast.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

from mmconvert.cli import screen
from mmconvert.errors import Interrupted, MMConvertError, OutputError, RequestError
from mmconvert.version import VERSION
from mmconvert.words import one_line

AUTO = "AutoConverter"  # the family is told by the checkpoint
INTERRUPTED = 130
CLOSED_PIPE = 141  # what a shell says of a program that SIGPIPE ends: 128 + 13
TORCHRUN = "TORCHELASTIC_RUN_ID"  # set by torchrun for every process that it starts

LAYOUT = "--cfg.parallel_config.llm_pp_layers [12,16] --cfg.parallel_config.vit_pp_layers [32,0]"
TOOLS = {
    "inspect": "PATH says what a checkpoint is, with a picture of its layout",
    "verify": "A B compares two checkpoints, Hugging Face or MM, in any two layouts",
    "diff": "A B measures how far apart two checkpoints are, by tensor, layer and module",
    "suggest": "HF_DIR --pp N balances the layers over the pipeline and prints the command",
    "model_json": "HF_DIR --output FILE writes MindSpeed-MM's model.json for a model and layout",
    "doctor": "PATH says what is wrong with a checkpoint, and prints the commands that mend it",
    "roundtrip": "HF_DIR proves for CI that what comes back from MM format is what went in",
    "validate": "--mm_dir D --hf_dir H runs both and compares what they compute",
    "generate": "--mm_dir D --hf_dir H --prompt P answers, from pictures, videos and sounds too",
    "finetune": "--mm_dir D --hf_dir H --data F --save S trains on conversations",
    "predict": "single YAML X.ckpt VOCAB IMAGE PROMPT 1, as MindFormers' Qwen-VL script has it",
    "run_qwenvl": "--config YAML --load_checkpoint X.ckpt --hf_dir H, as MindFormers' line has it",
    "data": "CONVERSION brings a dataset's annotations to the form that training reads",
    "convert_weight": "--model qwenvl --input_path HF --output_path X.ckpt, as MindFormers has it",
    "playground": "DIR writes small checkpoints of every family to try the commands on",
    "moe_expert": "--style merge|split --hf_dir HF --save_dir OUT stores experts in another form",
    "rename_lora": "--lora_dir A --save_dir B --names new|old|fsdp2 gives an adapter other names",
    "merge_base_lora_weight": "as MindSpeed-MM has it: MM base + MM adapter",
    "merge_lora_safetensors_to_base": "as MindSpeed-MM has it: HF base + adapter",
    "completion": "bash|zsh prints a script that completes these words in the shell",
}
# Scripts of MindFormers' and MindSpeed-MM's guides: their lines work with mm-convert for python.
SCRIPTS = {
    "convert_weight": ["convert_weight"],
    "data_convert": ["data", "llava-to-qwenvl"],
    "run_qwenvl_predict": ["predict"],
    "run_qwenvl": ["run_qwenvl"],
    "merge_base_lora_weight": ["merge_base_lora_weight"],
    "merge_lora_safetensors_to_base": ["merge_lora_safetensors_to_base"],
    "llava_instruct_2_mllm_demo_format": ["data", "llava-to-mllm"],
}
# These bring torch's process groups themselves, one process for each rank of the checkpoint.
RUNTIME = ("validate", "generate", "finetune", "predict", "run_qwenvl")
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
# Of the same converters, for adapters.
LORA_VERBS = {
    "lora_hf_to_mm": (
        "LoraHFToMM",
        "PEFT adapter -> MM: to train on, or to merge there",
        "--cfg.hf_config.hf_dir ADAPTER --cfg.mm_dir MM_DIR "
        "--cfg.base_mm_dir BASE_MM_DIR --cfg.base_hf_dir BASE_HF_DIR",
    ),
    "lora_mm_to_hf": (
        "LoraMMToHF",
        "adapter of LoRA training -> PEFT, with adapter_config.json",
        "--cfg.mm_dir MM_DIR --cfg.hf_config.hf_dir BASE_HF_DIR --cfg.save_hf_dir ADAPTER",
    ),
    "lora_merge": (
        "LoraMerge",
        "base model + adapters -> model, each of them Hugging Face or MM",
        "--cfg.base_dir BASE --cfg.lora_dir ADAPTER --cfg.save_dir MERGED",
    ),
    "lora_resplit": (
        "LoraResplit",
        "MM adapter -> MM adapter in another parallel layout",
        "--cfg.source_dir MM_DIR --cfg.target_dir NEW_MM_DIR "
        "--cfg.target_parallel_config.llm_pp_layers [28] "
        "--cfg.target_parallel_config.vit_pp_layers [32]",
    ),
}
DCP_VERBS = {
    "hf_to_dcp": (
        "HFToDCP",
        "Hugging Face -> DCP: before training with FSDP2",
        "--cfg.hf_config.hf_dir HF_DIR --cfg.dcp_dir DCP_DIR",
    ),
    "dcp_to_hf": (
        "DCPToHF",
        "DCP -> Hugging Face: after training with FSDP2",
        "--cfg.dcp_dir DCP_DIR --cfg.hf_config.hf_dir HF_DIR --cfg.save_hf_dir NEW_HF_DIR",
    ),
    "mm_to_dcp": (
        "MMToDCP",
        "MM -> DCP, straight",
        "--cfg.mm_dir MM_DIR --cfg.hf_config.hf_dir HF_DIR --cfg.dcp_dir DCP_DIR",
    ),
    "dcp_to_mm": (
        "DCPToMM",
        "DCP -> MM, straight",
        f"--cfg.dcp_dir DCP_DIR --cfg.hf_config.hf_dir HF_DIR --cfg.mm_dir MM_DIR {LAYOUT}",
    ),
    "hf_to_mm_dcp": (
        "HFToMM",
        "Hugging Face -> DCP with whole MM tensors",
        "--cfg.hf_config.hf_dir HF_DIR --cfg.mm_dir DCP_DIR",
    ),
}
# Converters of MindSpeed-MM for its FSDP2 trainers, which take models of any kind.
DCP_CONVERTERS = {
    "Qwen3VLConverter": "Qwen3-VL",
    "Qwen35Converter": "Qwen3.5 and 3.6",
    "Mistral3Converter": "Mistral 3, Magistral",
    "ExpertMergeDcpConverter": "InternVL3.5 with experts, GLM-4.5V, Qwen3-Omni",
    "GenericDCPConverter": "any model",
}
# Of the converters whose other side is MindSpore (converters.MINDSPORE).
MS_VERBS = {
    "hf_to_ms": (
        "HFToMS",
        "Hugging Face -> MindSpore: before training or serving with MindFormers",
        "--cfg.hf_config.hf_dir HF_DIR --cfg.ms_path X.ckpt --cfg.dtype fp16",
    ),
    "ms_to_hf": (
        "MSToHF",
        "MindSpore -> Hugging Face: a .ckpt, or rank folders with their strategy files",
        "--cfg.ms_path X.ckpt --cfg.hf_config.hf_dir HF_DIR --cfg.save_hf_dir NEW_HF_DIR",
    ),
    "resplit": (
        "MSResplit",
        "MindSpore -> MindSpore: a complete file, or sliced over any devices",
        "--cfg.source_dir X.ckpt --cfg.target_dir RANKS_DIR "
        "--cfg.target_parallel_config.data_parallel 2 "
        "--cfg.target_parallel_config.model_parallel 4",
    ),
}


def verbs_of(converter: str) -> dict[str, tuple[str, str, str]]:
    """The verbs of a converter: the class of their flags, what they do, an example."""
    from mmconvert.converters import BUILT_IN, MINDSPORE, load

    if converter == AUTO:
        return MS_VERBS | VERBS | DCP_VERBS | LORA_VERBS
    if converter not in BUILT_IN and (
        converter in MINDSPORE or load(converter).naming == "mindformers"
    ):
        return MS_VERBS
    return VERBS | DCP_VERBS | LORA_VERBS


def main(argv: Sequence[str] | None = None, *, launched: bool = False) -> int:
    """Runs one command line; returns the exit code (see the error tree).

    Args:
        launched: whether torchrun may have started this process as one of several.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, _terminated)
    screen.prepare()
    if not (launched and TORCHRUN in os.environ) or words[:1] in ([tool] for tool in RUNTIME):
        return _guarded(words)
    from mmconvert.executor import group

    try:
        processes = group.join()
    except MMConvertError as error:
        return _fail(error, words)
    if not processes.leads:  # the first process speaks for all; the others only of their faults
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until this process ends
    code = _guarded(words)
    processes.leave()
    return code


def _guarded(words: list[str]) -> int:
    """Runs one command line; whatever goes wrong becomes a message and an exit code."""
    try:
        try:
            return _reported(words)
        finally:
            _heed_no_more()
    except KeyboardInterrupt:  # while something else was being told
        screen.say("interrupted")
        return INTERRUPTED


def _reported(words: list[str]) -> int:
    try:
        code = _dispatch(words)
        _note_broken(words)
        sys.stdout.flush()  # here and not when Python ends, where a full disk is exit code 120
        return code
    except MMConvertError as error:
        return _fail(error, words)
    except SystemExit as stop:  # help has been shown
        return stop.code if isinstance(stop.code, int) else RequestError.exit_code
    except KeyboardInterrupt as stop:  # whoever was writing says what is left, and nobody else
        return _interrupted(stop, words)
    except BrokenPipeError:  # the reader of our output went away
        screen.abandon(sys.stdout)
        return CLOSED_PIPE
    except OSError as error:
        return _fail(_failed_output(error), words)
    except MemoryError:
        return _fail(MMConvertError("out of memory", "a few hundred MiB of free memory"), words)
    except Exception as error:  # the last line of defence: named, never a bare traceback
        before = error.__context__
        if isinstance(before, KeyboardInterrupt):  # a pool that it had ended, and the like
            return _interrupted(before, words)
        return _fail(InternalError(f"{type(error).__name__}: {error}"), words)


def _failed_output(error: OSError) -> MMConvertError:
    """Files' errors are MMConvertErrors: one without a file's name is the standard output's."""
    if error.filename is not None:
        return _unusable(error)
    screen.abandon(sys.stdout)
    return _unprinted(error)


def _interrupted(stop: KeyboardInterrupt, words: Sequence[str]) -> int:
    _heed_no_more()
    what, fix = (stop.what, stop.fix) if isinstance(stop, Interrupted) else ("interrupted", "")
    if _asked(words, "--json"):
        told = {"error": "Interrupted", "what": what, "expected": "", "fix": fix}
        print(json.dumps(told | {"exit_code": INTERRUPTED}))
    screen.say(f"{what}; {fix}" if fix else what)
    return INTERRUPTED


class InternalError(MMConvertError):
    """A fault of mmconvert itself."""

    exit_code = 70

    def __init__(self, what: str) -> None:
        super().__init__(
            f"a fault of mmconvert itself: {what}",
            "none; what stands under the final name, if anything, is complete",
            "run again with --debug and report what it prints",
        )


def _terminated(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _note_broken(words: Sequence[str]) -> None:
    """Families of other packages that a search has left out, though nobody asked for them."""
    from mmconvert.converters import BROKEN

    if BROKEN and not _asked(words, "--quiet"):
        for what in BROKEN.values():
            screen.say(screen.labelled(f"left out: {what}"))


def _heed_no_more() -> None:
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


def _unusable(error: OSError) -> RequestError:
    """What the system says of a path that no other part of the program has looked at before."""
    return RequestError(
        f"{os.fsdecode(error.filename)}: {error.strerror or error}",  # pyright: ignore[reportArgumentType]
        "a path that the system can use",
    )


def _asked(words: Sequence[str], flag: str) -> bool:
    """Whether one of our own flags is set, in any of its spellings, a --config file included."""
    from mmconvert.cli.arguments import normalise
    from mmconvert.config import HFToMM

    try:
        return flag in normalise(words, HFToMM)
    except MMConvertError:
        return flag in words


def _fail(error: MMConvertError, words: Sequence[str]) -> int:
    if _asked(words, "--debug"):
        traceback.print_exc()
    if _asked(words, "--json"):
        print(json.dumps(error.as_dict()))
    # Names in messages come from files. A terminal must not obey what is in them.
    first, *rest = map(one_line, error.lines())
    screen.say("\n".join([f"error: {first}", *("  " + line for line in rest)]))
    return error.exit_code


def _unprinted(error: OSError) -> OutputError:
    return OutputError(
        f"the result could not be printed: {error.strerror or error}",
        "a standard output that can be written; what the command was to write to files is there",
        "free some space, or send the output elsewhere",
    )


def _dispatch(words: list[str]) -> int:
    from mmconvert.converters import BUILT_IN, MINDSPORE, REFUSED, converter_names

    if words[:1] == ["--version"]:
        print(f"mm-convert {VERSION}")
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(_top_help([AUTO, *converter_names()], list(MINDSPORE)))
        return 0 if words else 2
    name, _, ending = words[0].rpartition(".")
    script = name.rpartition("/")[2] if ending in ("py", "sh") else words[0]
    script_words = SCRIPTS.get(script, words[:1])
    converter, rest = script_words[0], [*script_words[1:], *words[1:]]
    if converter in TOOLS:
        return _tool(converter, rest)
    if converter in DCP_CONVERTERS:
        from mmconvert.cli import dcp

        return dcp.run(converter, rest)
    # Installed packages are searched for converters only when none of ours is meant: it is slow.
    own = (AUTO, *BUILT_IN, *MINDSPORE)
    if converter not in own and converter not in converter_names():
        if converter in REFUSED:
            raise RequestError(*REFUSED[converter])
        known = [AUTO, *converter_names(), *MINDSPORE, *DCP_CONVERTERS, *TOOLS]
        kind = "converter" if converter.endswith("Converter") else "command"
        raise _unknown(kind, converter, known, "mm-convert -h")
    if not rest or rest[0] in ("-h", "--help"):
        print(_converter_help(converter))
        return 0 if rest else 2
    verb, flags = rest[0], rest[1:]
    verbs = verbs_of(converter)
    from mmconvert.cli.conversions import between, convert

    if verb in verbs:
        return convert(converter, verb, flags)
    if (formats := _formats_of(verb)) is None:
        raise _unknown("verb", verb, list(verbs), f"mm-convert {converter} -h")
    return between(converter, verb, formats, flags)


def _formats_of(verb: str) -> tuple[str, str] | None:
    """The formats that a verb such as hf_to_npy goes between; None if it is no such verb, or one
    between our own, which have verbs of their own.
    """
    from mmconvert.formats.registry import BUILT_IN, names

    first, _, second = verb.partition("_to_")
    known = names()
    ours = {first, second} <= BUILT_IN.keys() and "torch_dist" not in (first, second)
    if first in known and second in known and not ours and first != second:
        return first, second
    return None


def _tool(name: str, words: list[str]) -> int:
    from importlib import import_module

    from mmconvert.executor import group

    if group.current().size > 1:
        raise RequestError(
            f"mm-convert {name} runs in one process", "torchrun with a conversion only"
        )
    return import_module(f"mmconvert.cli.tools.{name}").run(words)


def _unknown(kind: str, word: str, known: list[str], help_command: str) -> RequestError:
    near = get_close_matches(word, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    return RequestError(
        f"there is no {kind} {word!r}", f"one of {', '.join(known)}", f"{hint}see {help_command}"
    )


def _top_help(names: list[str], ms_names: list[str]) -> str:
    verbs = "\n".join(f"  {verb:<13} {text}" for verb, (_, text, _) in (VERBS | LORA_VERBS).items())
    ms_verbs = "\n".join(f"  {verb:<10} {text}" for verb, (_, text, _) in MS_VERBS.items())
    about = {AUTO: "   the family that config.json or the MM checkpoint tells"}
    converters = "\n".join(f"  {name}{about.get(name, '')}" for name in names)
    tools = "\n".join(f"  {name:<14} {text}" for name, text in TOOLS.items())
    return f"""usage: mm-convert CONVERTER VERB [flags]
       mm-convert TOOL WORDS ... [flags]

Moves multimodal checkpoints between Hugging Face and MM format, and from any parallel
layout to any other: complete or not at all, in bounded memory, without torch or an NPU.

converters:
{converters}

verbs:
{verbs}

for MindSpore (MindFormers) instead of MM format: {", ".join(ms_names)}, with the verbs
{ms_verbs}

tools, which need no converter:
{tools}

mm-convert CONVERTER VERB -h and mm-convert TOOL -h show the flags; --config FILE.yaml takes
them from a file; mm-convert --version shows the version.

Exit codes: 0 done, 1 a comparison differs, 2 the request is impossible, 3 a checkpoint is
missing or damaged, 70 a fault of mmconvert itself, 130 interrupted, 141 nobody read on.

example:
  mm-convert Qwen2VLConverter hf_to_mm {VERBS["hf_to_mm"][2]}"""


def _converter_help(converter: str) -> str:
    lines = [f"usage: mm-convert {converter} VERB [flags]", "", "verbs and an example of each:"]
    for verb, (_, text, example) in verbs_of(converter).items():
        lines += [
            f"  {verb:<13} {text}",
            f"                mm-convert {converter} {verb} {example}",
        ]
    return "\n".join([*lines, "", f"mm-convert {converter} VERB -h shows the flags."])

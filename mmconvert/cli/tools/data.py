"""The command ``data``: annotation files of datasets to the form that training reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import tyro

from mmconvert.cli.arguments import read_plain
from mmconvert.cli.screen import screen_events
from mmconvert.errors import RequestError
from mmconvert.words import one_line

if TYPE_CHECKING:
    from mmconvert.datasets.convert import DataResult
    from mmconvert.datasets.listwriter import ListWriter
    from mmconvert.datasets.llava import Converter

PROG = "mm-convert data"
FILE_MODE = 0o640  # of our outputs; the references' own with --compat
MLLM_MODE, QWENVL_MODE = 0o600, 0o750


@dataclass(frozen=True)
class Common:
    """What both conversions take."""

    strict: bool = False
    """Stop at the first image that is not there, and at anything else that is odd."""
    skip_missing: bool = False
    """Leave items out whose image is not there, even if that is all of them."""
    compat: bool = False
    """Write, byte for byte, what the reference script writes, its faults included."""
    overwrite: bool = False
    """Replace the output if it is there."""
    json: bool = False
    """Print the result, or the error, as JSON."""
    quiet: bool = False
    """Print nothing but errors."""
    debug: bool = False
    """Add the traceback to errors."""


@dataclass(frozen=True)
class MLLM:
    """Files and folders."""

    llava_json_path: Path = Path("./data/llava_instruct_150k.json")
    """The annotations: a JSON list of items in the form of LLaVA."""
    output_json_path: Path = Path("./data/mllm_format_llava_instruct_data.json")
    """The file to write."""
    coco_path: str = "./data/COCO2017"
    """The folder of the images."""
    image_prefix: str = "train2017/"
    """What stands before an item's image to make its path below coco_path; may be empty."""
    relative: bool = False
    """Name images as ./PATH below coco_path, as later versions of the script do."""
    common: Annotated[Common, tyro.conf.OmitArgPrefixes] = Common()


@dataclass(frozen=True)
class QwenVLData:
    """Files, folders and names."""

    data_path: Path = Path("detail_23k.json")
    """The annotations: a JSON list of items in the form of LLaVA."""
    image_location: str = "/data/coco2014/coco/images"
    """The folder of the images, the one above train2014."""
    output_path: Path = Path("detail_23k_qwenvl_format.json")
    """The file to write."""
    user_role_name: str = "user"
    """What stands for human."""
    assistant_role_name: str = "assistant"
    """What stands for gpt."""
    image_prefix: str = "train2014/COCO_train2014_"
    """What stands before an item's image to make its path below image_location; may be empty."""
    common: Annotated[Common, tyro.conf.OmitArgPrefixes] = Common()


def run(words: list[str]) -> int:
    """Converts one annotation file."""
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0 if words else 2
    name, rest = words[0].replace("_", "-"), words[1:]
    if name not in CONVERSIONS:
        raise RequestError(
            f"there is no conversion {words[0]!r}",
            f"one of {', '.join(CONVERSIONS)}",
            f"see {PROG} -h",
        )
    return CONVERSIONS[name][0](rest)


def _help() -> str:
    lines = [f"usage: {PROG} CONVERSION [flags]", "", "conversions and an example of each:"]
    for name, (_, text, example) in CONVERSIONS.items():
        lines += [f"  {name:<16} {text}", f"    {PROG} {name} {example}"]
    return "\n".join([*lines, "", f"{PROG} CONVERSION -h shows the flags."])


DataFlags = TypeVar("DataFlags", MLLM, QwenVLData)


def _read(name: str, form: type[DataFlags], words: list[str]) -> DataFlags:
    _, text, example = CONVERSIONS[name]
    prog = f"{PROG} {name}"
    asked = read_plain(form, words, prog, f"{text}\n\nexample:\n  {prog} {example}")
    given = asked.common
    if given.strict and (given.skip_missing or given.compat):
        other = "--skip-missing" if given.skip_missing else "--compat"
        raise RequestError(f"--strict and {other} exclude each other", "one of them")
    return asked


def _to_mllm(words: list[str]) -> int:
    asked = _read("llava-to-mllm", MLLM, words)
    from mmconvert.datasets.forms import ToMLLM
    from mmconvert.datasets.listwriter import ListWriter
    from mmconvert.datasets.llava import Images

    images = Images(asked.coco_path, asked.image_prefix, "dotted" if asked.relative else "full")
    common = asked.common
    converter = ToMLLM(images, strict=common.strict, compat=common.compat)
    writer = ListWriter(
        asked.output_json_path,
        mode=MLLM_MODE if common.compat else FILE_MODE,
        overwrite=common.overwrite,
        ascii_only=False,
        inputs=(asked.llava_json_path,),
    )
    return _convert(asked.llava_json_path, writer, converter, common)


def _to_qwenvl(words: list[str]) -> int:
    asked = _read("llava-to-qwenvl", QwenVLData, words)
    from mmconvert.datasets.forms import ToQwenVL
    from mmconvert.datasets.listwriter import ListWriter
    from mmconvert.datasets.llava import Images

    common = asked.common
    converter = ToQwenVL(
        Images(asked.image_location, asked.image_prefix, "plain"),
        user=asked.user_role_name,
        assistant=asked.assistant_role_name,
        strict=common.strict,
        compat=common.compat,
    )
    writer = ListWriter(
        asked.output_path,
        mode=QWENVL_MODE if common.compat else FILE_MODE,
        keep_mode=common.compat,  # the script writes into a file that is there
        overwrite=common.overwrite or common.compat,
        ascii_only=True,
        inputs=(asked.data_path,),
    )
    return _convert(asked.data_path, writer, converter, common)


def _convert(source: Path, writer: ListWriter, converter: Converter, common: Common) -> int:
    """Converts, and shows what came of it."""
    from mmconvert.datasets.convert import convert_file

    with screen_events(quiet=common.quiet) as events:
        ok = common.skip_missing or common.compat
        outcome = convert_file(source, writer, converter, events, none_found_is_ok=ok)
    if common.json:
        print(json.dumps(outcome.as_dict()))
    elif not common.quiet:
        _show(outcome)
    return 0


def _show(outcome: DataResult) -> None:
    counts = outcome.report.counts
    parts = [f"{counts['images']} with an image", f"{counts['text_only']} text only"]
    parts += [f"{counts[k]} with {k}" for k in ("videos", "audios") if counts[k]]
    if counts["media"]:
        parts.append(f"{counts['media']} with videos or sounds, which stay in the item")
    if counts["missing"]:
        parts.append(f"{counts['missing']} left out")
    if counts["mended"]:
        one = counts["mended"] == 1
        questions = "question kept apart from its" if one else "questions kept apart from their"
        parts.append(f"{counts['mended']} {questions} image")
    print(one_line(f"wrote {outcome.output}: {outcome.written} of {outcome.read} items"))
    print(", ".join(parts))


CONVERSIONS: dict[str, tuple[Callable[[list[str]], int], str, str]] = {
    "llava-to-mllm": (
        _to_mllm,
        "LLaVA-Instruct to the form of MindSpeed-MM (images, messages).",
        "--llava_json_path llava_instruct_150k.json --coco_path COCO2017 "
        "--output_json_path mllm.json",
    ),
    "llava-to-qwenvl": (
        _to_qwenvl,
        "LLaVA-Instruct to the form of Qwen-VL (Picture 1: <img>PATH</img>).",
        "--data_path detail_23k.json --image_location COCO2014 --output_path qwenvl.json",
    ),
}

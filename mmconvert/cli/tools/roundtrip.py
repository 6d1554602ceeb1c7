"""The command ``roundtrip``: does a checkpoint come back from another format as it was?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mmconvert.cli.arguments import read_plain
from mmconvert.cli.screen import screen_events
from mmconvert.cli.settings import read_yaml
from mmconvert.cli.tools.junit import Case, write_junit
from mmconvert.config import NO_PATTERNS, MaybePath, Options, Patterns
from mmconvert.errors import RequestError
from mmconvert.names import number
from mmconvert.narrow import is_dict
from mmconvert.words import amount

DIFFERENT = 1


@dataclass(frozen=True)
class Trip:
    """What to send through which format."""

    hf_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="HF_DIR")]
    """A Hugging Face checkpoint, an adapter of PEFT, or a folder of DCP or torch_dist."""
    base_dir: Annotated[MaybePath, tyro.conf.arg(name="hf_dir")] = None
    """The original model of a DCP or torch_dist folder, or the base model of an adapter; of an
    adapter not given: the one that adapter_config.json names."""
    through: Literal["", "mm", "ms", "dcp", "torch_dist"] = ""
    """The format to send it through; not given: MM, or MindSpore for its families."""
    layout: Annotated[Patterns, tyro.conf.arg(metavar="FILE.yaml")] = NO_PATTERNS
    """YAML, keys of --cfg.parallel_config (of DCP: ranks); may be repeated. Not given: a few usual
    layouts."""
    junit: Annotated[MaybePath, tyro.conf.arg(metavar="FILE.xml")] = None
    """Also write the result as a JUnit file, which CI systems show."""
    drop: Patterns = NO_PATTERNS
    """Leave out tensors whose names fit this pattern (* and ?); may be repeated."""
    workers: int = 0
    """Number of processes, or threads, that share the work; 0 takes one for each core."""
    json: bool = False
    """Print the result, or the error, as JSON."""
    quiet: bool = False
    """Print nothing; the exit code is the answer."""
    debug: bool = False
    """Add the traceback to errors."""


def run(words: list[str]) -> int:
    """Sends it there and back; exit code 1 if anything came back changed."""
    text = (
        "Streams a checkpoint HF -> MM (or MindSpore, DCP, torch_dist) -> HF through the plans of "
        "a conversion, writes nothing, and compares digests. Exit code 0 if every byte would come "
        "back, 1 if not."
    )
    prog = "mm-convert roundtrip"
    asked = read_plain(Trip, words, prog, f"{text}\n\nexample:\n  {prog} HF_DIR --junit trip.xml")
    from mmconvert.formats.recognise import family_of
    from mmconvert.formats.registry import load, of_naming
    from mmconvert.tools.roundtrip import roundtrip

    family = family_of(asked.base_dir or asked.hf_dir, naming="")
    form = load(asked.through or of_naming(family.naming)).Layout
    layouts = [(Path(name).stem, _layout(Path(name), form)) for name in asked.layout]
    with screen_events(quiet=asked.quiet) as events:
        options = Options(workers=asked.workers, drop=asked.drop)
        given = (asked.base_dir, asked.through)
        found = roundtrip(family, asked.hf_dir, layouts, options, events, *given)
    if asked.junit is not None:
        cases = [
            Case(o.name, o.seconds, "\n".join(f"changed: {n}" for n in o.unequal), o.skipped)
            for o in found
        ]
        write_junit(asked.junit, f"mm-convert roundtrip {asked.hf_dir.resolve().name}", cases)
    if asked.json:
        listed = [
            {
                "name": o.name,
                "layout": o.layout.as_dict() if o.layout else None,
                "equal": not o.unequal if o.layout else None,
                "tensors": o.tensors,
                "bytes": o.nbytes,
                "unequal": list(o.unequal),
                "skipped": o.skipped,
                "seconds": round(o.seconds, 3),
            }
            for o in found
        ]
        print(json.dumps({"equal": not any(o.unequal for o in found), "layouts": listed}))
    elif not asked.quiet:
        for o in found:
            if o.layout is None:
                print(f"{o.name}: skipped: {o.skipped}")
                continue
            verdict = (
                f"{len(o.unequal)} CHANGED: {o.unequal[0]}" if o.unequal else "come back equal"
            )
            tensors = number(o.tensors, "tensor")
            print(f"{o.name}: {tensors}, {amount(o.nbytes)}, {verdict} ({o.seconds:.1f} s)")
    return DIFFERENT if any(o.unequal for o in found) else 0


def _layout(path: Path, form: type[object]) -> object:
    """A layout from a YAML file, also from one that is made for --config."""
    from mmconvert.api import layout_of

    content: object = read_yaml(path, "--layout")
    for key in ("cfg", "parallel_config"):
        if is_dict(content) and key in content:
            content = content[key]
    if not is_dict(content):
        raise RequestError(f"--layout {path}: parallel_config has no keys", "llm_pp_layers: ...")
    return layout_of(form, {str(key): value for key, value in content.items()})

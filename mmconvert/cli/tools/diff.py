"""The command ``diff``: how far apart are two checkpoints?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mmconvert.cli.arguments import read_plain
from mmconvert.cli.screen import screen_events, shows_blocks
from mmconvert.config import NO_FOLDERS, NO_PATTERNS, Folders, MaybePath, Options, Patterns
from mmconvert.errors import RequestError
from mmconvert.report.files import check_reports
from mmconvert.words import one_line, printable

if TYPE_CHECKING:
    from mmconvert.tools.comparison.diffresult import Diff

LONG = 2000  # characters of a note
DIFFERENT = 1


@dataclass(frozen=True)
class DiffFlags:
    """Two checkpoints."""

    a: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="A")]
    """A checkpoint folder of any format: what is measured against, such as the base model."""
    b: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="B")]
    """The other checkpoint, such as the trained model."""
    lora: Folders = NO_FOLDERS
    """An adapter: is B what lora_merge makes of A and this? Says which tensors are not. May be
    repeated, in the order of the merge."""
    top: int = 20
    """Number of tensors that are listed, largest part of the change first; 0: all that differ."""
    names: Literal["mm", "hf"] = "mm"
    """Name tensors as MM does, with the model's layer numbers, or as Hugging Face does."""
    html: MaybePath = None
    """Write a report to this file: one HTML page with charts, which needs nothing else."""
    svg: MaybePath = None
    """Write the charts alone to this file."""
    overwrite: bool = False
    """Replace an existing report or picture."""
    drop: Patterns = NO_PATTERNS
    """Leave out tensors whose names fit this pattern (* and ?); may be repeated."""
    vit_qkv: Literal["interleaved", "concatenated"] = "interleaved"
    """How the MM checkpoints order the rows of the vision encoder's q, k and v."""
    optimizer: bool = False
    """Measure optimizer state too: masters and moments of two MM checkpoints of training."""
    workers: int = 0
    """Number of processes, or threads, that share the work; 0 takes one for each core."""
    json: bool = False
    """Print the result, or the error, as JSON."""
    quiet: bool = False
    """Print nothing; the exit code is the answer."""
    debug: bool = False
    """Add the traceback to errors."""


ABOUT = """How far apart are two checkpoints? Relative L2 is ||A - B|| / ||A||, by tensor, layer and
module. Exit code 0 if all numbers are equal, 1 if not."""


def run(words: list[str]) -> int:
    """Measures, and shows; exit code 1 if anything differs."""
    prog = "mm-convert diff"
    example = f"{prog} BASE_DIR TRAINED_DIR --top 5 --html report.html"
    pair = read_plain(DiffFlags, words, prog, f"{ABOUT}\n\nexample:\n  {example}")
    if pair.top < 0:
        raise RequestError(f"--top is {pair.top}", "a number of tensors, or 0 for all")
    if pair.lora:
        return _merged(pair, [Path(folder) for folder in pair.lora])
    from mmconvert.report.data import diff_dict
    from mmconvert.report.text import lines_of
    from mmconvert.tools.comparison.diff import diff

    reports = check_reports(pair.html, pair.svg, overwrite=pair.overwrite)
    with screen_events(quiet=pair.quiet) as events:
        options = Options(
            workers=pair.workers, drop=pair.drop, vit_qkv=pair.vit_qkv, optimizer=pair.optimizer
        )
        found = diff(pair.a, pair.b, options, events)
        for note in found.notes:
            events.note(printable(note, LONG))
    _write(found, pair)
    if pair.json:
        print(json.dumps(diff_dict(found, pair.top)))
    elif not pair.quiet:
        narrow = get_terminal_size().columns < 80
        hf_names = pair.names == "hf"
        lines = lines_of(found, pair.top, hf_names=hf_names, unicode=shows_blocks(), narrow=narrow)
        print("\n".join([*lines, *(one_line(f"written: {path}") for path in reports)]))
    return 0 if found.equal else DIFFERENT


def _merged(pair: DiffFlags, adapters: Sequence[Path]) -> int:
    """Compares with a merge."""
    from mmconvert.tools.comparison.merging import unmerged

    options = Options(workers=pair.workers, vit_qkv=pair.vit_qkv)
    lines = unmerged(pair.a, pair.b, adapters, options)
    if pair.json:
        print(json.dumps({"equal": not lines, "differences": lines}))
    elif not pair.quiet:
        words = [one_line(line) for line in lines[: pair.top or None]]
        named = ", ".join(map(str, adapters))
        print("\n".join(words or [f"equal: {pair.b} is {pair.a} with {named} merged in"]))
    return DIFFERENT if lines else 0


def _write(found: Diff, pair: DiffFlags) -> None:
    """The files that were asked for."""
    from mmconvert.report.diffpage import diff_page, diff_svg
    from mmconvert.report.files import write_report

    if pair.html:
        write_report(pair.html, diff_page(found, pair.top), overwrite=pair.overwrite)
    if pair.svg:
        write_report(pair.svg, diff_svg(found), overwrite=pair.overwrite)

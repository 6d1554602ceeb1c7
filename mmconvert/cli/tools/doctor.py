"""The command ``doctor``: what is wrong with this checkpoint, and what mends it?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from mmconvert.cli.arguments import read_plain
from mmconvert.cli.screen import screen_events
from mmconvert.config import MaybePath
from mmconvert.names import number

if TYPE_CHECKING:
    from mmconvert.tools.doctor.report import DoctorReport, Finding

UNHEALTHY = 3
KINDS = {
    "hf": "Hugging Face checkpoint",
    "mm": "MM checkpoint",
    "mm_rank_file": "MM rank file",
    "ms": "MindSpore checkpoint",
    "dcp": "DCP folder",
    "torch_dist": "torch_dist folder",
    "hf_weight_file": "safetensors file",
}


@dataclass(frozen=True)
class Patient:
    """What to examine."""

    path: tyro.conf.Positional[Path]
    """A checkpoint of any format, or one of its weight files."""
    hf_dir: MaybePath = None
    """For MM, DCP, torch_dist: the original checkpoint. Gives sizes, ties, and the order of vision
    q, k, v."""
    model_json: MaybePath = None
    """MindSpeed-MM's model.json: its layer lists and sizes must be those of the checkpoint."""
    quick: bool = False
    """Do not compare copies of tensors, nor masters with weights; nearly all that is read then are
    headers."""
    values: bool = False
    """Read all data, and search it for NaN and infinity."""
    workers: int = 0
    """Number of processes, or threads, that share the work; 0 takes one for each core."""
    json: bool = False
    """Print the result as JSON."""
    quiet: bool = False
    """Print nothing; the exit code is the answer."""
    debug: bool = False
    """Add the traceback to errors."""


def run(words: list[str]) -> int:
    """Examines; exit code 3 if anything must be mended."""
    text = "Lists everything that is wrong with a checkpoint, and the commands that fix it.\n"
    text += "Writes nothing. Exit code 0 if it is healthy (warnings do not count), 3 if not."
    prog = "mm-convert doctor"
    asked = read_plain(Patient, words, prog, f"{text}\n\nexample:\n  {prog} MM_DIR --hf_dir HF_DIR")
    from mmconvert.errors import RequestError
    from mmconvert.tools.doctor.asked import DoctorRequest
    from mmconvert.tools.doctor.examine import examine

    if asked.workers < 0:
        raise RequestError(f"--workers is {asked.workers}", "a number of threads, or 0")
    expected = DoctorRequest(
        asked.hf_dir, asked.quick, asked.values, asked.workers,
        asked.model_json,
    )  # fmt: skip
    with screen_events(quiet=asked.quiet) as events:
        report = examine(asked.path, expected, events)
    if asked.json:
        print(json.dumps(report.as_dict()))
    elif not asked.quiet:
        _show(report)
    return 0 if report.healthy else UNHEALTHY


def _show(report: DoctorReport) -> None:
    from mmconvert.tools.doctor.report import ERROR, WARNING, plain

    for finding in [*report.errors(), *report.warnings()]:
        print("\n".join(_lines(finding)))
    for name, count in report.more.items():
        print(f"and {count} more of {name}")
    kind = KINDS.get(report.kind, report.kind and f"{report.kind} checkpoint") or "no checkpoint"
    whose = f" of {report.family}" if report.family else ""
    numbers = f"{number(report.files, 'weight file')}, {number(report.tensors, 'tensor')} read"
    print(plain(f"{report.path}: {kind}{whose}, {numbers}"))
    for words, listed in (("checked", report.checked), ("not checked", report.skipped)):
        for item in listed:
            print(plain(f"{words}: {item}"))
    errors, warnings = report.count(ERROR), report.count(WARNING)
    counts = f"{number(errors, 'error')}, {number(warnings, 'warning')}"
    print(f"healthy: {counts}" if report.healthy else f"not healthy: {counts}")


def _lines(finding: Finding) -> list[str]:
    """A finding; everything in it has passed `plain` or `quote`."""
    lines = [f"{finding.severity} {finding.id}: {finding.what}"]
    if finding.fix:
        lines.append(f"  to fix: {finding.fix}")
    if finding.command:
        lines.append(f"  command: {finding.command}")
    return lines

"""MM checkpoints: folders, then files, then names, shapes and values, as far as each allows."""

from __future__ import annotations

from pathlib import Path

from mmconvert.config import Options, ParallelConfig
from mmconvert.errors import MMConvertError
from mmconvert.events import Events
from mmconvert.formats import manifest
from mmconvert.formats.hf.folder import read_json_file
from mmconvert.formats.mm.folder import RANK_FILE
from mmconvert.formats.mm.model import mm_model
from mmconvert.formats.mm.source import mm_source
from mmconvert.narrow import is_array, is_object
from mmconvert.sharding.layout import Layout, parse_folder
from mmconvert.tools.doctor.asked import DoctorRequest, Original
from mmconvert.tools.doctor.chart import Chart, make_chart
from mmconvert.tools.doctor.folder import rank_folders, weights_folder
from mmconvert.tools.doctor.modelfile import look_at_model_json
from mmconvert.tools.doctor.rankfiles import read_rank_files
from mmconvert.tools.doctor.report import DoctorReport
from mmconvert.tools.doctor.shapes import find_layout, look_at_shapes, look_at_use
from mmconvert.tools.doctor.shell import line, operand, resplit, unused
from mmconvert.tools.doctor.tensors import look_at_names
from mmconvert.tools.doctor.values import (
    look_at_encoder_qkv,
    look_at_replicas,
    look_at_zeros,
    look_for_nan,
)

# Findings that explain why mmconvert.json does not fit its files.
EXPLAINED = [
    *("dangling-tracker", "damaged-tracker", "missing-tracker", "missing-rank-folder"),
    *("missing-rank-file", "truncated-rank-file", "damaged-rank-file", "foreign-rank-file"),
    *("lfs-pointer", "cannot-read", "no-rank-folders", "pp-suffix-without-pp", "chunk-keys-differ"),
    *("not-a-tensor", "chunk-keys"),
]


def examine_mm(root: Path, asked: DoctorRequest, events: Events, report: DoctorReport) -> None:
    """Everything about an MM folder."""
    original = asked.original(report)
    folder = weights_folder(root, report)
    report.kind = "" if report.has(["no-checkpoint"]) else "mm"
    if folder is None:
        return
    listed = _listed_files(root, folder)
    ranks = rank_folders(folder, listed, report)
    if ranks is None:
        return
    parts = read_rank_files(ranks, listed if ranks.listed else {}, report)
    model = original.model if original else None
    chart = make_chart(root, ranks, parts, model, report) if parts else None
    if chart is not None:
        look_at_names(chart, ranks, report)
        if chart.whole and not report.has(["missing-rank-folder"]):
            _look_at_whole(root, chart, asked, original, events, report)
        else:
            report.skipped.append("shapes, copies and layout: not all ranks can be read")
        if asked.values:
            tensors = [t for part in chart.parts.values() for t in part.values()]
            look_for_nan(tensors, asked.workers, events, report)
    _look_at_manifest(root, report)


def _look_at_whole(
    root: Path,
    chart: Chart,
    asked: DoctorRequest,
    original: Original | None,
    events: Events,
    report: DoctorReport,
) -> None:
    found = find_layout(chart, report)
    if found is None:
        report.skipped.append("shapes and copies: tp ranks are missing")
        return
    layout = found.layout
    side = look_at_shapes(chart, found, report)
    look_at_use(chart, layout, side, report)
    report.checked.append(f"layout: {layout.describe()}")
    look_at_model_json(root, layout, asked, report)
    if asked.quick:
        report.skipped.append("copies of tensors (--quick)")
    else:
        look_at_replicas(side, True, asked.workers, events, report)
    if original is None or report.has(["other-family"]):
        why = "no hf_dir" if original is None else "hf_dir is of another model"
        report.skipped.append(f"sizes of config.json, order of vision q, k, v: {why}")
    elif (hf := original.side(chart.variant.canonical, chart.encoders_only)) is not None:
        look_at_zeros(side, hf, report)
        look_at_encoder_qkv(chart, layout, hf, asked.workers, events, report)
    else:
        report.skipped.append("the order of vision q, k, v: hf_dir has no readable weights")
    _as_a_conversion(root, chart, original, report)
    _commands(root, chart, layout, asked, report)


def _as_a_conversion(
    root: Path, chart: Chart, original: Original | None, report: DoctorReport
) -> None:
    """What no examination before has seen, and a conversion would refuse."""
    if report.errors():
        return
    model = None if original is None else original.model
    try:
        found, layout, parts = mm_model(
            chart.family,
            root,
            ParallelConfig(),
            model,
            Options(),
            prefix="",
            encoders_only=chart.encoders_only,
        )
        mm_source(found.modules, found.dims, layout, parts)
    except MMConvertError as error:
        report.add_error("refused", error, path=root)


def _commands(
    root: Path, chart: Chart, layout: Layout, asked: DoctorRequest, report: DoctorReport
) -> None:
    """One resplit for all findings that it mends; none if there is an error that it would meet."""
    mended = [f for f in report.findings if f.flags is not None]
    others = [f for f in report.errors() if f.flags is None and f.id != "pp-suffix-without-pp"]
    if not mended or others:
        return
    flags: list[str] = []
    for finding in mended:
        new = list(finding.flags or ())
        flags += new if " ".join(new) not in " ".join(flags) else []
    needs_hf = {"vit-qkv-concatenated", "tied-head-missing", "tied-head-superfluous"}
    use_hf = asked.hf_dir if asked.hf_dir and (needs_hf & {f.id for f in mended}) else None
    report.command_all(resplit(chart.family.converter, root, layout, flags, use_hf))


def _listed_files(root: Path, folder: Path) -> dict[str, int]:
    """Name of a rank folder in ``folder`` -> bytes of its file, as mmconvert.json lists it."""
    path = root / manifest.NAME
    try:
        files = read_json_file(path).get("files") if path.is_file() else None
    except MMConvertError:
        return {}
    found: dict[str, int] = {}
    for name, noted in files.items() if is_object(files) else ():
        size = noted[0] if is_array(noted) and noted else noted  # with the time
        words = name.split("/")
        parsed = parse_folder(words[1]) if len(words) == 3 else None
        if parsed and words[0] == folder.name and words[2] == RANK_FILE and isinstance(size, int):
            found[words[1]] = size
    return found


def _look_at_manifest(root: Path, report: DoctorReport) -> None:
    """A manifest that is ignored; a fault of the files it lists is told already."""
    _, note = manifest.read(root)
    if not note or report.has(EXPLAINED):
        return
    path = root / manifest.NAME
    stale = "has changed" in note
    aside = operand(unused(path, ".old"))
    report.add(
        "stale-manifest" if stale else "damaged-manifest",
        note,
        "nothing must be done: it is not used. Set it aside, so that nobody takes it for true",
        path=path,
        command=line(["mv", operand(path), aside]),
    )

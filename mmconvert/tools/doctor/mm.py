"""MM checkpoints: folders, then files, then names, shapes and values, as far as each allows."""

from __future__ import annotations

from pathlib import Path

from mmconvert.config import Options
from mmconvert.converters.family import Family
from mmconvert.errors import LayoutError, MMConvertError
from mmconvert.events import Events
from mmconvert.formats import manifest
from mmconvert.formats.base import Opening
from mmconvert.formats.faults import Collected
from mmconvert.formats.mm.folder import MMCheckpoint, open_mm
from mmconvert.formats.mm.format import FORMAT
from mmconvert.formats.mm.model import OpenedMM
from mmconvert.formats.recognise import family_of_parts
from mmconvert.plan.plan import Side
from mmconvert.plan.training import cautions
from mmconvert.stored import StoredTensor
from mmconvert.tools.doctor.asked import DoctorRequest, Original
from mmconvert.tools.doctor.experts import look_at_twins, told_as_one
from mmconvert.tools.doctor.faults import report_faults
from mmconvert.tools.doctor.modelfile import look_at_model_json
from mmconvert.tools.doctor.report import DoctorReport
from mmconvert.tools.doctor.shell import line, operand, resplit, unused
from mmconvert.tools.doctor.training import side_with_state, tensors_of
from mmconvert.tools.doctor.values import (
    look_at_dtypes,
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
    found, opened, side = Collected(), None, Side()
    state: list[StoredTensor] = []
    nothing: MMCheckpoint | None = None
    checkpoint = found.attempt(lambda: open_mm(root, found), nothing)
    if checkpoint is not None:
        try:
            family = family_of_parts(checkpoint.parts.values(), checkpoint.folder)
            report.family = family.name
            original = _of_family(family, original, checkpoint, report)
            like = original.model if original else None
            told = Opening(family, Options(), like=like, faults=found)
            opened = FORMAT.open(root, told).opened
            side = opened.side()
        except MMConvertError as error:  # from a step that cannot go on
            found.add(error)
            report.skipped.append("shapes, copies and layout: not all ranks can be read")
        report.files = len({chunk.rank for chunk in checkpoint.parts})
        report.tensors = sum(map(len, checkpoint.parts.values()))
    if opened is not None:
        told_as_one(found)
    if any(error.cause == "missing-rank-folder" for error in found.errors):
        # Names that count several ranks are right where some of them are missing.
        found.remarks[:] = [e for e in found.remarks if e.cause != "pp-suffix-without-pp"]
    report_faults(found, root, report)
    report.kind = "" if report.has(["no-checkpoint"]) else "mm"
    if opened is not None:
        state = _look_at_whole(root, opened, side, asked, original, events, report)
    if asked.values and checkpoint is not None:
        tensors = [t for part in checkpoint.parts.values() for t in part.values()] + state
        look_for_nan(tensors, asked.workers, events, report)
    _look_at_manifest(root, report)


def _of_family(
    family: Family, original: Original | None, checkpoint: MMCheckpoint, report: DoctorReport
) -> Original | None:
    """The HF checkpoint, if it is of the same family."""
    if original is None or original.model.family.converter == family.converter:
        return original
    report.add(
        "other-family",
        f"{checkpoint.folder} holds tensors of {family.name}; hf_dir belongs to "
        f"{original.model.family.name}",
        "give the hf_dir of the model that this checkpoint was made from",
        path=checkpoint.folder,
    )
    return None


def _look_at_whole(
    root: Path,
    opened: OpenedMM,
    side: Side,
    asked: DoctorRequest,
    original: Original | None,
    events: Events,
    report: DoctorReport,
) -> list[StoredTensor]:
    """What all ranks together tell; returns the tensors of the optimizer's state."""
    look_at_dtypes(side, opened.chart.checkpoint.folder, report)
    _look_at_use(opened, side, report)
    report.checked.append(f"layout: {opened.layout.describe()}")
    look_at_model_json(root, opened.layout, asked, report)
    full = side_with_state(opened, side, asked, events, report)
    if asked.quick:
        report.skipped.append("copies of tensors (--quick)")
    else:
        look_at_replicas(full, True, asked.workers, events, report)
    hf = _side_of(original, opened, report)
    if not asked.quick:
        look_at_twins(opened, side, hf, asked.workers, events, report)
    if original is None or report.has(["other-family"]):
        why = "needs --hf_dir" if original is None else "hf_dir belongs to another model"
        report.skipped.append(f"sizes of config.json, order of vision q, k, v: {why}")
    elif hf is not None:
        look_at_zeros(side, hf, report)
        look_at_encoder_qkv(opened, side, hf, asked.workers, events, report)
    else:
        report.skipped.append("the order of vision q, k, v: hf_dir has no readable weights")
    state = tensors_of(full, side)
    _commands(root, opened, asked, report, with_state=bool(state))
    return state


def _side_of(original: Original | None, opened: OpenedMM, report: DoctorReport) -> Side | None:
    """The weights of the HF checkpoint, if they are of this model and can be read."""
    if original is None or report.has(["other-family"]):
        return None
    return original.side(opened.model.variant.canonical, not opened.layout.decoder)


def _look_at_use(opened: OpenedMM, side: Side, report: DoctorReport) -> None:
    """Names layouts that convert in both directions and that training cannot use."""
    model, layout, folder = opened.model, opened.layout, opened.chart.checkpoint.folder
    if opened.complete and not report.has(["layer-count"]):
        try:
            layout.check(ordered=model.family.ordered)
        except LayoutError as error:
            report.add("stage-order", error.what, "resplit it into another layout", path=folder)
    dims = dict(model.dims)
    for row in (r for m in model.modules for r in m.all_rows() if len(r.rows) == 1):
        lengths = [w.shape[0] for key, w in side.wholes.items() if key.mm == row.mm and w.shape]
        if lengths:
            dims.setdefault(row.rows[0], lengths[0])
    for words in cautions(model.modules, dims, layout):
        report.add(
            "not-for-training", words, "resplit it into a layout that training can use", path=folder
        )


def _commands(
    root: Path, opened: OpenedMM, asked: DoctorRequest, report: DoctorReport, *, with_state: bool
) -> None:
    """One resplit for all findings that it mends; none if there is an error that it would meet.

    Args:
        with_state: the optimizer's state can go with the weights.
    """
    mended = [f for f in report.findings if f.flags is not None]
    passed = {"pp-suffix-without-pp", "" if with_state else "optimizer-damaged"}
    others = [f for f in report.errors() if f.flags is None and f.id not in passed]
    if not mended or others:
        return
    flags: list[str] = []
    for finding in mended:
        new = list(finding.flags or ())
        flags += new if " ".join(new) not in " ".join(flags) else []
    flags += ["--optimizer"] if with_state and "--drop" not in flags else []
    needs_hf = {"vit-qkv-concatenated", "tied-head-missing", "tied-head-superfluous"}
    use_hf = asked.hf_dir if asked.hf_dir and (needs_hf & {f.id for f in mended}) else None
    converter = opened.model.family.converter
    report.command_all(resplit(converter, root, opened.layout, flags, use_hf))


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
        "nothing needs to be done, as it is not used; set it aside, so that nobody relies on it",
        path=path,
        command=line(["mv", operand(path), aside]),
    )

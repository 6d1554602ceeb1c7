"""Checkpoints of any further format: read as a conversion reads them, every fault collected."""

from __future__ import annotations

from pathlib import Path

from mmconvert.config import Options
from mmconvert.converters.family import any_family
from mmconvert.errors import MMConvertError, ReplicaError, TensorError
from mmconvert.events import Events
from mmconvert.formats.base import Format, Opening
from mmconvert.formats.faults import Collected
from mmconvert.plan.plan import Side
from mmconvert.tools.doctor.asked import DoctorRequest
from mmconvert.tools.doctor.faults import report_faults
from mmconvert.tools.doctor.report import DoctorReport
from mmconvert.tools.doctor.values import look_at_replicas, look_for_nan


def examine_other(
    kind: Format, path: Path, asked: DoctorRequest, events: Events, report: DoctorReport
) -> None:
    """Everything about a checkpoint, by its format's own reader."""
    report.kind = kind.name
    faults = Collected()
    original = asked.original(report)
    side = Side()
    try:
        family = kind.family(path) or (original.model.family if original else any_family())
        report.family = family.name
        told = Opening(
            family,
            Options(workers=asked.workers),
            like=original.model if original else None,
            claims=bool(family.converter),
            faults=faults,
        )
        side = kind.open(path, told).side()
    except MMConvertError as error:
        faults.add(error)
    for error in faults.errors:
        error.cause = error.cause or _id(error)
    report_faults(faults, path, report)
    report.files = len({tensor.path for tensor in side.stored})
    report.tensors = len(side.stored)
    if asked.quick:
        report.skipped.append("copies of tensors (--quick)")
    elif not faults.errors:
        look_at_replicas(side, True, asked.workers, events, report)
    if asked.values:
        look_for_nan(side.stored, asked.workers, events, report)


def _id(error: MMConvertError) -> str:
    if isinstance(error, TensorError):
        return "missing-tensor" if "missing" in error.what else "unknown-tensor"
    return "wrong-shape" if isinstance(error, ReplicaError) else "refused"

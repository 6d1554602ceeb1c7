"""A single file: an MM rank file, or a weight file of a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mmconvert.causes.quantised import quantised
from mmconvert.converters.rows import mm_index
from mmconvert.errors import CheckpointError
from mmconvert.events import Events
from mmconvert.formats.faults import Collected
from mmconvert.formats.hf.bin import SUFFIX, read_weights
from mmconvert.formats.hf.choice import SAFETENSORS
from mmconvert.formats.mm.adapters import variant_of
from mmconvert.formats.mm.chart import Chart
from mmconvert.formats.mm.checks import check_known
from mmconvert.formats.mm.folder import MMCheckpoint
from mmconvert.formats.mm.names import check_names
from mmconvert.formats.mm.rankfiles import EXTRA_STATE, extra_state, read_rank_file
from mmconvert.formats.recognise import family_of_parts
from mmconvert.sharding.layout import Chunk, Rank
from mmconvert.stored import StoredTensor
from mmconvert.tools.doctor.asked import DoctorRequest
from mmconvert.tools.doctor.faults import command_of, report_faults
from mmconvert.tools.doctor.report import DoctorReport
from mmconvert.tools.doctor.values import look_for_nan


def examine_file(path: Path, asked: DoctorRequest, events: Events, report: DoctorReport) -> None:
    """One file by itself: what only other files can tell is left out."""
    report.skipped.append("whatever the other files of the checkpoint tell")
    is_hf = path.suffix in (SAFETENSORS, SUFFIX)
    report.kind = "hf_weight_file" if is_hf else "mm_rank_file"
    tensors = _weight_file(path, report) if is_hf else _rank_file(path, report)
    if asked.values:
        look_for_nan(tensors, asked.workers, events, report)


def _weight_file(path: Path, report: DoctorReport) -> list[StoredTensor]:
    try:
        file = read_weights(path)
    except CheckpointError as error:
        report.add_error("refused", error, path=path, command=command_of(error, path))
        return []
    report.files, report.tensors = 1, len(file.tensors)
    plain = [t for t in file.tensors if t.name.endswith(".weight")]
    if (fault := quantised(file.tensors, plain, {})) is not None:
        report.add_error("refused", fault, path=path)
    return file.tensors


def _rank_file(path: Path, report: DoctorReport) -> list[StoredTensor]:
    found, notes = Collected(), dict[str, int]()
    parts = found.attempt(lambda: read_rank_file(path, notes), dict[str, dict[str, StoredTensor]]())
    if EXTRA_STATE in notes:
        found.remark(extra_state({path: notes[EXTRA_STATE]}))
    tensors = [tensor for part in parts.values() for tensor in part.values()]
    report.files, report.tensors = int(bool(parts)), len(tensors)
    if tensors:
        found.attempt(lambda: _look_at_names(path, list(parts.values()), found), None)
    report_faults(found, path, report)
    return tensors


def _look_at_names(
    path: Path, parts: Sequence[Mapping[str, StoredTensor]], found: Collected
) -> None:
    """By the family that fits best: many files fit several."""
    folder, rank = path.parent, Rank(0)
    chunks = {Chunk(rank, virtual): part for virtual, part in enumerate(parts)}
    # Never whole: a file alone does not tell how many there are.
    checkpoint = MMCheckpoint(folder, folder, "", 1, 1, len(parts), chunks, whole=False)
    family = family_of_parts(parts, folder)
    names = {name for part in parts for name in part}
    modules = family.table(replace(variant_of(family, names, checkpoint, None), tied=True))
    check_known(family, chunks, mm_index(modules), checkpoint, found)
    check_names(Chart(checkpoint, modules), None, found)

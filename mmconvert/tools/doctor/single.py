"""A single file: an MM rank file, or a weight file of a Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path

from mmconvert.causes.quantised import quantised
from mmconvert.errors import CheckpointError
from mmconvert.events import Events
from mmconvert.formats.hf.bin import SUFFIX, read_weights
from mmconvert.formats.hf.choice import SAFETENSORS
from mmconvert.formats.mm.folder import part_names
from mmconvert.sharding.layout import Chunk, Rank
from mmconvert.stored import StoredTensor
from mmconvert.tools.doctor.asked import DoctorRequest
from mmconvert.tools.doctor.chart import make_chart
from mmconvert.tools.doctor.faults import command_of
from mmconvert.tools.doctor.folder import Ranks
from mmconvert.tools.doctor.rankfiles import note_states, read_rank_file
from mmconvert.tools.doctor.report import DoctorReport
from mmconvert.tools.doctor.tensors import look_at_names
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
    states: dict[Path, int] = {}
    parts = read_rank_file(path, report, states=states)
    note_states(states, report)
    if parts is None:
        return []
    report.files = 1
    rank = Rank(0)
    chunks = {Chunk(rank, v): parts[name] for v, name in enumerate(part_names(path, parts))}
    # Never whole: a file alone does not tell how many there are.
    ranks = Ranks(path.parent, {rank: path.parent}, 1, 1, False, False, False)
    chart = make_chart(path.parent, ranks, chunks, None, report)
    report.family = ""  # many files fit several families
    if chart is not None:
        look_at_names(chart, ranks, report)
    return [tensor for part in parts.values() for tensor in part.values()]

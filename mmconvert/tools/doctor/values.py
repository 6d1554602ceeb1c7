"""What only the data can tell: copies that differ, NaN, vision q, k, v in another row order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mmconvert.converters.rows import Module
from mmconvert.errors import LayoutError, MMConvertError
from mmconvert.events import Events
from mmconvert.executor import compare
from mmconvert.executor.blockio import Region, read_compact
from mmconvert.executor.differences import TensorDifference, in_words
from mmconvert.executor.fileio import BAND, Files
from mmconvert.executor.jobs import Job, run_jobs
from mmconvert.formats.faults import Collected
from mmconvert.formats.mm.model import OpenedMM
from mmconvert.formats.model import Model
from mmconvert.names import number
from mmconvert.plan.build import build_comparison, join, zeros_of
from mmconvert.plan.dtypes import CAST_ALL, mixed_dtypes
from mmconvert.plan.plan import Comparison, Key, Side, Whole, matrix
from mmconvert.plan.reorder import reorder
from mmconvert.stored import ITEM_SIZE, StoredTensor
from mmconvert.tools.doctor.report import DoctorReport

APART = "find out which values training used; the command takes the first copy of each"
UNTIED = (
    "config.json says that both are one tensor (tie_word_embeddings): replace it or the weights "
    "by those that belong together"
)
CLOSER = 4  # times: differences so much smaller in the other row order tell which is right


def look_at_dtypes(side: Side, path: Path, report: DoctorReport) -> None:
    """Parts of one tensor that only a cast unites."""
    if mixed := mixed_dtypes(side.wholes):
        report.add("mixed-dtypes", mixed, CAST_ALL, path=path)


def look_at_replicas(
    side: Side, mm: bool, workers: int, events: Events, report: DoctorReport
) -> None:
    """Copies of one tensor hold the same bytes."""
    pairs = [
        Comparison(key, copy)
        for key, whole in side.wholes.items()
        for blocks in whole.copies[1:]
        for copy in join(whole.copies[0], blocks)
    ]
    events.start("comparing copies", compare.comparison_bytes(pairs, side.stored))
    found = compare.compare(pairs, side.stored, side.stored, workers, events.advance)
    for difference in found:
        report.add(
            "replicas-differ",
            f"copies of one tensor differ: {in_words(difference)}",
            APART if mm else UNTIED,
            path=difference.b.path,
            tensor=difference.b.name,
            flags=("--replicas", "first") if mm else None,
        )
    if pairs:
        report.checked.append(f"{number(pairs, 'piece')} of tensors that are stored more than once")


def look_at_zeros(mm: Side, hf: Side, report: DoctorReport) -> None:
    """What MM stores and HF does not is zero."""
    zeros = [
        zero
        for key, whole in mm.wholes.items()
        if key in hf.wholes
        for blocks in whole.copies
        for zero in zeros_of(key, hf.wholes[key], blocks)
    ]
    for difference in compare.not_zero(zeros, mm.stored):
        report.add(
            "not-zero",
            f"values that Hugging Face does not store are not zero: {in_words(difference)}",
            "mm_to_hf would lose them: --replicas first goes on with a warning",
            path=difference.a.path,
            tensor=difference.a.name,
        )


# ------------------------------------------------------------------- order of vision q, k, v
def look_at_encoder_qkv(
    opened: OpenedMM, side: Side, hf: Side, workers: int, events: Events, report: DoctorReport
) -> None:
    """Whether the rows of vision q, k, v stand per head, by comparison with the HF checkpoint.

    The reference tool 2.2.0 to 2.3.0 left q, k and v one below the other.
    Weights that training has changed equal neither order; the right one is much closer.
    """
    model = opened.model
    plain = {r.mm: r for m in model.modules for r in m.all_rows()}
    other = _concatenated(model)
    keys = {r.mm for m in other for r in m.all_rows() if r != plain.get(r.mm)}
    if not keys:
        return
    expected = _only(hf, keys)
    per_head = _only(side, keys)
    try:
        found, compared = _differences(expected, per_head, workers, events)
        if not compared:
            report.skipped.append("the order of vision q, k, v: nothing to compare with hf_dir")
            return
        report.checked.append(f"the order of q, k, v in {number(range(compared), 'vision tensor')}")
        if not found:
            return
        as_it_lies = replace(opened, model=replace(model, modules=other), faults=Collected())
        reordered = reorder(_only(as_it_lies.side(), keys), other, model.modules, model.dims)
        left, _ = _differences(expected, reordered, workers, events)
    except LayoutError as error:
        report.skipped.append(f"the order of vision q, k, v: {error.what}")
        return
    if left and not _size(left) * CLOSER < _size(found):
        return
    sure = "are equal" if not left else "come much closer"
    first = found[0].b
    report.add(
        "vit-qkv-concatenated",
        f"the vision encoder's q, k and v are concatenated in {number(found, 'tensor')}"
        ", as the reference tool 2.2.0 to 2.3.0 wrote them; read that way, "
        f"they {sure} to those of hf_dir",
        "resplit with --vit_qkv concatenated writes them per head, as MindSpeed-MM reads them",
        path=first.path,
        tensor=first.name,
        flags=("--vit_qkv", "concatenated"),
    )


def _concatenated(model: Model) -> tuple[Module, ...]:
    keys = {m.key for m in model.modules}
    modules = model.family.table(replace(model.variant, encoder_qkv="concatenated"))
    return tuple(m for m in modules if m.key in keys)


def _only(side: Side, templates: set[str]) -> Side:
    return replace(side, wholes={k: w for k, w in side.wholes.items() if k.mm in templates})


def _differences(
    a: Side, b: Side, workers: int, events: Events
) -> tuple[list[TensorDifference], int]:
    """Differences of the wholes that both hold in one shape and dtype, and their number."""

    def common(side: Side, other: Mapping[Key, Whole]) -> Side:
        kept = {
            key: whole
            for key, whole in side.wholes.items()
            if key in other and (other[key].shape, other[key].dtype) == (whole.shape, whole.dtype)
        }
        return replace(side, wholes=kept)

    left, right = common(a, b.wholes), common(b, a.wholes)
    pairs = build_comparison(left, right)
    events.start("comparing vision q, k, v", compare.comparison_bytes(pairs.equal, left.stored))
    found = compare.compare(pairs.equal, left.stored, right.stored, workers, events.advance)
    return found, len(left.wholes)


def _size(found: Sequence[TensorDifference]) -> float:
    return sum(math.inf if math.isnan(d.largest) else d.largest for d in found)


# ------------------------------------------------------------------------------ NaN, infinity
def look_for_nan(
    tensors: Iterable[StoredTensor], workers: int, events: Events, report: DoctorReport
) -> None:
    """Reads every value."""
    listed = list(tensors)
    lines: dict[StoredTensor, str] = {}
    events.start("reading values", sum(t.nbytes for t in listed))

    def job(tensor: StoredTensor) -> Job:
        def run(files: Files) -> tuple[StoredTensor, str]:
            try:
                return tensor, _not_finite(files, tensor)
            except MMConvertError as error:
                return tensor, error.what

        return Job((), (str(tensor.path), tensor.offset), tensor.nbytes, run)

    def finished(job: Job, result: tuple[StoredTensor, str]) -> None:
        if result[1]:
            lines.update([result])
        events.advance(job.nbytes)

    run_jobs([job(t) for t in listed], workers, finished)
    for tensor in sorted(lines):
        report.add(
            "not-finite",
            f"{tensor.name} holds {lines[tensor]}",
            "go back to an earlier iteration, or find the step that made them",
            path=tensor.path,
            tensor=tensor.name,
        )
    report.checked.append(f"the values of {number(listed, 'tensor')}")


def _not_finite(files: Files, tensor: StoredTensor) -> str:
    from mmconvert.executor.values import not_finite  # numpy: only where values are asked for

    rows, cols = matrix(tensor.shape)
    step = max(1, BAND // max(1, cols * ITEM_SIZE[tensor.dtype]))
    nans = infinities = 0
    first = ""
    for row in range(0, rows if cols else 0, step):
        region = Region(row, 0, min(step, rows - row), cols)
        found = not_finite(read_compact(files, tensor, region, "left"), tensor.dtype, cols)
        if found:
            nans, infinities = nans + found.nans, infinities + found.infinities
            first = first or str([row + found.row, found.col])
    return f"{nans} NaN and {infinities} infinite values, the first at {first}" if first else ""

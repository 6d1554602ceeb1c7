"""Experts of an MM checkpoint: transposed ones, and those that stand twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmconvert.errors import TensorError
from mmconvert.events import Events
from mmconvert.executor.blockio import Region, read_compact
from mmconvert.executor.compare import compare, comparison_bytes
from mmconvert.executor.fileio import open_files
from mmconvert.formats.faults import Collected
from mmconvert.formats.mm.model import OpenedMM
from mmconvert.formats.mm.source import TRANSPOSED
from mmconvert.names import number, summarise
from mmconvert.plan.build import join
from mmconvert.plan.plan import Comparison, Key, Side, matrix
from mmconvert.tools.doctor.report import DoctorReport

UNSURE = "; give --hf_dir to see whether the model has such experts"
ExpertWholes = tuple[Key, ...]  # the wholes of one expert


def told_as_one(found: Collected) -> None:
    """Puts one fault in the place of those of all experts that stand the other way round."""
    each = [error for error in found.errors if error.cause == TRANSPOSED]
    if len(each) < 2:
        return
    names = [name for error in each for name in error.tensors]
    fault = TensorError(
        f"{number(names, 'tensor')} of experts are transposed, as the reference's converter "
        f"writes stacks of transformers 5: {summarise(names)}",
        each[0].expected,
        each[0].fix,
        cause=TRANSPOSED,
        path=each[0].path,
        tensors=names,
    )
    found.errors[:] = [fault, *(error for error in found.errors if error not in each)]


def look_at_twins(
    opened: OpenedMM,
    side: Side,
    hf: Side | None,
    workers: int,
    events: Events,
    report: DoctorReport,
) -> None:
    """Experts that hold the values of another one of their layer: the folder of an
    expert-parallel rank that stands under two names.

    Models whose experts are copies of one MLP pass: all of them are alike, or those of ``hf``.
    """
    layers = _experts(opened, side)
    if not layers:
        return
    alike = [pair for layer in layers.values() for pair in _alike(side, layer)]
    twins = _equal(side, alike, workers, events)
    if hf is not None:
        meant = {(a[0], b[0]) for a, b in _equal(hf, twins, workers, events)}
        twins = [(a, b) for a, b in twins if (a[0], b[0]) not in meant]
    elif len(twins) == sum(len(layer) - 1 for layer in layers.values()):
        twins = []
    count = number(range(sum(map(len, layers.values()))), "expert")
    report.checked.append(f"that none of {count} is twice in its layer")
    if not twins:
        return
    (a, *_), (b, *_) = twins[0]
    one, other = (side.stored[side.wholes[key].copies[0][0].tensor] for key in (a, b))
    report.add(
        "expert-twice",
        f"{len(twins)} of {count} hold the values of another one of their layer: {other.name} in "
        f"{other.path.parent.name}, expert {b.expert} of layer {b.layer}, is expert {a.expert}, "
        f"{one.name} in {one.path.parent.name}",
        "copy the folder of that rank again" + (UNSURE if hf is None else ""),
        path=other.path,
        tensor=other.name,
    )


def _experts(opened: OpenedMM, side: Side) -> dict[int, dict[int, ExpertWholes]]:
    """The wholes of every expert, by layer and number."""
    rows = {r.mm for m in opened.model.modules for r in m.layer if r.of_expert}
    found: dict[int, dict[int, ExpertWholes]] = {}
    for key in side.wholes:
        if key.mm in rows:
            layer = found.setdefault(key.layer, {})
            layer[key.expert] = (*layer.get(key.expert, ()), key)
    return found


def _alike(
    side: Side, layer: Mapping[int, ExpertWholes]
) -> list[tuple[ExpertWholes, ExpertWholes]]:
    """Experts of a layer whose matrices begin with the same row as those of an earlier one."""
    first: dict[tuple[bytes, ...], ExpertWholes] = {}
    pairs: list[tuple[ExpertWholes, ExpertWholes]] = []
    with open_files() as files:
        for _, expert in sorted(layer.items()):
            begins: list[bytes] = []
            for key in expert:
                tensor = side.stored[side.wholes[key].copies[0][0].tensor]
                region = Region(0, 0, 1, matrix(tensor.shape)[1])
                begins.append(bytes(read_compact(files, tensor, region, "left")))
            if (known := first.setdefault(tuple(begins), expert)) != expert:
                pairs.append((known, expert))
    return pairs


def _equal(
    side: Side, pairs: Sequence[tuple[ExpertWholes, ExpertWholes]], workers: int, events: Events
) -> list[tuple[ExpertWholes, ExpertWholes]]:
    """Those of the pairs whose values are all equal."""
    listed = [
        Comparison(b, copy)
        for pair in pairs
        for a, b in zip(*pair, strict=True)
        if a in side.wholes and b in side.wholes
        for copy in join(side.wholes[a].copies[0], side.wholes[b].copies[0])
    ]
    events.start("comparing experts", comparison_bytes(listed, side.stored))
    found = compare(listed, side.stored, side.stored, workers, events.advance)
    differ = {difference.key for difference in found}
    return [(a, b) for a, b in pairs if not differ.intersection(b)]

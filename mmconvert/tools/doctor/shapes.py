"""The layout of an MM checkpoint, and the shapes of its tensors against it and the model."""

from __future__ import annotations

from typing import NamedTuple

from mmconvert.converters.family import decoder_of
from mmconvert.errors import CheckpointError, LayoutError
from mmconvert.executor.compare import same_bytes
from mmconvert.formats.mm.detect import check_layers, fits, likely_tp_size, tp_size, whole_tp_size
from mmconvert.formats.mm.source import partial_source
from mmconvert.plan.dtypes import CAST_ALL, mixed_dtypes
from mmconvert.plan.plan import Side
from mmconvert.plan.training import cautions
from mmconvert.sharding.layout import Layout
from mmconvert.tools.doctor.chart import Chart
from mmconvert.tools.doctor.folder import COPY
from mmconvert.tools.doctor.report import DoctorReport


class LayoutByShapes(NamedTuple):
    """A layout, and why the shapes of a module do not fit it ("" if they do)."""

    layout: Layout
    doubt: str


def find_layout(chart: Chart, report: DoctorReport) -> LayoutByShapes | None:
    """The layout; where shapes contradict each other, the one that most of them fit.

    None if the shapes say that tp ranks are missing: the rest would follow from that.
    """
    checkpoint = chart.as_checkpoint()
    expected = max(whole_tp_size(m, checkpoint, chart.dims) for m in chart.modules)
    if expected > chart.tp:
        report.add(
            "missing-rank-folder",
            f"{chart.folder} has the folders of {chart.tp} tp ranks; by the shapes in them the "
            f"model of config.json was divided over {expected}",
            COPY,
            path=chart.folder,
        )
        return None
    sizes: dict[str, int] = {}
    doubt = ""
    for module in chart.modules:
        try:
            size = tp_size(module, checkpoint, chart.dims, same_bytes)
            if not fits(module, checkpoint, size, chart.dims):
                doubt = f"{module.label}: the shapes contradict each other on {chart.tp} tp rank"
        except CheckpointError as error:
            size = likely_tp_size(module, checkpoint, chart.dims)
            doubt = error.what
        sizes[module.key] = size
    layout = Layout(sizes, chart.grids(), decoder=decoder_of(chart.modules))
    if not report.has(["layer-hole", "missing-rank-folder"]):
        _look_at_layers(chart, layout, report)
    return LayoutByShapes(layout, doubt)


def _look_at_layers(chart: Chart, layout: Layout, report: DoctorReport) -> None:
    try:
        check_layers(layout, chart.dims)
    except CheckpointError as error:
        report.add_error("layer-count", error, path=chart.folder)
        return
    try:
        layout.check(ordered=chart.family.ordered)
    except LayoutError as error:
        report.add("stage-order", error.what, "resplit it into another layout", path=chart.folder)


def look_at_use(chart: Chart, layout: Layout, side: Side, report: DoctorReport) -> None:
    """Names layouts that convert in both directions and that training cannot use."""
    dims = dict(chart.dims)
    for row in (r for m in chart.modules for r in m.all_rows() if len(r.rows) == 1):
        lengths = [w.shape[0] for key, w in side.wholes.items() if key.mm == row.mm and w.shape]
        if lengths:
            dims.setdefault(row.rows[0], lengths[0])
    for words in cautions(chart.modules, dims, layout):
        report.add("not-for-training", words, "resplit it into that layout", path=chart.folder)


def look_at_shapes(chart: Chart, found: LayoutByShapes, report: DoctorReport) -> Side:
    """Notes every tensor whose shape or dtype does not fit; what fits is returned as wholes."""
    side, faults = partial_source(chart.modules, chart.dims, found.layout, chart.parts)
    for tensor, fault in faults:
        what = f"{fault.what}; expected: {fault.expected}" if fault.expected else fault.what
        fix = fault.fix or "copy the rank folders of this stage again"
        report.add("wrong-shape", what, fix, path=tensor.path, tensor=tensor.name)
    if mixed := mixed_dtypes(side.wholes):
        report.add("mixed-dtypes", mixed, CAST_ALL, path=chart.folder)
    if found.doubt and not faults:  # the sizes of the model would tell which tensor is wrong
        report.add(
            "wrong-shape",
            found.doubt,
            "copy the folders of missing tp ranks; --hf_dir shows which tensors do not fit",
            path=chart.folder,
        )
    return side

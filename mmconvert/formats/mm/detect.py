"""Reads the layout of an MM checkpoint off its folders, model chunks, layer numbers and shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from mmconvert.converters.configs import Dims, LayerLists
from mmconvert.converters.rows import Module, decoder_of, with_experts_transposed
from mmconvert.errors import CheckpointError, TensorError
from mmconvert.formats.faults import STRICT, Faults
from mmconvert.formats.mm.chart import Chart
from mmconvert.formats.mm.folder import MMCheckpoint
from mmconvert.formats.mm.ranks import COPY
from mmconvert.formats.mm.source import mm_source, transposed_experts
from mmconvert.formats.mm.tpsize import (
    SameBytes,
    explains,
    first_layer,
    likely_tp_size,
    tp_size,
    whole_tp_size,
)
from mmconvert.names import NO_EXPERT, fill, number
from mmconvert.sharding.layout import Layout, grid_flag
from mmconvert.sharding.stages import StageGrid, flat, show, total


def detect_layout(chart: Chart, dims: Dims, same: SameBytes, faults: Faults = STRICT) -> Layout:
    """The layout of an MM checkpoint.

    Args:
        dims: sizes of the whole model as far as they are known.
        same: compares data; asked only where shapes cannot tell a tp size.
        faults: where those go after which reading goes on.

    Raises:
        CheckpointError: tp ranks that are missing, or shapes that no tp size explains.
    """
    checkpoint = chart.checkpoint
    expected = max(whole_tp_size(m, checkpoint, dims) for m in chart.modules)
    if expected > checkpoint.tp_folders:
        ranks = number(range(checkpoint.tp_folders), "tp rank")
        fault = CheckpointError(
            f"{checkpoint.folder} has the folders of {ranks}; by the shapes in them the model of "
            f"config.json was divided over {expected}",
            "the folders of all tp ranks",
            COPY,
            cause="missing-rank-folder",
            path=checkpoint.folder,
        )
        faults.add(fault)
        faults.stop()
    sizes: dict[str, int] = {}
    doubts: list[CheckpointError | TensorError] = []
    for module in chart.modules:
        try:
            size = tp_size(module, checkpoint, dims, same)
            if not explains(first_layer(module, checkpoint), size, dims):
                doubts.append(_contradiction(module, checkpoint))
        except CheckpointError as error:
            size = likely_tp_size(module, checkpoint, dims)
            doubts.append(error)
        if doubts and (fault := _transposed(module, checkpoint, dims, same)) is not None:
            doubts = [fault]
        sizes[module.key] = size
    decoder = decoder_of(chart.modules)
    layout = Layout(sizes, chart.grids, checkpoint.ep_size, decoder=decoder)
    if doubts:  # the sizes of the model may tell which tensors are wrong
        before = faults.found
        mm_source(chart.modules, dims, layout, checkpoint.parts, faults=faults, complete=False)
        if faults.found == before:
            faults.add(doubts[0])
    return layout


def _transposed(
    module: Module, checkpoint: MMCheckpoint, dims: Dims, same: SameBytes
) -> TensorError | None:
    """The fault of experts that stand the other way round, if that explains the shapes."""
    (other,) = with_experts_transposed((module,))
    if other == module:
        return None
    try:
        size = tp_size(other, checkpoint, dims, same)
    except CheckpointError:
        return None
    rows = first_layer(other, checkpoint)
    if not explains(rows, size, dims):
        return None
    return transposed_experts(next(shards[0] for r, shards in rows if r.of_stack))


def _contradiction(module: Module, checkpoint: MMCheckpoint) -> CheckpointError:
    ranks = number(range(checkpoint.tp_folders), "tp rank")
    return CheckpointError(
        f"{module.label}: the shapes contradict each other on {ranks}",
        "shapes of one model, and the folders of all tp ranks",
        "copy the folders of missing tp ranks; the model's hf_dir shows which tensors do not fit",
        cause="wrong-shape",
        path=checkpoint.folder,
    )


def count_experts(chart: Chart, faults: Faults = STRICT) -> Dims:
    """The number of experts in a layer, ``{module}.experts``, as an MM checkpoint's names tell.

    Raises:
        TensorError: experts with holes, or other numbers of them in other layers.
    """
    counts: Dims = {}
    for module in chart.modules:
        held: dict[tuple[int, int], set[int]] = {}
        for stage in chart.stages():
            for layer, there in chart.layers_at(stage)[module.key].items():
                experts = {e for found in there.values() for e in found} - {NO_EXPERT}
                held |= {(stage, layer): experts} if experts else {}
        if not held:
            continue
        usual = Counter(max(numbers) + 1 for numbers in held.values()).most_common(1)[0][0]
        for (stage, layer), numbers in held.items():
            if numbers != set(range(usual)):
                faults.add(_odd_experts(chart, module, stage, layer, numbers, usual))
        counts[f"{module.key}.experts"] = usual * chart.checkpoint.ep_size
    return counts


def _odd_experts(
    chart: Chart, module: Module, stage: int, layer: int, numbers: set[int], usual: int
) -> TensorError:
    each = " on each ep rank" if chart.checkpoint.ep_size > 1 else ""
    lost = sorted(set(range(usual)) - numbers)
    row = next(r for r in module.layer if r.of_expert)
    return TensorError(
        f"{module.label} layer {layer} on {chart.place(stage)} holds "
        f"{number(numbers, 'expert')}{each}, up to number {max(numbers)}; most layers hold {usual}",
        "local experts numbered from 0 without a gap, as many in every layer and rank",
        "copy all rank folders again",
        cause="expert-hole",
        path=chart.path(stage),
        tensors=[fill(row.mm, layer, expert) for expert in lost or sorted(numbers)],
    )


def layer_lists(chart: Chart, layout: Layout) -> LayerLists:
    """The layers that have rows of their own, as an MM checkpoint's names tell."""
    index, modules = chart.index, chart.modules
    layers: dict[str, set[int]] = {r.only: set() for m in modules for r in m.layer if r.only}
    if not layers:
        return {}
    first = {m.key: _first_layers(layout.grids[m.key]) for m in modules}
    for chunk, tensors in chart.checkpoint.parts.items():
        stage = chunk.virtual * layout.pp_size + chunk.rank.pp
        for name in tensors:
            found = index.find(name)
            if found and (only := found[0][1].only):
                layers[only].add(first[found[0][0].key][stage] + found[1])
    return {name: tuple(sorted(numbers)) for name, numbers in layers.items()}


def _first_layers(grid: StageGrid) -> list[int]:
    """The model's number of each stage's first layer."""
    counts = flat(grid)
    return [sum(counts[:stage]) for stage in range(len(counts))]


def assert_layout(
    found: Layout, grids: Mapping[str, StageGrid], tp: Mapping[str, int], prefix: str
) -> None:
    """Compares what the user said of a checkpoint with what it is.

    Args:
        grids, tp: what was said, by module key; absent keys assert nothing.
        prefix: how the flags begin, for messages.

    Raises:
        CheckpointError: naming both.
    """
    absent = [grid_flag(k) for k in grids if k not in found.grids]
    absent += [found.tp_flag(k) for k in tp if k not in found.tp]
    if absent:
        raise CheckpointError(
            f"{prefix}{absent[0]} is given, but the checkpoint has no such module",
            "flags for " + ", ".join(grid_flag(key) for key in found.grids),
            "leave the flag out",
        )
    wrong = [
        f"{prefix}{grid_flag(key)} says {show(grids[key])}, the checkpoint holds {show(grid)}"
        for key, grid in found.grids.items()
        if grids.get(key, grid) != grid
    ]
    wrong += [
        f"{prefix}{found.tp_flag(key)} says {tp[key]}, the checkpoint holds {size}"
        for key, size in found.tp.items()
        if tp.get(key, size) != size
    ]
    if wrong:
        raise CheckpointError(
            "; ".join(wrong),
            "the layout that the checkpoint has",
            "leave the flags out: the layout is read from the checkpoint",
        )


def check_layers(layout: Layout, dims: Dims, folder: Path) -> None:
    """Layer counts of an existing checkpoint against those of config.json.

    Raises:
        CheckpointError: naming both numbers.
    """
    wrong = [
        f"{total(grid)} by {grid_flag(key)} {show(grid)}, the model {dims[f'{key}.layers']}"
        for key, grid in layout.grids.items()
        if dims.get(f"{key}.layers", total(grid)) != total(grid)
    ]
    if wrong:
        raise CheckpointError(
            f"the checkpoint holds other numbers of layers than the model: {'; '.join(wrong)}",
            "all layers, and the hf_dir of the checkpoint's own model",
            "copy all rank folders again, or give the hf_dir that the checkpoint came from",
            cause="layer-count",
            path=folder,
        )

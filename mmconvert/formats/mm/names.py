"""What the names in an MM checkpoint tell: missing, misplaced, different between ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mmconvert.converters.rows import OUTPUT_LAYER, Module
from mmconvert.errors import TensorError
from mmconvert.formats.faults import Faults
from mmconvert.formats.mm.chart import Chart
from mmconvert.formats.mm.ranks import COPY
from mmconvert.names import NO_EXPERT, fill, number, summarise
from mmconvert.sharding.layout import Chunk
from mmconvert.sharding.stages import StageGrid, first_stage, flat, last_stage
from mmconvert.stored import StoredTensor

AGAIN = "copy the folders of this stage again from the machines that wrote them"
EVERY_TENSOR = "every tensor of the model on its rank"


def check_names(chart: Chart, tied: bool | None, faults: Faults) -> None:
    """Everything that names alone can tell.

    Args:
        tied: whether the output layer is the embedding; None if nobody says.
    """
    for stage in chart.stages():
        _ranks_of(chart, stage, faults)
        check_layers_of(chart, stage, faults)
        _missing_in_layers(chart, stage, faults)
    if not chart.whole:
        return
    if any(m.role == "decoder" for m in chart.modules) and not _ends(chart):
        faults.add(_no_last_stage(chart))
        return
    for module in chart.modules:
        _outer(chart, module, chart.grids[module.key], faults)
    _output_layer(chart, tied, faults)
    _form_of_names(chart, faults)


def _ranks_of(chart: Chart, stage: int, faults: Faults) -> None:
    """The same names on all tp and ep ranks of a stage; what few of them hold is too much."""
    parts = chart.chunks_at(stage)
    common = set[str].intersection(*map(set, parts.values())) if parts else set[str]()
    odd = chart.names_at(stage) - common - _outer_rows_elsewhere(chart, stage)
    lacks: dict[Chunk, list[str]] = {}
    exceeds: dict[Chunk, list[str]] = {}
    for name in sorted(name for name in odd if chart.index.find(name)):
        holders = [chunk for chunk, part in parts.items() if name in part]
        few = 2 * len(holders) < len(parts)
        for chunk in parts:
            if (chunk in holders) == few:
                (exceeds if few else lacks).setdefault(chunk, []).append(name)
    for found, words in ((lacks, "lacks {} that others hold"), (exceeds, "holds {} too many")):
        for chunk, names in found.items():
            path = _folder_of(parts[chunk], chart)
            fault = TensorError(
                f"{chart.rank(chunk)} of {chart.place(stage)} ({path.name}) "
                f"{words.format(number(names, 'tensor'))}: {summarise(names)}",
                "the same names on all tp and ep ranks of a stage",
                "copy this rank's folder again from the machine that wrote it",
                cause="tp-names-differ",
                path=path,
                tensors=names,
            )
            faults.add(fault)


def _outer_rows_elsewhere(chart: Chart, stage: int) -> set[str]:
    """Names that do not belong on a stage; ``_outer`` says so."""
    if not chart.whole:
        return set()
    found: set[str] = set()
    for m in chart.modules:
        grid = chart.grids[m.key]
        for rows, own in ((m.before, first_stage(grid)), (m.after, last_stage(grid))):
            found |= {r.mm for r in rows if own != stage}
    return found


def _folder_of(part: Mapping[str, StoredTensor], chart: Chart) -> Path:
    return next((tensor.path.parent for tensor in part.values()), chart.checkpoint.folder)


def check_layers_of(chart: Chart, stage: int, faults: Faults) -> None:
    """Local layers are numbered from 0 without a gap."""
    layers = chart.layers_at(stage)
    for module in chart.modules:
        earlier = sum(len(chart.layers_at(s)[module.key]) for s in range(stage))
        numbers = sorted(layers[module.key])
        gaps = sorted(set(range(max(numbers, default=-1) + 1)) - set(numbers))
        if not gaps:
            continue
        if gaps == list(range(earlier)):
            what = f"layers are numbered {numbers[0]} to {numbers[-1]}, as in the whole model"
            fix = "number the layers from 0 in every stage, as Megatron does"
        else:
            what = f"layer{'s' if len(gaps) > 1 else ''} {_listed(gaps)} missing"
            fix = COPY
        fault = TensorError(
            f"{module.label} on {chart.place(stage)}: {what}; it has {number(numbers, 'layer')}",
            "local layers numbered from 0 without a gap",
            fix,
            cause="layer-hole",
            path=chart.path(stage),
            tensors=[fill(module.layer[0].mm, gaps[0], 0)],
        )
        faults.add(fault)


def _listed(numbers: Sequence[int], limit: int = 8) -> str:
    """A few numbers, the rest as a count."""
    more = len(numbers) - limit
    return ", ".join(map(str, numbers[:limit])) + (f" and {more} more" if more > 0 else "")


def _missing_in_layers(chart: Chart, stage: int, faults: Faults) -> None:
    """Every row of a layer of which anything is there, for each of its experts."""
    layers = chart.layers_at(stage)
    before = [chart.layers_at(s) for s in range(stage)] if chart.whole else []
    for module in chart.modules:
        earlier = sum(max(found[module.key], default=-1) + 1 for found in before)
        for local, there in sorted(layers[module.key].items()):
            layer = earlier + local if chart.whole else None
            names = _lacking(module, local, layer, there)
            if names:
                model = f" (layer {layer} of the model)" if layer is not None else ""
                where = f"{module.label} layer {local} on {chart.place(stage)}{model}"
                faults.add(_lacks(chart, stage, where, names))


def _lacking(
    module: Module, local: int, layer: int | None, there: Mapping[str, set[int]]
) -> list[str]:
    """What a layer lacks.

    Args:
        local: its number in its chunk.
        layer: its number in the model; None if that is not known.
    """
    experts = {e for found in there.values() for e in found} - {NO_EXPERT}
    names: list[str] = []
    for row in module.layer:
        if row.only and (row.layers is None or layer is None or layer not in row.layers):
            continue  # not of this layer, or nobody knows
        if not row.of_expert:
            names += [] if row.mm in there else [fill(row.mm, local)]
            continue
        lost = sorted((experts or {0}) - there.get(row.mm, set()))
        names += [fill(row.mm, local, expert) for expert in lost]
    return names


def _ends(chart: Chart) -> bool:
    """Whether any stage holds what stands after the text decoder's layers, if anything does."""
    tails = {r.mm for m in chart.modules if m.role == "decoder" for r in m.after}
    return not tails or any(
        name in tails for part in chart.checkpoint.parts.values() for name in part
    )


def _no_last_stage(chart: Chart) -> TensorError:
    named = f"mp_rank_00_{chart.checkpoint.pp_size:03d}"
    staged = " (with several stages the folders are named mp_rank_TT_PPP)"
    return TensorError(
        f"no stage holds the end of the text decoder: the folders from {named} on are missing"
        + (staged if chart.checkpoint.numbers == 1 else ""),
        EVERY_TENSOR,
        COPY,
        cause="missing-rank-folder",
        path=chart.checkpoint.folder / named,
    )


def _outer(chart: Chart, module: Module, grid: StageGrid, faults: Faults) -> None:
    """What stands before and after a module's layers: on its first and last stage only. What
    stands everywhere stands on every stage.
    """
    for rows, stage in ((module.before, first_stage(grid)), (module.after, last_stage(grid))):
        where = f"{'before' if rows is module.before else 'after'} its layers"
        lost: list[str] = []
        for name in (r.mm for r in rows if r.mm != OUTPUT_LAYER):
            places = [s for s in chart.stages() if name in chart.names_at(s)]
            wrong = [s for s in places if s != stage]
            if wrong:
                end = "first" if rows is module.before else "last"
                own = f"{module.label} has its {end} layer on {chart.place(stage)}"
                faults.add(_misplaced(chart, name, wrong, own))
            elif not places:
                lost.append(name)
        if lost:
            faults.add(_lacks_outside(chart, module, lost, where, stage))
    for stage in chart.stages():
        absent = [r.mm for r in module.everywhere if r.mm not in chart.names_at(stage)]
        if absent:
            faults.add(_lacks_outside(chart, module, absent, "which every stage has", stage))


def _misplaced(chart: Chart, name: str, stages: Sequence[int], own: str) -> TensorError:
    parts = [part for stage in stages for part in chart.chunks_at(stage).values() if name in part]
    folders = sorted({part[name].path.parent for part in parts})
    return TensorError(
        f"{name} is on {', '.join(map(chart.place, stages))} "
        f"({summarise([folder.name for folder in folders])}); {own}",
        "tensors each on its stage",
        "copy all rank folders of one checkpoint again",
        cause="misplaced-tensor",
        path=folders[0],
        tensors=[name],
    )


def _lacks(
    chart: Chart, stage: int, who: str, names: Sequence[str], where: str = ""
) -> TensorError:
    return TensorError(
        f"{who} lacks {number(names, 'tensor')}{where}: {summarise(names)} "
        f"({chart.path(stage).name})",
        EVERY_TENSOR,
        AGAIN,
        cause="missing-tensor",
        path=chart.path(stage),
        tensors=names,
    )


def _lacks_outside(
    chart: Chart, module: Module, names: Sequence[str], where: str, stage: int
) -> TensorError:
    """Of tensors that stand outside the layers."""
    return _lacks(chart, stage, module.label, names, f" {where}, on {chart.place(stage)}")


def _output_layer(chart: Chart, tied: bool | None, faults: Faults) -> None:
    """The output layer on the last text stage; tied, on another stage than the embedding."""
    text = next((m for m in chart.modules if m.role == "decoder"), None)
    if text is None or all(r.mm != OUTPUT_LAYER for r in text.after):
        return
    grid = chart.grids[text.key]
    first, last = first_stage(grid), last_stage(grid)
    places = [s for s in chart.stages() if OUTPUT_LAYER in chart.names_at(s)]
    where = chart.place(last)
    if places and places != [last]:
        faults.add(_misplaced(chart, OUTPUT_LAYER, places, f"the last text layer is on {where}"))
    elif places and tied and first == last:
        what = f"{OUTPUT_LAYER} is stored beside the embedding that it is tied to, on {where}; "
        what += "Megatron expects it there only where the two are on different stages"
        fix = "write the checkpoint again; conversions read it as it is"
        faults.remark(_of_the_head("tied-head-superfluous", what, fix, chart, last))
    elif places:
        return
    elif tied is False:
        why = "(its embeddings are not tied)"
        faults.add(_lacks_outside(chart, text, [OUTPUT_LAYER], why, last))
    elif tied and first != last:
        what = f"{OUTPUT_LAYER} is missing on {where}: with tied embeddings, the last of several "
        what += "text stages holds a copy of the embedding"
        fix = "write the checkpoint again: resplit puts the copy there"
        faults.remark(_of_the_head("tied-head-missing", what, fix, chart, last))
    elif tied is None and sum(n > 0 for n in flat(grid)) > 1:
        what = f"there is no {OUTPUT_LAYER} on any stage, and nothing here says whether embeddings "
        what += "are tied"
        fix = "if the model ties its embeddings, give --cfg.hf_config.hf_dir (doctor: --hf_dir), "
        fix += "whose config.json says so; otherwise copy the rank folder of the last stage again"
        faults.add(_of_the_head("output-layer-missing", what, fix, chart, last))


def _of_the_head(cause: str, what: str, fix: str, chart: Chart, stage: int) -> TensorError:
    expected = "the output layer; with tied embeddings too on the last of several text stages"
    path = chart.path(stage)
    return TensorError(what, expected, fix, cause=cause, path=path, tensors=[OUTPUT_LAYER])


def _form_of_names(chart: Chart, faults: Faults) -> None:
    """Training looks for folders with a number for each axis that has several ranks."""
    found = chart.checkpoint
    axes = ["_PPP"] * (found.pp_size > 1) + ["_EEE"] * (found.ep_size > 1)
    if found.numbers == 1 + len(axes):
        return
    named = {2: "_000", 3: f"_{'PPP' if found.pp_size > 1 else '000'}_000"}[found.numbers]
    named = "_000_EEE" if found.ep_size > 1 else named
    remark = TensorError(
        f"the folders in {found.folder} are named mp_rank_TT{named}, but there is one rank only "
        f"where it says 000; training looks for mp_rank_TT{''.join(axes)}",
        fix="take _000 off their names",
        cause="pp-suffix-without-pp",
        path=found.folder,
    )
    faults.remark(remark)

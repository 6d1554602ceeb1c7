"""The names in an MM checkpoint: unknown, missing, misplaced, different between ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mmconvert.converters.family import OUTPUT_LAYER, Module, mm_index
from mmconvert.names import fill, number, summarise
from mmconvert.sharding.stages import StageGrid, first_stage, flat, last_stage
from mmconvert.stored import StoredTensor
from mmconvert.tools.doctor.chart import Chart
from mmconvert.tools.doctor.folder import COPY, Ranks
from mmconvert.tools.doctor.report import DoctorReport
from mmconvert.tools.doctor.shell import drop_flags, operand, quote

DROPPED = 20  # names that one command leaves out


def look_at_names(chart: Chart, ranks: Ranks, report: DoctorReport) -> None:
    """Everything that names alone can tell."""
    _unknown(chart, report)
    for stage in chart.stages():
        _tp_ranks(chart, stage, report)
        _holes(chart, stage, report)
        _missing_in_layers(chart, stage, report)
    if not chart.whole:
        return
    if chart.encoders_only:
        report.add(
            "encoders-only",
            f"{chart.folder} holds no tensor of the text decoder",
            "nothing, if it was written with save_vit_only; else copy all rank folders",
            path=chart.folder,
        )
    elif not _ends(chart):
        _no_last_stage(chart, ranks, report)
        return
    grids = chart.grids()
    for module in chart.modules:
        _outer(chart, module, grids[module.key], report)
    _output_layer(chart, grids, report)
    if ranks.suffix and ranks.pp == 1:
        _suffix(chart, report)


def _unknown(chart: Chart, report: DoctorReport) -> None:
    index = mm_index(chart.family.modules(chart.variant))
    places: dict[str, Path] = {}
    for part in chart.parts.values():
        for name, tensor in part.items():
            if not index.find(name):
                places.setdefault(name, tensor.path)
    if not places:
        return
    names = sorted(places)
    closest = index.closest(names[0])
    hint = f" (closest known name: {closest})" if closest else ""
    report.add(
        "unknown-tensor",
        f"{number(names, 'tensor')} with no place in {chart.family.name}: {summarise(names)}{hint}",
        "leave them out with --drop 'NAME' (a pattern; may be repeated)",
        path=places[names[0]],
        tensor=names[0],
        flags=drop_flags(names) if len(names) <= DROPPED else None,
    )


def _tp_ranks(chart: Chart, stage: int, report: DoctorReport) -> None:
    """The same names on all tp ranks of a stage."""
    parts = chart.chunks_at(stage)
    index = chart.index
    elsewhere = _outer_rows_elsewhere(chart, stage)
    known = {n for n in chart.names_at(stage) - elsewhere if index.find(n)}
    for chunk, part in parts.items():
        lacking = sorted(known - part.keys())
        if lacking:
            holders = [c.rank.tp for c, p in parts.items() if lacking[0] in p]
            report.add(
                "tp-names-differ",
                f"tp rank {chunk.rank.tp} of {chart.place(stage)} lacks "
                f"{number(lacking, 'tensor')} that tp rank {holders[0]} holds: "
                f"{summarise(lacking)}",
                "copy this rank's folder again from the machine that wrote it",
                path=_folder_of(part, chart),
                tensor=lacking[0],
            )


def _outer_rows_elsewhere(chart: Chart, stage: int) -> set[str]:
    """Names that do not belong on a stage; ``_outer`` says so."""
    if not chart.whole:
        return set()
    grids = chart.grids()
    found: set[str] = set()
    for m in chart.modules:
        grid = grids[m.key]
        for rows, own in ((m.before, first_stage(grid)), (m.after, last_stage(grid))):
            found |= {r.mm for r in rows if own != stage}
    return found


def _folder_of(part: Mapping[str, StoredTensor], chart: Chart) -> Path:
    return next((tensor.path.parent for tensor in part.values()), chart.folder)


def _holes(chart: Chart, stage: int, report: DoctorReport) -> None:
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
            what = f"layer{'s' if len(gaps) > 1 else ''} {summarise_numbers(gaps)} missing"
            fix = COPY
        report.add(
            "layer-hole",
            f"{module.label} on {chart.place(stage)}: {what}; it has {number(numbers, 'layer')}",
            fix,
            path=chart.path(stage),
            tensor=fill(module.layer[0].mm, gaps[0], 0),
        )


def summarise_numbers(numbers: Sequence[int], limit: int = 8) -> str:
    """A few numbers, the rest as a count."""
    more = len(numbers) - limit
    return ", ".join(map(str, numbers[:limit])) + (f" and {more} more" if more > 0 else "")


def _missing_in_layers(chart: Chart, stage: int, report: DoctorReport) -> None:
    """Every row of a layer of which anything is there."""
    layers = chart.layers_at(stage)
    before = [chart.layers_at(s) for s in range(stage)] if chart.whole else []
    for module in chart.modules:
        earlier = sum(max(found[module.key], default=-1) + 1 for found in before)
        for local, there in sorted(layers[module.key].items()):
            names = [
                fill(r.mm, local, 0)
                for r in module.layer
                if r.mm not in there
                and (r.layers is None or not chart.whole or earlier + local in r.layers)
            ]
            if names:
                model = f" (layer {earlier + local} of the model)" if chart.whole else ""
                report.add(
                    "missing-tensor",
                    f"{module.label} layer {local} on {chart.place(stage)}{model} lacks "
                    f"{number(names, 'tensor')}: {summarise(names)}",
                    "copy the folders of this stage again from the machines that wrote them",
                    path=chart.path(stage),
                    tensor=names[0],
                )


def _ends(chart: Chart) -> bool:
    """Whether any stage holds what stands after the text decoder's layers."""
    tails = {r.mm for m in chart.modules if m.role == "decoder" for r in m.after}
    return any(name in tails for part in chart.parts.values() for name in part)


def _no_last_stage(chart: Chart, ranks: Ranks, report: DoctorReport) -> None:
    named = f"mp_rank_00_{chart.pp:03d}"
    staged = "" if ranks.suffix else " (with several stages the folders are named mp_rank_TT_PPP)"
    report.add(
        "missing-rank-folder",
        f"no stage holds the end of the text decoder: the folders from {named} on are missing"
        f"{staged}",
        COPY,
        path=chart.folder / named,
    )


def _outer(chart: Chart, module: Module, grid: StageGrid, report: DoctorReport) -> None:
    """What stands before and after a module's layers: on its first and last stage only."""
    for rows, stage in ((module.before, first_stage(grid)), (module.after, last_stage(grid))):
        expected = [r.mm for r in rows if r.mm != OUTPUT_LAYER]
        lost: list[str] = []
        for name in expected:
            places = [s for s in chart.stages() if name in chart.names_at(s)]
            wrong = [s for s in places if s != stage]
            if wrong:
                report.add(
                    "misplaced-tensor",
                    f"{name} stands on {chart.place(wrong[0])}; {module.label} has its "
                    f"{'first' if rows is module.before else 'last'} layer on "
                    f"{chart.place(stage)}",
                    "copy all rank folders of one checkpoint again",
                    path=chart.path(wrong[0]),
                    tensor=name,
                )
            elif not places:
                lost.append(name)
        if lost:
            report.add(
                "missing-tensor",
                f"{module.label} lacks {number(lost, 'tensor')} "
                f"{'before' if rows is module.before else 'after'} its layers, on "
                f"{chart.place(stage)}: {summarise(lost)}",
                "copy the folders of this stage again from the machines that wrote them",
                path=chart.path(stage),
                tensor=lost[0],
            )


def _output_layer(chart: Chart, grids: Mapping[str, StageGrid], report: DoctorReport) -> None:
    """The output layer on the last text stage; tied, on another stage than the embedding."""
    text = next((m for m in chart.modules if m.role == "decoder"), None)
    row = next((r for r in text.after if r.mm == OUTPUT_LAYER), None) if text else None
    if text is None or row is None:
        return
    grid = grids[text.key]
    first, last = first_stage(grid), last_stage(grid)
    places = [s for s in chart.stages() if OUTPUT_LAYER in chart.names_at(s)]
    where, folder = chart.place(last), chart.path(last)
    if places and places != [last]:
        report.add(
            "misplaced-tensor",
            f"{OUTPUT_LAYER} stands on {', '.join(map(chart.place, places))}; the last text layer "
            f"stands on {where}",
            "copy all rank folders of one checkpoint again",
            path=chart.path(places[0]),
            tensor=OUTPUT_LAYER,
        )
    elif places:
        if chart.tied and first == last:
            report.add(
                "tied-head-superfluous",
                f"{OUTPUT_LAYER} stands beside the embedding that it is tied to, on {where}; "
                "Megatron wants it on another stage only",
                "write the checkpoint anew; conversions read it as it is",
                path=folder,
                tensor=OUTPUT_LAYER,
                flags=(),
            )
    elif chart.tied is False:
        report.add(
            "missing-tensor",
            f"{text.label} lacks {OUTPUT_LAYER} on {where}; its embeddings are not tied",
            "copy the folders of this stage again from the machines that wrote them",
            path=folder,
            tensor=OUTPUT_LAYER,
        )
    elif chart.tied and first != last:
        report.add(
            "tied-head-missing",
            f"{OUTPUT_LAYER} is missing on {where}: with tied embeddings, the last of several "
            "text stages holds a copy of the embedding",
            "write the checkpoint anew: resplit puts the copy there",
            path=folder,
            tensor=OUTPUT_LAYER,
            flags=(),
        )
    elif chart.tied is None and sum(n > 0 for n in flat(grid)) > 1:
        report.add(
            "output-layer-missing",
            f"{OUTPUT_LAYER} is on no stage, and nothing here says whether embeddings are tied",
            "run doctor again with --hf_dir; if they are tied it prints the command, else copy "
            "the folders of the last stage again",
            path=folder,
            tensor=OUTPUT_LAYER,
        )


def _suffix(chart: Chart, report: DoctorReport) -> None:
    folder = quote(operand(chart.folder))
    report.add(
        "pp-suffix-without-pp",
        f"the folders in {chart.folder} are named mp_rank_TT_000, but there is one pipeline stage "
        "only; training looks for mp_rank_TT",
        "take _000 off their names",
        path=chart.folder,
        command=f'for d in {folder}/mp_rank_*_000; do mv "$d" "${{d%_000}}"; done',
    )

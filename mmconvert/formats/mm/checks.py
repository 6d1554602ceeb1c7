"""What an MM checkpoint must hold: the names, modules and experts of its model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from mmconvert.config import ParallelConfig
from mmconvert.converters.configs import Dims
from mmconvert.converters.family import Family
from mmconvert.converters.rows import Module, Row, mm_index
from mmconvert.errors import LEAVE_OUT, CheckpointError, TensorError
from mmconvert.formats.faults import Faults
from mmconvert.formats.mm.chart import Chart
from mmconvert.formats.mm.detect import (
    assert_layout,
    count_experts,
)
from mmconvert.formats.mm.folder import MMCheckpoint
from mmconvert.formats.mm.names import check_names
from mmconvert.formats.mm.ranks import COPY
from mmconvert.formats.mm.source import ChunkTensors, claim_mm
from mmconvert.formats.recognise import by_names
from mmconvert.names import TemplateIndex, number, summarise
from mmconvert.sharding.layout import Layout
from mmconvert.sharding.stages import total

ENCODERS_ONLY = (
    "if it is meant to hold encoders only, give --cfg.save_vit_only True (resplit); otherwise copy "
    "all rank folders again"
)
TEXT = "text_decoder."  # how the MM names of every family's text decoder begin


def check_tensors(
    chart: Chart,
    tied: bool | None,
    given: ParallelConfig,
    dims: Dims,
    prefix: str,
    faults: Faults,
) -> bool:
    """Whether the names are those that they should be; the layout can be read off them.

    Args:
        dims: receives the number of experts if it is not known.

    Raises:
        CheckpointError: it cannot, as ranks or modules are missing.
    """
    before = faults.found
    _check_modules(chart, faults)
    check_names(chart, tied, faults)
    if not chart.whole:
        faults.stop()
    _check_experts(chart, given, dims, prefix, faults)
    if any(not total(grid) for grid in chart.grids.values()):
        faults.stop()
    return faults.found == before


def assert_given(
    family: Family,
    modules: tuple[Module, ...],
    layout: Layout,
    given: ParallelConfig,
    prefix: str,
) -> None:
    """Raises CheckpointError where the user says otherwise than the checkpoint."""
    # A module that was left out with save_vit_only is no contradiction.
    full = {m.key for m in modules}
    grids = {k: g for k, g in given.grids().items() if k in full or k not in family.module_keys}
    sizes = {
        k: n
        for k, n in given.tp(family.decoder).items()
        if k in full or k not in family.module_keys
    }
    assert_layout(layout, grids, sizes, prefix)


def is_without_text(
    checkpoint: MMCheckpoint,
    names: Iterable[str],
    content: Mapping[str, object] | None,
    faults: Faults,
) -> bool:
    """Whether the text decoder was left out. mmconvert.json may say so; if it is there, it counts.

    Raises:
        CheckpointError: it is not there, and nothing says that this is meant so.
    """
    if any(name.startswith(TEXT) for name in names):
        return False
    fault = CheckpointError(
        f"{checkpoint.folder} holds no tensor of the text decoder",
        "all modules of the model",
        ENCODERS_ONLY,
        cause="encoders-only",
        path=checkpoint.folder,
    )
    said = content is not None and content.get("save_vit_only") is True
    faults.remark(fault) if said else faults.add(fault)
    return True


def check_claims(
    family: Family, modules: tuple[Module, ...], dims: Dims, layout: Layout, parts: ChunkTensors
) -> None:
    """Raises TensorError for tensors that no row claims, or that stand where they should not."""
    lost = claim_mm(modules, dims, layout, parts)
    if lost:
        raise TensorError(
            f"{len(lost)} tensors have no place in {family.name}: {summarise(lost)}",
            f"only tensors of {family.name}, each on its stage",
            "copy all rank folders again, or give the hf_dir that the checkpoint came from",
            cause="misplaced-tensor",
        )


def _check_experts(
    chart: Chart, given: ParallelConfig, dims: Dims, prefix: str, faults: Faults
) -> None:
    """The experts of a checkpoint are those of the model and of the layout that the user says.

    Args:
        dims: receives the number of experts if it is not known.

    Raises:
        CheckpointError: naming both numbers.
    """
    checkpoint = chart.checkpoint
    ep = checkpoint.ep_size
    for key, count in count_experts(chart, faults).items():
        chosen = _by_routers(chart, key)
        if dims.setdefault(key, chosen or count) != count:
            faults.add(_other_count(checkpoint, count, dims[key], whole=chosen == count))
    if given.ep_size not in (0, ep):
        raise CheckpointError(
            f"{prefix}ep_size says {given.ep_size}, the checkpoint holds {ep}",
            "the layout that the checkpoint has",
            "leave the flag out: the layout is read from the checkpoint",
        )


def _by_routers(chart: Chart, dim: str) -> int:
    """The number of experts that a router chooses from; 0 if none tells."""
    for part in chart.checkpoint.parts.values():
        for name, tensor in part.items():
            hit = chart.index.find(name)
            if hit and hit[0][1].rows == (dim,) and hit[0][1].shard is None and tensor.shape:
                return tensor.shape[0]
    return 0


def _other_count(
    checkpoint: MMCheckpoint, count: int, expected: int, *, whole: bool
) -> CheckpointError:
    """The fault of too many or too few experts; of missing ranks, if these would explain it.

    Args:
        whole: the routers choose from as many as there are.
    """
    ep, each = checkpoint.ep_size, count // checkpoint.ep_size
    what = (
        f"{checkpoint.folder} holds {count} experts in a layer ({number(range(ep), 'ep rank')}); "
        f"the model has {expected}"
    )
    if not whole and count < expected and expected % each == 0:
        lost = range(ep, expected // each)
        pp = "_000" if checkpoint.pp_size > 1 else ""
        names = [f"mp_rank_00{pp}_{rank:03d}" for rank in lost]
        return CheckpointError(
            f"{what}: the folders of {number(lost, 'ep rank')} are missing, such as "
            f"{summarise(names)}",
            "every rank folder of the checkpoint",
            COPY,
            cause="missing-rank-folder",
            path=checkpoint.folder,
        )
    return CheckpointError(
        what,
        "all experts, and the hf_dir of the checkpoint's own model",
        "copy all rank folders again, or give the hf_dir that the checkpoint came from",
        cause="expert-count",
        path=checkpoint.folder,
    )


def check_known(
    family: Family,
    parts: ChunkTensors,
    index: TemplateIndex[tuple[Module, Row]],
    checkpoint: MMCheckpoint,
    faults: Faults,
) -> None:
    """Names that no row knows: another family's checkpoint, or tensors to be dropped."""
    names = {name for part in parts.values() for name in part}
    unknown = sorted(name for name in names if not index.find(name))
    if not unknown:
        _check_some_experts(family, names, index, checkpoint)
        return
    file = next(part[unknown[0]].path for part in parts.values() if unknown[0] in part)
    other = by_names(names, checkpoint.folder)
    if other.converter != family.converter:
        raise CheckpointError(
            f"{checkpoint.folder}: {len(unknown)} tensors are not of {family.name}, such as "
            f"{unknown[0]}",
            f"a checkpoint of {family.name} for {family.converter}",
            f"use {other.converter}: the names are those of {other.name}",
        )
    if _of_other_model(family, unknown):
        has = f"it has {number(unknown, 'tensor')} that hf_dir's config.json does not tell of"
        raise _other_model(family, checkpoint, f"{has}: {summarise(unknown)}", unknown)
    closest = index.closest(unknown[0])
    hint = f" (closest known name: {closest})" if closest else ""
    fault = TensorError(
        f"{file}: {number(unknown, 'tensor')} with no place in {family.name}: "
        f"{summarise(unknown)}{hint}",
        f"only tensors of {family.name}",
        LEAVE_OUT,
        cause="unknown-tensor",
        path=file,
        tensors=unknown,
    )
    faults.add(fault)


def _check_some_experts(
    family: Family,
    names: Iterable[str],
    index: TemplateIndex[tuple[Module, Row]],
    checkpoint: MMCheckpoint,
) -> None:
    """Raises CheckpointError for a text decoder without experts where the model has some."""
    found = [hit[0] for name in names if (hit := index.find(name))]
    decoder = [(m, r) for m, r in found if m.role == "decoder" and r in m.layer]
    if not decoder or not decoder[0][0].has_experts or any(r.of_expert for _, r in decoder):
        return
    some = [r for r in decoder[0][0].layer if r.of_expert]
    if all(r.layers != () for r in some):
        raise _other_model(family, checkpoint, "it has no experts", ())


def _other_model(
    family: Family, checkpoint: MMCheckpoint, how: str, tensors: Sequence[str]
) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.folder} belongs to another {family.name} than hf_dir: {how}",
        "a checkpoint and a config.json of one model",
        "give the hf_dir of the model that this checkpoint was made from",
        cause="other-model",
        path=checkpoint.folder,
        tensors=tensors,
    )


def _of_other_model(family: Family, names: Sequence[str]) -> bool:
    """Whether another model of the family has tensors of these names."""
    tables = (mm_index(family.modules(replace(v, tied=False))) for v in family.variants)
    return any(all(table.find(name) for name in names) for table in tables)


def _check_modules(chart: Chart, faults: Faults) -> None:
    """A module without any layer, which no flag has left out."""
    for module in chart.modules if chart.whole else ():
        if not total(chart.grids[module.key]):
            fault = CheckpointError(
                f"{chart.checkpoint.folder} holds no layer of {module.label}",
                "all modules of the model",
                ENCODERS_ONLY,
                cause="missing-tensor",
                path=chart.checkpoint.folder,
            )
            faults.add(fault)

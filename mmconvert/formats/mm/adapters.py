"""Opens the adapters of MM checkpoints: what LoRA training saves, or a conversion wrote."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from mmconvert.adapters import MM_A, MM_B, WEIGHT, Settings, of_manifest, of_training, weight_name
from mmconvert.config import Options, ParallelConfig
from mmconvert.converters.adapters import derived, linear, restricted
from mmconvert.converters.configs import Dims
from mmconvert.converters.family import Family, Variant
from mmconvert.converters.rows import Module, mm_index
from mmconvert.errors import CheckpointError, TensorError
from mmconvert.executor.compare import same_bytes
from mmconvert.formats import manifest
from mmconvert.formats.containers.pickles import Inert
from mmconvert.formats.containers.ptfile import read_pt
from mmconvert.formats.faults import STRICT
from mmconvert.formats.mm.chart import Chart
from mmconvert.formats.mm.detect import assert_layout, check_layers, count_experts, detect_layout
from mmconvert.formats.mm.folder import MMCheckpoint
from mmconvert.formats.mm.idle import noted_grids, with_idle_layers
from mmconvert.formats.mm.names import check_layers_of
from mmconvert.formats.mm.source import ChunkTensors, claim_mm
from mmconvert.formats.model import AdapterModel, Model, Notes
from mmconvert.names import NO_LAYER, number, summarise
from mmconvert.narrow import is_array, is_object
from mmconvert.plan.plan import matrix
from mmconvert.sharding.layout import Layout
from mmconvert.sharding.stages import flat


def mm_adapter(
    family: Family,
    checkpoint: MMCheckpoint,
    given: ParallelConfig,
    model: Model | None,
    options: Options,
    *,
    prefix: str,
) -> tuple[Model, Layout, ChunkTensors]:
    """An adapter in MM format: its model, its layout, its tensors by chunk.

    Args:
        given: what the user says of its layout; compared with what is found.
        model: the base model, if known: gives sizes.
        prefix: how the layout's flags begin, for messages.

    Raises:
        CheckpointError: not of this family, or damaged.
    """
    notes = Notes(f"{checkpoint.folder}: {note}" for note in checkpoint.notes)
    content, stale = manifest.read(checkpoint.root)
    notes.words += [stale] if stale else []
    check_converter(family, checkpoint, content)
    dims = dict(model.dims) if model else manifest.sizes(content or {})
    parts = checkpoint.parts
    weights = {weight_name(name) for part in parts.values() for name in part}
    noted = noted_traits(content or {})
    variant = variant_of(family, weights, checkpoint, model, noted)
    variant = replace(variant, encoder_qkv=options.vit_qkv)
    table = linear(family.table(variant))
    _check_known(family, table, weights, checkpoint)
    present = {r.mm for m in table for r in m.all_rows()}
    known = {hit[0][1].mm for name in weights if (hit := mm_index(table).find(name))}
    base = restricted(table, dict.fromkeys(present & known, (NO_LAYER,)))
    told = (given.grids(), noted_grids(content or {}))
    layout = _layout(derived(base), checkpoint, dims, told=any(told))
    keys = set(layout.grids)
    grids = {key: grid for key, grid in told[0].items() if key in keys}
    layout = with_idle_layers(layout, told, dims, prefix)
    sizes = {key: size for key, size in given.tp(family.decoder).items() if key in keys}
    assert_layout(layout, grids, sizes, prefix)
    check_layers(layout, dims, checkpoint.folder)
    dims |= {f"{key}.layers": sum(map(sum, grid)) for key, grid in layout.grids.items()}
    base = restricted(table, _layers(table, checkpoint, layout))
    dims |= count_experts(Chart(checkpoint, derived(base)))
    modules = derived(base)
    if lost := claim_mm(modules, dims, layout, parts):
        raise TensorError(
            f"{number(lost, 'tensor')} with no place in an adapter of {family.name}: "
            f"{summarise(lost)}",
            "A and B of linear layers, each on its stage",
        )
    rank = _rank(checkpoint)
    settings = _settings(checkpoint, content, rank)
    settings = replace(settings, structure="canonical" if variant.canonical else "fused")
    found = Model(
        family,
        variant,
        modules,
        dims,
        notes=tuple(notes.words),
        adapter=AdapterModel(settings, base),
        tied_known=False,
    )
    return found, layout, parts


def noted_traits(content: Mapping[str, object]) -> frozenset[str]:
    """The traits of config.json that a manifest notes; they change Hugging Face names."""
    noted = content.get("variant")
    traits = noted.get("traits") if is_object(noted) else None
    return frozenset(map(str, traits)) if is_array(traits) else frozenset()


def sized(model: Model, given: ParallelConfig) -> Model:
    """The model of an adapter with the numbers of layers that the layout's lists give; without
    any, as many as the adapter shows.
    """
    if model.adapter is None:
        return model
    grids, dims = given.grids(), dict(model.dims)
    for module in model.adapter.base:
        key = f"{module.key}.layers"
        last = max((max(r.layers) for r in module.all_rows() if r.layers), default=-1)
        counted = sum(flat(grids[module.key])) if module.key in grids else last + 1
        dims.setdefault(key, counted)
        if last >= dims[key]:
            raise TensorError(
                f"{module.label} layer {last} is adapted; the model has {dims[key]} layers",
                "layer counts that are those of the model",
                "correct the list of layers, or give the adapter's own base model",
            )
    return replace(model, dims=dims)


def _check_known(
    family: Family, table: tuple[Module, ...], weights: set[str], checkpoint: MMCheckpoint
) -> None:
    index = mm_index(table)
    unknown = sorted(name for name in weights if not index.find(name))
    if unknown:
        closest = index.closest(unknown[0])
        raise TensorError(
            f"{checkpoint.folder}: {number(unknown, 'adapted module')} that {family.name} does not "
            f"have: {summarise(unknown)}"
            + (f" (closest known name: {closest})" if closest else ""),
            f"an adapter of linear layers of {family.name}",
            "use the converter of its family",
        )


def _layout(
    modules: tuple[Module, ...], checkpoint: MMCheckpoint, dims: Dims, *, told: bool
) -> Layout:
    """The layout of an adapter, by its names and shapes.

    Args:
        told: something else says how many layers each stage has, so that some may be idle.
    """
    chart = Chart(checkpoint, modules)
    if not told and len(chart.stages()) > 1:
        for stage in chart.stages():
            check_layers_of(chart, stage, STRICT)
    return detect_layout(chart, dims, same_bytes)


def _layers(
    table: tuple[Module, ...], checkpoint: MMCheckpoint, layout: Layout
) -> dict[str, set[int]]:
    """The layers that are adapted, by the template of the weight's name."""
    index = mm_index(table)
    first = {key: flat(grid) for key, grid in layout.grids.items()}
    found: dict[str, set[int]] = defaultdict(set)
    for chunk, tensors in checkpoint.parts.items():
        stage = chunk.virtual * layout.pp_size + chunk.rank.pp
        for name in tensors:
            hit = index.find(weight_name(name))
            if hit is not None:
                (module, row), local, _ = hit
                before = sum(first[module.key][:stage])
                found[row.mm].add(NO_LAYER if local == NO_LAYER else before + local)
    return found


def _rank(checkpoint: MMCheckpoint) -> int:
    """The rank of all matrices.

    Raises:
        TensorError: A without B, or several ranks.
    """
    ranks: dict[int, str] = {}
    for tensors in checkpoint.parts.values():
        for name, tensor in tensors.items():
            a = name.endswith(MM_A)
            other = weight_name(name).removesuffix(WEIGHT) + (MM_B if a else MM_A)
            if other not in tensors:
                raise TensorError(
                    f"{name} in {tensor.path} is unpaired: there is no {other}",
                    "A and B of every module that is adapted",
                    "copy the checkpoint again",
                )
            rows, cols = matrix(tensor.shape)
            ranks.setdefault(rows if a else cols, f"{name} in {tensor.path}")
    if len(ranks) > 1:
        raise TensorError(
            "the ranks of the matrices differ: "
            + "; ".join(f"{rank} of {name}" for rank, name in sorted(ranks.items())[:2]),
            "one rank for all, as training has one lora_r",
            "copy the checkpoint again, if its files come from two trainings",
        )
    return next(iter(ranks))


def _settings(
    checkpoint: MMCheckpoint, content: Mapping[str, object] | None, rank: int
) -> Settings:
    """What training, or the conversion, noted of the adapter.

    Raises:
        TensorError: another rank than the matrices have.
    """
    file = next(tensor.path for part in checkpoint.parts.values() for tensor in part.values())
    args = read_pt(file).content.get("args")
    values = args.state if isinstance(args, Inert) else args
    trained = of_training(values) if is_object(values) else None
    noted = of_manifest(content) if content else None
    for said, where in ((trained, f"args in {file}"), (noted, manifest.NAME)):
        if said is None:
            continue
        if said.r != rank:
            raise TensorError(
                f"{checkpoint.folder}: the matrices have the rank {rank}; {where} has r {said.r}",
                "the rank that the matrices have",
                "copy the checkpoint again, if its files come from two trainings",
            )
        return said
    return Settings(rank)


def check_converter(
    family: Family, checkpoint: MMCheckpoint, content: Mapping[str, object] | None
) -> None:
    """Raises CheckpointError if the manifest names another converter."""
    converter = content.get("converter") if content else None
    if isinstance(converter, str) and converter != family.converter:
        raise CheckpointError(
            f"{checkpoint.root / manifest.NAME} says that {converter} wrote this checkpoint",
            f"a checkpoint of {family.name} for {family.converter}",
            f"use {converter}",
        )


def variant_of(
    family: Family,
    names: set[str],
    checkpoint: MMCheckpoint,
    model: Model | None,
    noted: frozenset[str] = frozenset(),
) -> Variant:
    """The variant whose table knows most of the names, and of these the smallest.

    Args:
        noted: traits of config.json by the manifest, where there is no model.

    Raises:
        CheckpointError: none knows any.
    """
    candidates = family.variants
    if model is not None:
        choices = {v.canonical for v in candidates}
        own = model.variant
        candidates = tuple(
            Variant(canonical=c, traits=own.traits, lists=own.lists) for c in choices
        )
    elif noted:
        candidates = (*(replace(v, traits=noted) for v in candidates), *candidates)

    def fit(variant: Variant) -> tuple[int, bool, int]:
        modules = family.modules(variant)
        index = mm_index(modules)
        known = sum(index.find(name) is not None for name in names)
        told = bool(noted) and variant.traits == noted
        return known, told, -sum(len(m.all_rows()) for m in modules)

    best = max(candidates, key=fit)
    if not fit(best)[0]:
        raise CheckpointError(
            f"{checkpoint.folder}: no tensor is one of {family.name}; the first is "
            f"{min(names, default='none at all')}",
            f"a checkpoint of {family.name}",
            "use the converter of its family",
        )
    return best

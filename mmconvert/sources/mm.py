"""Opens MM checkpoints: variant chosen by names, layout read off the folder, all claimed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mmconvert import manifest
from mmconvert.compare import same_bytes
from mmconvert.config import Options, ParallelConfig
from mmconvert.converters.family import Dims, Family, Variant, mm_index
from mmconvert.detect import assert_layout, check_layers, detect_layout
from mmconvert.errors import CheckpointError, TensorError
from mmconvert.formats.megatron import MMCheckpoint, open_mm
from mmconvert.names import summarise
from mmconvert.sharding.layout import Chunk, Layout
from mmconvert.sides.mm_source import Parts, claim_mm
from mmconvert.sources.model import ENCODERS, Model, dropped_by
from mmconvert.stored import StoredTensor


def mm_model(
    family: Family,
    folder: Path,
    given: ParallelConfig,
    model: Model | None,
    options: Options,
    *,
    prefix: str,
    vit_only: bool = False,
) -> tuple[Model, Layout, Parts]:
    """Opens an MM checkpoint: its model, its layout, its tensors by chunk.

    Args:
        given: what the user says of its layout; compared with what is found.
        model: the HF checkpoint that it came from, if known: gives sizes.
        prefix: how the layout's flags begin, for messages.

    Raises:
        CheckpointError: not a checkpoint of this family, or damaged.
    """
    checkpoint = open_mm(folder)
    notes = [f"{checkpoint.folder}: {note}" for note in checkpoint.notes]
    dims = dict(model.dims) if model else _manifest_dims(family, checkpoint, notes)
    parts = _without(checkpoint, options, notes)
    names = {name for tensors in parts.values() for name in tensors}
    variant = _variant_of(family, names, checkpoint, model)
    if model is not None and model.tied_known:
        tied = model.variant.tied
    else:
        tied = _looks_tied(family, parts, checkpoint)
    variant = replace(variant, tied=tied, vit_qkv=options.vit_qkv)
    modules = family.modules(variant)
    if vit_only:
        modules = tuple(m for m in modules if m.key in ENCODERS)
        index = mm_index(modules)
        parts = {c: {n: t for n, t in p.items() if index.find(n)} for c, p in parts.items()}
    checkpoint = replace(checkpoint, parts=parts)
    layout = detect_layout(modules, checkpoint, dims, same_bytes)
    if given.ep_size not in (0, 1):
        raise CheckpointError(
            f"{prefix}ep_size says {given.ep_size}, the checkpoint holds 1",
            f"1: {family.name} has no experts",
        )
    # A module that was left out with save_vit_only is no contradiction.
    full = {m.key for m in modules}
    grids = {k: g for k, g in given.grids().items() if k in full or k not in family.module_keys}
    sizes = {k: n for k, n in given.tp().items() if k in full or k not in family.module_keys}
    assert_layout(layout, grids, sizes, prefix)
    check_layers(layout, dims)
    lost = claim_mm(modules, layout, parts)
    if lost:
        raise TensorError(
            f"{len(lost)} tensors have no place in {family.name}: {summarise(lost)}",
            f"only tensors of {family.name}, each on its stage",
            "leave them out with --drop 'NAME' (a pattern; may be repeated)",
        )
    dims |= {f"{key}.layers": sum(map(sum, grid)) for key, grid in layout.grids.items()}
    return Model(family, variant, modules, dims, None, {}, tuple(notes)), layout, parts


def _manifest_dims(family: Family, checkpoint: MMCheckpoint, notes: list[str]) -> Dims:
    content, note = manifest.read(checkpoint.root)
    if note:
        notes.append(note)
    if content is None:
        return {}
    if content.get("converter") != family.converter:
        raise CheckpointError(
            f"{checkpoint.root / manifest.NAME} says {content.get('converter')!r}",
            f"a checkpoint that {family.converter} wrote",
            f"use {content.get('converter')}",
        )
    return manifest.sizes(content)


def _without(
    checkpoint: MMCheckpoint, options: Options, notes: list[str]
) -> dict[Chunk, dict[str, StoredTensor]]:
    dropped: dict[str, set[str]] = {}
    kept: dict[Chunk, dict[str, StoredTensor]] = {}
    for chunk, tensors in checkpoint.parts.items():
        kept[chunk] = {}
        for name, tensor in tensors.items():
            pattern = dropped_by((name,), options.drop)
            if pattern:
                dropped.setdefault(pattern, set()).add(name)
            else:
                kept[chunk][name] = tensor
    for pattern, names in dropped.items():
        notes.append(f"{len(names)} tensors left out (--drop {pattern}): {summarise(names)}")
    return kept


def _variant_of(
    family: Family, names: set[str], checkpoint: MMCheckpoint, model: Model | None
) -> Variant:
    """The variant whose table knows most of the names, and of these the smallest."""
    candidates = family.variants
    if model is not None:
        choices = {v.canonical for v in candidates}
        candidates = tuple(Variant(canonical=c, traits=model.variant.traits) for c in choices)

    def fit(variant: Variant) -> tuple[int, int]:
        modules = family.modules(variant)
        index = mm_index(modules)
        known = sum(index.find(name) is not None for name in names)
        return known, -sum(len(m.all_rows()) for m in modules)

    best = max(candidates, key=fit)
    if not fit(best)[0]:
        raise CheckpointError(
            f"{checkpoint.folder}: no tensor is one of {family.name}; the first is "
            f"{min(names, default='none at all')}",
            f"a checkpoint of {family.name}",
            "use the converter of its family",
        )
    return best


def _looks_tied(family: Family, parts: Parts, checkpoint: MMCheckpoint) -> bool:
    """Without config.json: tied if mmconvert.json says so, or if there is no output layer."""
    content, _ = manifest.read(checkpoint.root)
    variant = content.get("variant") if content else None
    if isinstance(variant, dict) and isinstance(variant.get("tied"), bool):
        return bool(variant["tied"])
    rows = [r for m in family.modules(Variant(tied=True)) for r in m.all_rows() if r.tied_to]
    heads = [t[r.mm] for t in parts.values() for r in rows if r.mm in t]
    if not heads:
        return True
    origins = [t[r.tied_to] for t in parts.values() for r in rows if r.tied_to in t]
    return len(origins) == len(heads) and all(
        same_bytes(a, b) for a, b in zip(origins, heads, strict=True)
    )

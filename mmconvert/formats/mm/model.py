"""Opens MM checkpoints: variant chosen by names, layout read off the folder, all claimed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mmconvert.adapters import BASE_LAYER
from mmconvert.config import Options, ParallelConfig
from mmconvert.converters.configs import Dims
from mmconvert.converters.family import Family, Variant
from mmconvert.converters.rows import OUTPUT_LAYER, Module, bound, encoders, mm_index
from mmconvert.errors import CheckpointError, RequestError, TensorError
from mmconvert.executor.compare import same_bytes
from mmconvert.formats import manifest
from mmconvert.formats.base import ModelPart
from mmconvert.formats.faults import STRICT, Faults
from mmconvert.formats.mm.adapters import check_converter, mm_adapter, noted_traits, variant_of
from mmconvert.formats.mm.chart import Chart
from mmconvert.formats.mm.checks import (
    assert_given,
    check_claims,
    check_known,
    check_tensors,
    is_without_text,
)
from mmconvert.formats.mm.detect import (
    check_layers,
    detect_layout,
    layer_lists,
)
from mmconvert.formats.mm.folder import MMCheckpoint, adapters_alone, open_mm, part_of
from mmconvert.formats.mm.source import TRANSPOSED, ChunkTensors, mm_source
from mmconvert.formats.model import Model, Notes, dropped_by, drops_too_much
from mmconvert.formats.recognise import mm_form_of
from mmconvert.names import TemplateIndex
from mmconvert.narrow import is_object
from mmconvert.plan.plan import Side
from mmconvert.sharding.layout import Chunk, Layout
from mmconvert.stored import StoredTensor


@dataclass(frozen=True)
class OpenedMM:
    """An MM checkpoint that was opened.

    Attributes:
        model: its model.
        layout: how it is laid out.
        chart: its tensors, by pipeline stage.
        tied: whether its output layer is the embedding; None if nobody says.
        complete: its names are those that they should be.
        faults: where those of its reader went.
    """

    model: Model
    layout: Layout
    chart: Chart
    tied: bool | None
    complete: bool = True
    faults: Faults = STRICT

    @property
    def parts(self) -> ChunkTensors:
        """Its tensors, by name, by chunk."""
        return self.chart.checkpoint.parts

    def side(self, *, as_hf: bool = False) -> Side:
        """Its wholes as they are stored; matrices as MM has them, or as Hugging Face."""
        return mm_source(
            self.model.modules,
            self.model.dims,
            self.layout,
            self.parts,
            transposed=as_hf,
            faults=self.faults,
            complete=self.complete,
        )


def _check_form(family: Family, checkpoint: MMCheckpoint, folder: Path) -> None:
    """Raises FormError for what is no plain model."""
    fault = mm_form_of(checkpoint.parts.values(), checkpoint.folder, family)
    if fault is None:
        return
    if any(BASE_LAYER in name for part in checkpoint.parts.values() for name in part):
        fault.fix = (
            f"merge both: lora_merge --cfg.base_dir {folder} --cfg.lora_dir {folder}; "
            "lora_mm_to_hf takes the adapter alone"
        )
    raise fault


def mm_model(
    family: Family,
    folder: Path,
    given: ParallelConfig,
    model: Model | None,
    options: Options,
    *,
    prefix: str,
    encoders_only: bool = False,
    part: ModelPart = "",
    faults: Faults = STRICT,
) -> OpenedMM:
    """Opens an MM checkpoint: its model, its layout, its tensors by chunk.

    Args:
        given: what the user says of its layout; compared with what is found.
        model: the HF checkpoint that it came from, if known: gives sizes.
        prefix: how the layout's flags begin, for messages.
        part: see :class:`mmconvert.formats.base.Opening`.
        faults: where those go after which reading goes on.

    Raises:
        CheckpointError: not a checkpoint of this family, or damaged.
    """
    checkpoint = part_of(open_mm(folder, faults), part)
    if adapters_alone({name for part in checkpoint.parts.values() for name in part}):
        adapter, layout, _ = mm_adapter(family, checkpoint, given, model, options, prefix=prefix)
        return OpenedMM(adapter, layout, Chart(checkpoint, adapter.modules), None, faults=faults)
    _check_form(family, checkpoint, folder)
    notes = Notes(f"{checkpoint.folder}: {note}" for note in checkpoint.notes)
    content, stale = manifest.read(checkpoint.root)
    notes.words += [stale] if stale else []
    check_converter(family, checkpoint, content)
    dims = dict(model.dims) if model else manifest.sizes(content or {})
    parts, used = _without(family, checkpoint, options, notes)
    names = {name for tensors in parts.values() for name in tensors}
    if checkpoint.whole and not encoders_only:
        encoders_only = is_without_text(checkpoint, names, content, faults)
    variant = variant_of(family, names, checkpoint, model, noted_traits(content or {}))
    if model is not None and model.tied_known:
        tied: bool | None = model.variant.tied
    else:
        tied = encoders_only or _looks_tied(family, variant, parts, content)
    variant = replace(variant, tied=tied is not False, encoder_qkv=options.vit_qkv)
    if options.experts == "transposed":
        variant = replace(variant, experts_transposed=_has_stacks(family, variant))
    modules = family.table(variant)
    check_known(family, parts, mm_index(modules), checkpoint, faults)
    if encoders_only:
        modules = encoders(modules)
    index = mm_index(modules)
    parts = {c: {n: t for n, t in p.items() if index.find(n)} for c, p in parts.items()}
    chart = Chart(replace(checkpoint, parts=parts), modules)
    complete = check_tensors(chart, tied, given, dims, prefix, faults)
    if tied is None and not encoders_only and OUTPUT_LAYER not in names:
        notes.words.append(
            "warning: there is no output layer and no config.json: embeddings are taken to be tied"
        )
    known = {dim: size for dim, size in dims.items() if dim != family.vocabulary}
    layout = _layout(chart, known, options, faults)
    words = _unpadded(modules, parts, layout, dims, family.vocabulary)
    if model is None:
        lists = layer_lists(chart, layout)
        variant = replace(variant, lists=tuple(lists.items()))
        modules = bound(modules, lists)
    assert_given(family, modules, layout, given, prefix)
    if complete:
        faults.attempt(lambda: check_layers(layout, dims, checkpoint.folder), None)
        faults.attempt(lambda: check_claims(family, modules, dims, layout, parts), None)
    dims |= {f"{key}.layers": sum(map(sum, grid)) for key, grid in layout.grids.items()}
    found = Model(
        family,
        variant,
        modules,
        dims,
        notes=tuple(notes.words),
        patterns=used,
        dropped=notes.dropped,
        words=words,
    )
    return OpenedMM(found, layout, replace(chart, modules=modules), tied, complete, faults)


def _layout(chart: Chart, dims: Dims, options: Options, faults: Faults) -> Layout:
    """How it is laid out.

    Raises:
        CheckpointError: as :func:`detect_layout`; experts that are not transposed, where the
            options say so.
    """
    try:
        return detect_layout(chart, dims, same_bytes, faults)
    except TensorError as error:
        if error.cause != TRANSPOSED or options.experts != "transposed":
            raise
        raise CheckpointError(
            f"--experts transposed: the experts of {chart.checkpoint.folder} are stored as "
            "Megatron has them",
            "experts that the reference transposed",
            "leave the flag out",
        ) from None


def _has_stacks(family: Family, variant: Variant) -> bool:
    """True; raises RequestError for models whose experts are not of stacks."""
    if any(r.of_stack for m in family.modules(variant) for r in m.layer):
        return True
    raise RequestError(
        f"--experts transposed: {family.name} has no experts that Hugging Face stacks",
        "Qwen3-VL with experts",
        "leave the flag out",
    )


def _unpadded(
    modules: tuple[Module, ...], parts: ChunkTensors, layout: Layout, dims: Dims, vocabulary: str
) -> int:
    """The rows that the vocabulary has without those that pad it; 0 if none do.

    Args:
        dims: receives the rows that it has here.
        vocabulary: the name of that dimension.
    """
    rows = {r.mm for m in modules for r in m.before if r.rows == (vocabulary,)}
    held: dict[tuple[int, int], int] = {}
    for chunk, tensors in parts.items():
        if chunk.rank.ep or chunk.rank.tp >= layout.tp.get(layout.decoder, 1):
            continue
        for name in rows & tensors.keys():
            place = (chunk.rank.pp, chunk.virtual)
            held[place] = held.get(place, 0) + tensors[name].shape[0]
    words, found = dims.get(vocabulary, 0), max(held.values(), default=0)
    if not words or found <= words:
        return 0
    dims[vocabulary] = found
    return words


def _without(
    family: Family, checkpoint: MMCheckpoint, options: Options, notes: Notes
) -> tuple[dict[Chunk, dict[str, StoredTensor]], frozenset[str]]:
    """The tensors that no --drop pattern fits, and the patterns that fit some.

    Raises:
        RequestError: a pattern that fits a tensor which the model needs.
    """
    needed = TemplateIndex(
        (mm, True)
        for mm in {
            r.mm
            for variant in family.variants
            for m in family.modules(variant)
            for r in m.all_rows()
            if r.mm != OUTPUT_LAYER
        }
    )
    dropped: dict[str, set[str]] = {}
    kept: dict[Chunk, dict[str, StoredTensor]] = {}
    for chunk, tensors in checkpoint.parts.items():
        kept[chunk] = {}
        for name, tensor in tensors.items():
            pattern = dropped_by((name,), options.drop)
            if not pattern:
                kept[chunk][name] = tensor
                continue
            if needed.find(name):
                raise drops_too_much(pattern, name)
            dropped.setdefault(pattern, set()).add(name)
    for pattern, names in dropped.items():
        notes.drop(f"--drop {pattern}", sorted(names))
    return kept, frozenset(dropped)


def _looks_tied(
    family: Family, variant: Variant, parts: ChunkTensors, content: Mapping[str, object] | None
) -> bool | None:
    """Whether the output layer is the embedding, where config.json is not at hand.

    mmconvert.json says it; else two equal tensors. None without an output layer.
    """
    said = content.get("variant") if content else None
    if is_object(said) and isinstance(said.get("tied"), bool):
        return bool(said["tied"])
    table = family.modules(replace(variant, tied=True))
    rows = [r for m in table for r in m.all_rows() if r.tied_to]
    heads = [t[r.mm] for t in parts.values() for r in rows if r.mm in t]
    origins = [t[r.tied_to] for t in parts.values() for r in rows if r.tied_to in t]
    if not heads:
        return None
    return len(origins) == len(heads) and all(
        same_bytes(a, b) for a, b in zip(origins, heads, strict=True)
    )

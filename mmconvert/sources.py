"""Opens checkpoints with a family's eyes: names normalised, every tensor claimed, the variant
of the table chosen, the layout read off the folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

from mmconvert import converters, manifest
from mmconvert.compare import same_bytes
from mmconvert.config import Options, ParallelConfig
from mmconvert.converters.family import (
    Dims,
    Family,
    Module,
    Variant,
    flag,
    hf_templates,
    mm_index,
)
from mmconvert.detect import assert_layout, check_layers, detect_layout
from mmconvert.errors import CheckpointError, LayoutError, RequestError, TensorError
from mmconvert.formats.hf import HFCheckpoint, open_hf, read_config
from mmconvert.formats.megatron import MMCheckpoint, open_mm
from mmconvert.formats.stored import StoredTensor
from mmconvert.names import summarise
from mmconvert.sharding.layout import GRID_FLAG, Chunk, Layout
from mmconvert.sides import Parts, claim_mm

ENCODERS = {"vit", "audio"}  # what save_vit_only keeps


@dataclass(frozen=True)
class Model:
    """A checkpoint's model: the family's table in the variant that fits, and its sizes.

    Attributes:
        modules: the table; without the text decoder if only the encoders are wanted.
        dims: sizes as far as they are known.
        hf: the HF checkpoint, if it is one.
        hf_tensors: its tensors that have a row, by name in hub spelling.
        notes: what was left out, in words.
        tied_known: whether config.json or the tensors tell if the output layer is tied.
    """

    family: Family
    variant: Variant
    modules: tuple[Module, ...]
    dims: Dims
    hf: HFCheckpoint | None = None
    hf_tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tied_known: bool = True

    @property
    def plain_modules(self) -> tuple[Module, ...]:
        """The table of what we write: vision q, k and v interleaved."""
        plain = self.family.modules(replace(self.variant, vit_qkv="interleaved"))
        keys = {m.key for m in self.modules}
        return tuple(m for m in plain if m.key in keys)


# ------------------------------------------------------------------------------------------ HF


def check_family(family: Family, config: Mapping[str, object], folder: Path) -> None:
    """Raises CheckpointError if config.json is of another family; says which converter fits."""
    kind = config.get("model_type")
    if kind in family.model_types:
        return
    fitting = [name for name, other in converters.registry().items() if kind in other.model_types]
    raise CheckpointError(
        f"{folder / 'config.json'} is of model_type {kind!r}",
        f"{' or '.join(sorted(family.model_types))} for {family.converter}",
        f"use {fitting[0]}" if fitting else "no converter here serves this model_type",
    )


def config_model(family: Family, folder: Path) -> Model:
    """Sizes from a folder's config.json alone, without any weights."""
    config = read_config(folder)
    check_family(family, config, folder)
    said = _said_tied(config)
    variant = Variant(tied=bool(said))
    dims = family.dims(config)
    return Model(family, variant, family.modules(variant), dims, tied_known=said is not None)


def hf_model(
    family: Family,
    folder: Path,
    options: Options,
    *,
    canonical: bool = False,
    vit_only: bool = False,
    llm_dir: Path | None = None,
) -> Model:
    """Opens an HF checkpoint; every tensor is claimed by a row or named as left out.

    Raises:
        TensorError: tensors that nothing claims.
    """
    checkpoint = open_hf(folder)
    config = checkpoint.config
    check_family(family, config, folder)
    table = family.modules(Variant())
    tensors = _by_hub_name(family, checkpoint)
    notes: list[str] = []
    if llm_dir is not None:
        config, tensors = _with_text_of(llm_dir, family, table, config, tensors, notes)
    tensors = _claimed(family, table, tensors, options, notes)
    variant = Variant(tied=_tied(config, tensors), canonical=canonical, vit_qkv=options.vit_qkv)
    modules = family.modules(variant)
    if vit_only:
        modules = tuple(m for m in modules if m.key in ENCODERS)
        kept = hf_templates(modules)
        left = [name for name in tensors if not kept.find(name)]
        tensors = {name: t for name, t in tensors.items() if kept.find(name)}
        notes.append(f"{len(left)} tensors outside the encoders left out (save_vit_only)")
    return Model(family, variant, modules, family.dims(config), checkpoint, tensors, tuple(notes))


def _by_hub_name(family: Family, checkpoint: HFCheckpoint) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for file in checkpoint.files:
        for tensor in file.tensors:
            name = family.hub_name(tensor.name)
            if name in found:
                raise TensorError(
                    f"{file.path}: {tensor.name} and {found[name].name} are the same tensor",
                    "one spelling of each name",
                )
            found[name] = tensor
    return found


def _claimed(
    family: Family,
    table: tuple[Module, ...],
    tensors: Mapping[str, StoredTensor],
    options: Options,
    notes: list[str],
) -> dict[str, StoredTensor]:
    """The tensors that have a row; the others are named in notes, or are an error."""
    index = hf_templates(table)
    kept: dict[str, StoredTensor] = {}
    lost: list[str] = []
    reasons: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        pattern = _dropped_by((name, tensor.name), options.drop)
        why = f"--drop {pattern}" if pattern else family.why_dropped(name)
        if why:
            reasons.setdefault(why, []).append(tensor.name)
        elif index.find(name):
            kept[name] = tensor
        else:
            closest = index.closest(name)
            lost.append(tensor.name + (f" (closest known name: {closest})" if closest else ""))
    if lost:
        raise TensorError(
            f"{len(lost)} tensors have no place in MM format: {summarise(lost)}",
            f"only tensors of {family.name}",
            "leave them out with --drop 'NAME' (a pattern; may be repeated)",
        )
    for why, names in reasons.items():
        notes.append(f"{len(names)} tensors left out ({why}): {summarise(names)}")
    return kept


def _dropped_by(names: Iterable[str], patterns: Iterable[str]) -> str | None:
    names = tuple(names)
    return next((p for p in patterns if any(fnmatchcase(n, p) for n in names)), None)


def _said_tied(config: Mapping[str, object]) -> bool | None:
    """What config.json says of tied embeddings; None if nothing, or two different things."""
    nested = config.get("text_config")
    parts = (config, nested) if isinstance(nested, dict) else (config,)
    said = {value for part in parts if (value := flag((part,), "tie_word_embeddings")) is not None}
    return said.pop() if len(said) == 1 else None


def _tied(config: Mapping[str, object], tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether the output layer is the embedding: as config.json says, else as the tensors say."""
    said = _said_tied(config)
    return "lm_head.weight" not in tensors if said is None else said


def _with_text_of(
    folder: Path,
    family: Family,
    table: tuple[Module, ...],
    config: Mapping[str, object],
    tensors: Mapping[str, StoredTensor],
    notes: list[str],
) -> tuple[dict[str, object], dict[str, StoredTensor]]:
    """The model with the text decoder of a plain language model in place of its own."""
    text = tuple(m for m in table if m.key == "llm")
    index = hf_templates(text)
    other = open_hf(folder)
    if "vision_config" in other.config:
        raise CheckpointError(
            f"llm_hf_dir {folder} is a multimodal checkpoint", "a plain language model"
        )
    own = [name for name in tensors if index.find(name)]
    merged = {name: t for name, t in tensors.items() if not index.find(name)}
    merged |= _by_hub_name(family, other)
    notes.append(f"{len(own)} text tensors of hf_dir left out: llm_hf_dir {folder} replaces them")
    top = {k: v for k, v in config.items() if k != "tie_word_embeddings"}
    return {**top, "text_config": dict(other.config)}, merged


# ------------------------------------------------------------------------------------------ MM


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
    variant = _variant_of(family, names, checkpoint)
    known = model is not None and model.tied_known
    tied = model.variant.tied if known else _looks_tied(family, parts, checkpoint)
    variant = replace(variant, tied=tied, vit_qkv=options.vit_qkv)
    modules = family.modules(variant)
    if vit_only:
        modules = tuple(m for m in modules if m.key in ENCODERS)
        index = mm_index(modules)
        parts = {c: {n: t for n, t in p.items() if index.find(n)} for c, p in parts.items()}
    checkpoint = replace(checkpoint, parts=parts)
    layout = detect_layout(modules, checkpoint, dims, same_bytes)
    assert_layout(layout, given.grids(), given.tp(), prefix)
    check_layers(layout, dims, "")
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
            pattern = _dropped_by((name,), options.drop)
            if pattern:
                dropped.setdefault(pattern, set()).add(name)
            else:
                kept[chunk][name] = tensor
    for pattern, names in dropped.items():
        notes.append(f"{len(names)} tensors left out (--drop {pattern}): {summarise(names)}")
    return kept


def _variant_of(family: Family, names: set[str], checkpoint: MMCheckpoint) -> Variant:
    """The variant whose table knows most of the names."""

    def known(variant: Variant) -> int:
        index = mm_index(family.modules(variant))
        return sum(index.find(name) is not None for name in names)

    best = max(family.variants, key=known)
    if not known(best):
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


def target_layout(model: Model, given: ParallelConfig, prefix: str) -> Layout:
    """The layout to write, checked against the model's layer counts.

    Without any list everything stands on one stage.

    Raises:
        LayoutError: lists or sizes that are missing, too many, or do not fit.
    """
    if given.ep_size not in (0, 1):
        raise LayoutError(
            f"{prefix}ep_size is {given.ep_size}", f"1: {model.family.name} has no experts"
        )
    grids = given.grids()
    keys = model.family.module_keys
    extra = [key for key in grids if key not in keys]
    if extra:
        raise LayoutError(
            f"{prefix}{GRID_FLAG[extra[0]]} is given, but {model.family.name} has no such module",
            "lists for " + ", ".join(GRID_FLAG[key] for key in keys),
        )
    wanted = [key for key in keys if any(m.key == key for m in model.modules)]
    if not grids:
        grids = {key: ((model.dims[f"{key}.layers"],),) for key in wanted}
    absent = [GRID_FLAG[key] for key in wanted if key not in grids]
    if absent:
        raise LayoutError(
            f"{prefix}{absent[0]} is missing",
            "a list for each of " + ", ".join(GRID_FLAG[key] for key in wanted),
        )
    sizes = given.tp()
    default = sizes.get("llm", 1)
    bad = [size for size in (given.tp_size, *sizes.values()) if size is not None and size < 1]
    if bad:
        raise LayoutError(f"{prefix}tp_size is {bad[0]}", "a size of at least 1")
    layout = Layout({key: sizes.get(key, default) for key in grids}, grids)
    layout.check()
    check_layers(layout, model.dims, prefix)
    return layout


def unchecked_units(model: Model, found: Layout, wanted: Layout) -> list[str]:
    """Warnings where a tp size could cut through heads whose number nobody tells."""
    notes: list[str] = []
    for module in model.modules:
        units = {r.shard.unit for r in module.all_rows() if r.shard and r.shard.unit}
        unknown = sorted(unit for unit in units if unit not in model.dims)
        if unknown and found.tp[module.key] % wanted.tp[module.key]:
            notes.append(
                f"warning: {module.label}: the numbers {', '.join(unknown)} are not known (no "
                "mmconvert.json, no --cfg.hf_config.hf_dir); not checked that tp size "
                f"{wanted.tp[module.key]} keeps heads whole"
            )
    return notes


def check_option(options: Options) -> None:
    """Raises RequestError for options that make no sense when nothing is read from MM."""
    if options.vit_qkv != "interleaved":
        raise RequestError(
            "--vit-qkv says how an MM checkpoint that is read is ordered; hf_to_mm reads none",
            "--vit-qkv with mm_to_hf or resplit",
        )

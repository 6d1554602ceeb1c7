"""Opens HF checkpoints: spelling normalised, every tensor claimed or left out by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmconvert import converters
from mmconvert.causes.quantised import left_over
from mmconvert.config import Options
from mmconvert.converters.configs import flag
from mmconvert.converters.family import Family, Variant
from mmconvert.converters.rows import OUTPUT_LAYER, Module, encoders, hf_templates
from mmconvert.errors import (
    CheckpointError,
    RequestError,
    blamed,
)
from mmconvert.formats.faults import STRICT, Faults
from mmconvert.formats.hf import scaled
from mmconvert.formats.hf.claims import by_hub_name, claim_hf, hf_form_of
from mmconvert.formats.hf.folder import ANOTHER_CONFIG, open_hf, read_config
from mmconvert.formats.model import Model, Notes, dropped_by
from mmconvert.stored import StoredTensor


def check_model_type(family: Family, config: Mapping[str, object], folder: Path) -> None:
    """Raises CheckpointError if config.json is of another family; says which converter fits."""
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in family.model_types:
        return
    fitting = [
        name
        for name, other in {**converters.registry(), **converters.ms_registry()}.items()
        if isinstance(kind, str) and kind in other.model_types
    ]
    raise CheckpointError(
        f"{folder / 'config.json'} has model_type {kind!r}",
        f"{' or '.join(sorted(family.model_types))} for {family.converter}",
        f"use {fitting[0]}" if fitting else "no converter here serves this model_type",
    )


def config_model(family: Family, folder: Path) -> Model:
    """Sizes from a folder's config.json alone, without any weights."""
    config = read_config(folder)
    check_model_type(family, config, folder)
    said = _said_tied(family, config)
    lists = tuple(family.lists(config).items())
    variant = Variant(tied=bool(said), traits=family.traits(config), lists=lists)
    dims = family.dims(config)
    return Model(family, variant, family.table(variant), dims, tied_known=said is not None)


def hf_model(
    family: Family,
    folder: Path,
    options: Options,
    *,
    canonical: bool = False,
    encoders_only: bool = False,
    text_dir: Path | None = None,
    faults: Faults = STRICT,
) -> Model:
    """Opens an HF checkpoint; every tensor is claimed by a row or named as left out.

    Args:
        faults: where those go after which reading goes on.

    Raises:
        TensorError: tensors that nothing claims.
    """
    checkpoint = open_hf(folder, faults)
    config = checkpoint.config
    check_model_type(family, config, folder)
    _check_choices(family, canonical, text_dir)
    with blamed("damaged-config", folder / "config.json", fix=ANOTHER_CONFIG):
        traits = family.traits(config)
    tensors = by_hub_name(family, checkpoint, faults)
    if options.dequantize:
        tensors = scaled.dequantised(tensors, config, folder)
    traits |= family.shape_traits(config, {name: t.shape for name, t in tensors.items()})
    table = family.modules(Variant(traits=traits))
    notes = Notes([*checkpoint.notes, *scaled.note(tensors)])
    if text_dir is not None:
        config, tensors = _with_text_of(text_dir, family, table, config, tensors, notes)
    everything = list(tensors.values())
    carried = {name: t for name, t in tensors.items() if family.why_carried(name)}
    fault = hf_form_of(family, table, tensors, config, folder)
    if fault is not None:
        raise fault
    if (note := left_over(config)) and not options.dequantize:
        notes.words.append(f"warning: {note}")
        what, _, fix = note.partition("; ")
        place = folder / "config.json"
        faults.remark(CheckpointError(what, fix=fix, cause="quantization-config-left", path=place))
    with blamed("damaged-config", folder / "config.json", fix=ANOTHER_CONFIG):
        dims, lists = family.dims(config), tuple(family.lists(config).items())
        _said_tied(family, config)
    tensors = {name: t for name, t in tensors.items() if name not in carried}
    tensors = claim_hf(family, table, tensors, options, notes, faults)
    variant = Variant(
        tied=is_tied(family, table, config, tensors),
        canonical=canonical,
        encoder_qkv=options.vit_qkv,
        traits=traits,
        lists=lists,
    )
    modules = family.table(variant)
    if encoders_only:
        modules = encoders(modules)
        kept = hf_templates(modules)
        left = [name for name in tensors if not kept.find(name)]
        tensors = {name: t for name, t in tensors.items() if kept.find(name)}
        notes.drop("save_vit_only: outside the encoders", left)
    return Model(
        family,
        variant,
        modules,
        dims,
        checkpoint,
        tensors,
        tuple(notes.words),
        tuple(carried.values()),
        frozenset(p for p in options.drop if any(dropped_by((t.name,), (p,)) for t in everything)),
        dropped=notes.dropped,
    )


def _check_choices(family: Family, canonical: bool, text_dir: Path | None) -> None:
    if canonical and not family.canonical:
        raise RequestError(
            f"enable_canonical_hf_struct is not possible for {family.name}",
            "the flag False: there is no canonical structure for this family",
        )
    if text_dir is not None and not family.plain_text:
        raise RequestError(
            f"llm_hf_dir is not possible for {family.name}",
            "no --cfg.common_model_config.llm_hf_dir: its text decoder comes from hf_dir",
        )


def _said_tied(family: Family, config: Mapping[str, object]) -> bool | None:
    """What config.json says of tied embeddings; None if nothing, or two different things."""
    said = {
        value
        for part in (config, family.text_config(config))
        if (value := flag((part,), "tie_word_embeddings")) is not None
    }
    return said.pop() if len(said) == 1 else None


def is_tied(
    family: Family,
    table: tuple[Module, ...],
    config: Mapping[str, object],
    tensors: Mapping[str, StoredTensor],
) -> bool:
    """Whether the output layer is the embedding: as config.json says, else as the tensors say."""
    said = _said_tied(family, config)
    if said is not None:
        return said
    heads = [r.hf[0] for m in table for r in m.all_rows() if r.mm == OUTPUT_LAYER]
    return not any(head in tensors for head in heads)


def _with_text_of(
    folder: Path,
    family: Family,
    table: tuple[Module, ...],
    config: Mapping[str, object],
    tensors: Mapping[str, StoredTensor],
    notes: Notes,
) -> tuple[dict[str, object], dict[str, StoredTensor]]:
    """The model with the text decoder of a plain language model in place of its own."""
    text = tuple(m for m in table if m.role == "decoder")
    index = hf_templates(text)
    other = open_hf(folder)
    notes.words += other.notes
    if other.config.get("vision_config") is not None:
        raise CheckpointError(
            f"llm_hf_dir {folder} is a multimodal checkpoint", "a plain language model"
        )
    own = [name for name in tensors if index.find(name)]
    merged = {name: t for name, t in tensors.items() if not index.find(name)}
    merged |= by_hub_name(family, other)
    notes.drop(f"llm_hf_dir {folder} replaces the text decoder of hf_dir", own)
    top = {k: v for k, v in config.items() if k != "tie_word_embeddings"}
    return {**top, "text_config": dict(other.config)}, merged

"""Which tensors of a folder are read, by whose table, and how they are named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mmconvert.config.dcp import DCPLayout
from mmconvert.converters.family import Family, Variant
from mmconvert.converters.rows import mm_index
from mmconvert.errors import CheckpointError, TensorError
from mmconvert.formats import manifest
from mmconvert.formats.base import Opening
from mmconvert.formats.dcp.generic import GenericFamily
from mmconvert.formats.dcp.naming import KNOWN_PREFIXES, MODEL, Naming
from mmconvert.formats.dcp.reader import default_naming, known_names
from mmconvert.formats.faults import STRICT
from mmconvert.formats.model import Model, Notes, dropped_by
from mmconvert.names import summarise
from mmconvert.stored import StoredTensor


def fitting_pattern(name: str, patterns: Sequence[str]) -> str | None:
    """The --drop pattern that a flat name fits, with or without what stands before it."""
    inner = (name[len(p) :] for p in KNOWN_PREFIXES if name.startswith(p))
    return dropped_by((name, *inner), patterns)


def kept_tensors(
    tensors: Mapping[str, StoredTensor], told: Opening, notes: Notes
) -> dict[str, StoredTensor]:
    """The tensors without those that are left out by name."""
    left: dict[str, list[str]] = {}
    kept: dict[str, StoredTensor] = {}
    carried = tuple(told.family.carried) if isinstance(told.family, GenericFamily) else ()
    for name, tensor in tensors.items():
        pattern = fitting_pattern(name, told.options.drop)
        stays = next((c.why for c in carried if name.startswith(_flat(told.family, c.prefix))), "")
        if pattern or stays:
            left.setdefault(f"--drop {pattern}" if pattern else stays, []).append(name)
        else:
            kept[name] = tensor
    for why, names in left.items():
        notes.drop(why, names)
    return kept


def _flat(family: Family, name: str) -> str:
    naming = family.rules.naming if isinstance(family, GenericFamily) else default_naming(family)
    return naming.dcp(name)


def model_of(path: Path, told: Opening) -> Model:
    """The table that the tensors have, by the original model, else by our own manifest."""
    family, like = told.family, told.like
    if not told.claims or not family.converter:
        return Model(family, Variant(), (), {})
    if like is not None:
        return Model(family, like.variant, like.modules, like.dims, tied_known=like.tied_known)
    content = manifest.read(path)[0] or {}
    dims = manifest.sizes(content)
    if dims and content.get("converter") == family.converter:
        variant = manifest.variant(content)
        table = family.table(variant)
        none = {f"{module.key}.layers": 0 for module in table}  # a manifest leaves these out
        return Model(family, variant, table, none | dims)
    if told.faults is not STRICT:  # an examination goes on without
        return Model(family, Variant(), (), {})
    raise CheckpointError(
        f"{path} does not tell the sizes of its model",
        "config.json of the original model",
        "give --cfg.hf_config.hf_dir, the folder of the original model; with verify and diff, "
        "compare it with that folder",
    )


def naming_of(told: Opening, names: list[str], path: Path, variant: Variant) -> Naming | None:
    """How the tensors are named; None where they have MM names.

    Raises:
        TensorError: names that the family does not have.
    """
    family = told.family
    if isinstance(family, GenericFamily):
        return family.rules.naming
    if isinstance(told.layout, DCPLayout) and told.layout.dcp_prefix != "auto":
        return Naming(MODEL + told.layout.dcp_prefix)
    prefix = known_names(family, names, variant)
    if prefix is not None:
        return Naming(prefix)
    tables = [mm_index(family.modules(one)) for one in (variant, *family.variants)]
    inner = [name.removeprefix(MODEL) for name in names]
    if any(all(table.find(name) for name in inner) for table in tables):
        return None
    raise TensorError(
        f"{path}: its tensors are not those of {family.name}: {summarise(names)}",
        "model., a prefix, and the names of Hugging Face; or MM names",
        "give --cfg.source_layout.dcp_prefix, or leave tensors out with --drop",
    )


def without_carried(
    family: Family, tensors: Mapping[str, StoredTensor], notes: Notes
) -> dict[str, StoredTensor]:
    """The tensors without those that the family carries or drops."""
    kept: dict[str, StoredTensor] = {}
    left: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        why = family.why_carried(name) or family.why_dropped(name)
        if why:
            left.setdefault(why, []).append(name)
        else:
            kept[name] = tensor
    for why, names in left.items():
        notes.drop(why, names)
    return kept

"""Which family a checkpoint is of: from config.json, mmconvert.json, or its tensors' names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mmconvert import converters
from mmconvert.causes.folders import other_form
from mmconvert.causes.tensors import unusable
from mmconvert.converters.family import Family, mm_index
from mmconvert.errors import CheckpointError, FormError
from mmconvert.formats import manifest
from mmconvert.formats.hf.folder import has_weights, read_config
from mmconvert.formats.mm.folder import is_mm, open_mm
from mmconvert.names import TemplateIndex
from mmconvert.stored import FLOATS, StoredTensor

if TYPE_CHECKING:
    from mmconvert.converters.mindspore import MSFamily


def is_hf(folder: Path) -> bool:
    """Whether a folder is an HF checkpoint (else it is taken for an MM checkpoint)."""
    return (folder / "config.json").is_file()


def ms_family_of(folder: Path) -> MSFamily | None:
    """The family of an HF checkpoint that has a MindSpore form; None if it has none.

    Raises:
        CheckpointError: config.json cannot be read.
    """
    kind = read_config(folder).get("model_type")
    families = converters.ms_registry().values()
    return next((f for f in families if isinstance(kind, str) and kind in f.model_types), None)


def knows_all(family: Family, names: Iterable[str]) -> bool:
    """Whether a family's table knows every one of these MM names."""
    index = mm_index(family.modules(family.variants[0]))
    return all(index.find(name) for name in names)


def family_of(*folders: Path) -> Family:
    """The family of checkpoints that belong together: an HF folder among them tells it, else
    the first MM folder's tensors.

    Raises:
        CheckpointError: no family here serves them.
    """
    families = converters.registry()
    for folder in folders:
        if is_hf(folder):
            kind = read_config(folder).get("model_type")
            for family in families.values():
                if isinstance(kind, str) and kind in family.model_types:
                    return family
            other = ms_family_of(folder)
            raise CheckpointError(
                f"{folder / 'config.json'} is of model_type {kind!r}",
                "one of " + ", ".join(sorted(t for f in families.values() for t in f.model_types)),
                f"{other.name} goes to MindSpore: use {other.converter} hf_to_ms" if other else "",
            )
    content, _ = manifest.read(folders[0])
    said = content.get("converter") if content else None
    if isinstance(said, str) and said in families:
        return families[said]
    if has_weights(folders[0]):
        read_config(folders[0])  # raises, as it is not there
    if not is_mm(folders[0]) and (fault := other_form(folders[0])) is not None:
        raise fault
    parts = open_mm(folders[0]).parts
    if (fault := mm_form_of(parts.values(), folders[0])) is not None:
        raise fault
    return by_names({name for part in parts.values() for name in part}, folders[0])


def mm_form_of(parts: Iterable[Mapping[str, StoredTensor]], folder: Path) -> FormError | None:
    """Why tensors, by their MM names, are no plain weights of any family's model."""
    index = TemplateIndex(
        {
            row.mm: (row.mm, True)
            for family in converters.registry().values()
            for variant in family.variants
            for module in family.modules(variant)
            for row in module.all_rows()
        }.values()
    )
    tensors: dict[str, StoredTensor] = {}
    for part in parts:
        for name, tensor in part.items():
            if name not in tensors or tensor.dtype not in FLOATS or 0 in tensor.shape:
                tensors[name] = tensor
    return unusable(tensors, lambda name: index.find(name) is not None, {}, folder)


def by_names(names: set[str], folder: Path) -> Family:
    """The family one of whose tables knows all MM names, or most, with the fewest rows to spare.

    Raises:
        CheckpointError: no family knows any.
    """
    families = converters.registry()
    best: tuple[int, int, str] = (0, 0, "")
    for converter, family in families.items():
        for variant in family.variants:
            modules = family.modules(variant)
            index = mm_index(modules)
            found = [index.find(name) for name in names]
            rows = {hit[0][1].mm for hit in found if hit}
            unused = sum(len(m.all_rows()) for m in modules) - len(rows)
            best = max(best, (sum(hit is not None for hit in found), -unused, converter))
    if not best[2]:
        raise CheckpointError(
            f"{folder}: no family here knows these tensors, such as {min(names, default='none')}",
            "a checkpoint of " + ", ".join(sorted(f.name for f in families.values())),
        )
    return families[best[2]]

"""Which family a checkpoint is of: from config.json, mmconvert.json, or its tensors' names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from mmconvert import converters
from mmconvert.adapters import parse_key, weight_name
from mmconvert.causes.folders import other_form
from mmconvert.causes.tensors import unusable
from mmconvert.converters.family import Family
from mmconvert.converters.rows import mm_index
from mmconvert.errors import CheckpointError, FormError
from mmconvert.formats import manifest
from mmconvert.formats.hf.folder import has_weights, read_config
from mmconvert.formats.mm.folder import adapters_alone, open_mm
from mmconvert.formats.mm.ranks import is_mm
from mmconvert.formats.peft.names import Names
from mmconvert.formats.registry import load, recognise
from mmconvert.names import TemplateIndex
from mmconvert.stored import FLOATS, StoredTensor


def hf_family(folder: Path) -> Family:
    """The family of an HF checkpoint, by ``model_type`` of its config.json.

    Raises:
        CheckpointError: config.json cannot be read, or no family serves it.
    """
    path, kind = folder / "config.json", read_config(folder).get("model_type")
    if not isinstance(kind, str) or not kind.strip():
        raise CheckpointError(
            f"{path}: model_type is {kind!r}",
            "the model_type of a model",
            "take config.json from the model's page",
            cause="damaged-config",
            path=path,
        )
    families = converters.registry()
    for family in (*families.values(), *converters.ms_registry().values()):
        if kind in family.model_types:
            return family
    raise CheckpointError(
        f"{path} has model_type {kind!r}",
        "one of " + ", ".join(sorted(t for f in families.values() for t in f.model_types)),
        cause="unsupported-model",
        path=path,
    )


def mm_family(folder: Path) -> Family:
    """The family of an MM checkpoint, by mmconvert.json, else by its tensors' names.

    Raises:
        CheckpointError: no family here serves it.
    """
    content, _ = manifest.read(folder)
    said = content.get("converter") if content else None
    families = converters.registry()
    if isinstance(said, str) and said in families:
        return families[said]
    if has_weights(folder):
        read_config(folder)  # raises, as it is not there
    if not is_mm(folder) and (fault := other_form(folder)) is not None:
        raise fault
    return family_of_parts(open_mm(folder).parts.values(), folder)


def family_of_parts(parts: Collection[Mapping[str, StoredTensor]], folder: Path) -> Family:
    """The family of an MM checkpoint by its tensors' names alone.

    Raises:
        CheckpointError: no family here serves it.
    """
    names = {name for part in parts for name in part}
    if adapters_alone(names):
        return by_names({weight_name(name) for name in names}, folder)
    if (fault := mm_form_of(parts, folder)) is not None:
        raise fault
    return by_names(names, folder)


def ms_family(names: Iterable[str]) -> Family | None:
    """The family whose table knows every one of MindSpore's names; None if there is none."""
    names = list(names)
    for family in converters.ms_registry().values():
        index = mm_index(family.table(family.variants[0]))
        if all(index.find(name) for name in names):
            return family
    return None


def family_of(*paths: Path, naming: str = "mm") -> Family:
    """The family of checkpoints that belong together: a Hugging Face folder among them tells it,
    else the first one's tensors.

    Args:
        naming: that its table must lead to; "" takes any.

    Raises:
        CheckpointError: no family here serves them, or only one that leads elsewhere.
    """
    kinds = {path: recognise(path) for path in paths}
    path = next((path for path in paths if kinds[path] == "hf"), paths[0])
    family = load(kinds[path] or "mm").family(path)
    if family is None:
        raise CheckpointError(
            f"{path}: no family here knows these tensors", "a checkpoint of a known model"
        )
    if naming and family.naming != naming:
        kind = read_config(path).get("model_type") if kinds[path] == "hf" else family.name
        types = {t for f in converters.registry().values() for t in f.model_types}
        raise CheckpointError(
            f"{path / 'config.json'} has model_type {kind!r}",
            "one of " + ", ".join(sorted(types)),
            f"{family.name} goes to MindSpore: use {family.converter} hf_to_ms",
        )
    return family


def family_by_hf_names(names: Iterable[str]) -> Family | None:
    """The family that knows most of the modules of an adapter's keys, and has the fewest others;
    None if none knows any.
    """
    modules = {key.module for name in names if (key := parse_key(name)) is not None}
    best: tuple[int, int] = (0, 0)
    found: Family | None = None
    for family in converters.registry().values():
        for variant in family.variants:
            known = sum(map(Names(family, family.modules(variant)).has, modules))
            fit = (known, -sum(len(m.all_rows()) for m in family.modules(variant)))
            if known and fit > best:
                best, found = fit, family
    return found


def mm_form_of(
    parts: Iterable[Mapping[str, StoredTensor]], folder: Path, family: Family | None = None
) -> FormError | None:
    """Why tensors, by their MM names, are no plain weights of a family's model.

    Args:
        family: None: of any family's.
    """
    index = TemplateIndex(
        {
            row.mm: (row.mm, True)
            for one in (converters.registry().values() if family is None else (family,))
            for variant in one.variants
            for module in one.modules(variant)
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
            cause="unknown-family",
            path=folder,
        )
    return families[best[2]]

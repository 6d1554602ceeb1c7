"""Opens adapters of either kind, as what they add to the tensors of their base model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from mmconvert.config import Options
from mmconvert.converters.configs import Dims
from mmconvert.converters.family import Family
from mmconvert.errors import CheckpointError, MMConvertError
from mmconvert.formats.base import Opening
from mmconvert.formats.hf.model import config_model
from mmconvert.formats.mm.deltas import mm_deltas
from mmconvert.formats.mm.folder import adapters_alone, open_mm
from mmconvert.formats.mm.ranks import is_mm
from mmconvert.formats.model import Model
from mmconvert.formats.peft.files import named_base
from mmconvert.formats.peft.folder import open_peft
from mmconvert.formats.peft.format import variant_of_keys
from mmconvert.formats.peft.merge import peft_adapter
from mmconvert.formats.peft.names import Names
from mmconvert.formats.registry import load, recognise
from mmconvert.plan.products import Adapter


def holds_adapter(path: Path) -> bool:
    """Whether a path is an adapter alone, of PEFT or in MM format."""
    try:
        if is_mm(path):
            parts = open_mm(path).parts.values()
            return adapters_alone(name for part in parts for name in part)
        return recognise(path) == "peft"
    except MMConvertError:
        return False


def open_adapter(
    path: Path,
    family: Family,
    options: Options,
    like: Model | None = None,
    *,
    alpha: float | None = None,
    factor: float = 1.0,
    base_is_residual: bool = False,
    traits: Iterable[str] = (),
    sizes: Dims | None = None,
) -> Adapter:
    """An adapter, whose deltas have the names of the hub.

    Args:
        like: the base model, if it is at hand: gives sizes and names.
        alpha: what the user says of lora_alpha.
        factor: what the scaling is multiplied with.
        base_is_residual: see :func:`mmconvert.formats.peft.merge.peft_adapter`.
        traits, sizes: of the base model's config.json, where ``like`` does not tell them.

    Raises:
        CheckpointError: no adapter, or nothing tells its alpha.
    """
    if recognise(path) == "mm":
        stored = load("mm").open(path, Opening(family, options, like=like, part="adapter"))
        if stored.model.adapter is None:
            raise CheckpointError(
                f"{path} is a whole model, not an adapter", "the folder of a LoRA training"
            )
        return mm_deltas(stored, alpha, factor, mean=options.replicas == "mean")
    base = named_base(path)
    if like is None and base is not None:
        like = config_model(family, base)
    variant = like.variant if like else variant_of_keys(family, path)
    if like is None:
        variant = replace(variant, traits=variant.traits | frozenset(traits))
    names = Names(family, family.table(replace(variant, canonical=False)))
    found = open_peft(path, names, like.dims if like else sizes or {}, alpha)
    return peft_adapter(found, factor, base_is_residual=base_is_residual)

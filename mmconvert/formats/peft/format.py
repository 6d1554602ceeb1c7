"""Adapters of PEFT, as a format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from mmconvert.adapters import CONFIG, parse_key
from mmconvert.config.lora import PEFTChoices
from mmconvert.converters.adapters import derived, restricted
from mmconvert.converters.family import Family, Variant
from mmconvert.converters.rows import Module
from mmconvert.errors import CheckpointError, RequestError, TensorError
from mmconvert.formats.base import Format, Opening, Placed, Placing, StoredCheckpoint
from mmconvert.formats.containers.image import FileImage, small
from mmconvert.formats.containers.safetensors import safetensors_image
from mmconvert.formats.contents import Look
from mmconvert.formats.model import AdapterModel, Model
from mmconvert.formats.peft.config import config_text
from mmconvert.formats.peft.files import SAFETENSORS, named_base, read_file, weight_path
from mmconvert.formats.peft.folder import PEFTFolder, open_peft, untrained
from mmconvert.formats.peft.folding import fold_notes, uniform
from mmconvert.formats.peft.merge import residual_note
from mmconvert.formats.peft.names import Names
from mmconvert.formats.peft.side import (
    adapter_side,
    grouped,
    notes_of,
    packed,
    refuse_growth,
    with_rank,
)
from mmconvert.formats.peft.target import peft_target, spelling_note, stack_note
from mmconvert.formats.recognise import family_by_hf_names, hf_family
from mmconvert.formats.wholes import plain
from mmconvert.names import NO_LAYER, summarise
from mmconvert.plan.plan import Side
from mmconvert.stored import Target


@dataclass(frozen=True, kw_only=True)
class PEFTStored(StoredCheckpoint):
    """An adapter of PEFT that was opened.

    Attributes:
        folder: what it holds.
        own: its matrices in the form of MM format.
    """

    folder: PEFTFolder
    own: Side

    def side(self, modules: tuple[Module, ...] | None = None, *, as_hf: bool = False) -> Side:
        """Its matrices in the one structure that it was opened for."""
        del modules, as_hf
        return self.own


@dataclass(frozen=True, kw_only=True)
class PEFTPlaced(Placed):
    """An adapter of PEFT that is to be written; ``config`` is its adapter_config.json."""

    config: bytes


class PEFT(Format):
    """adapter_config.json and adapter_model.safetensors."""

    name: ClassVar = "peft"
    title: ClassVar = "PEFT adapter"
    naming: ClassVar = "hf"
    Layout: ClassVar = PEFTChoices
    own_names: ClassVar = r"adapter_(model\.safetensors|config\.json)"

    def recognise(self, path: Path) -> bool:
        """By adapter_config.json, or the weight file's name, where no model stands."""
        if not path.is_dir() or (path / "config.json").is_file():
            return False
        return (path / CONFIG).is_file() or weight_path(path) is not None

    def family(self, path: Path) -> Family | None:
        """By its base model, if that is on this disk; else by the modules that it changes."""
        if (base := named_base(path)) is not None:
            return hf_family(base)
        file, _ = read_file(path)
        return family_by_hf_names([tensor.name for tensor in file.tensors])

    def look(self, path: Path) -> Look:
        """Its matrices under their own names."""
        from mmconvert.formats import single

        found = weight_path(path)
        if found is None:
            raise CheckpointError(f"{path} holds no adapter", f"{SAFETENSORS} and {CONFIG}")
        seen = single.look(found)
        wholes, stored = plain((tensor.name, tensor) for tensor in seen.listing)
        family = self.family(path)
        return replace(
            seen, wholes=wholes, stored=stored, family=family.name if family else seen.family
        )

    def open(self, path: Path, told: Opening) -> PEFTStored:
        """Every matrix is of a linear layer of the family; packed as the structure says."""
        family, base = told.family, told.like
        given = told.layout if isinstance(told.layout, PEFTChoices) else PEFTChoices()
        variant = replace(base.variant, canonical=False) if base else variant_of_keys(family, path)
        dims = dict(base.dims) if base else {}
        names = Names(family, family.table(variant))
        folder = open_peft(path, names, dims, given.lora_alpha)
        refuse_others(folder)
        for key, count in _experts(folder, names).items():
            dims.setdefault(key, count)
        layers = _layers(folder, family, variant, dims)
        variant = replace(variant, canonical=_canonical(folder, variant, given, family, layers))
        base_rows = rows_of(folder, family, variant)
        found = packed(base_rows, layers, folder.parts, dims)
        if given.exact_rank:
            refuse_growth(found, family.canonical)
        of = uniform(found, folder.settings, fold=given.fold_scaling)
        settings = with_rank(folder.settings, of, found, variant.canonical)
        words = notes_of(found, of, settings)
        words += fold_notes(found, of) if given.fold_scaling else []
        if settings.dropout:
            words.append(
                f"dropout {settings.dropout:g} is for training only, and is not carried over"
            )
        words += untrained(folder)
        words += residual_note(folder)
        model = Model(
            family,
            variant,
            derived(base_rows),
            dims,
            notes=tuple(words),
            adapter=AdapterModel(settings, base_rows),
            tied_known=base is not None and base.tied_known,
        )
        side = adapter_side(found, of)
        return PEFTStored(format=self.name, path=path, model=model, folder=folder, own=side)

    def place(self, asked: Placing) -> Placed:
        """A and B of every Hugging Face layer, in the spelling that is asked for."""
        model = asked.source.model
        given = asked.layout if isinstance(asked.layout, PEFTChoices) else PEFTChoices()
        if model.adapter is None:
            raise RequestError(
                f"{asked.source.path} is a model, not an adapter", "the folder of a LoRA training"
            )
        settings = model.adapter.settings
        if given.lora_alpha is not None:
            if settings.alpha not in (None, given.lora_alpha):
                raise CheckpointError(
                    f"--cfg.lora_alpha says {given.lora_alpha:g}, the checkpoint "
                    f"{settings.alpha:g}",
                    "one alpha",
                    "leave the flag out",
                )
            settings = replace(settings, alpha=given.lora_alpha)
        settings.scale("", settings.r)  # raises where nothing tells alpha
        side, adapted = peft_target(model, asked.wholes, given.names)
        config = config_text(settings, model, adapted, given.names, given.base_model)
        notes = [spelling_note(model.family, given.names), stack_note(adapted)]
        return PEFTPlaced(side=side, notes=tuple(filter(None, notes)), config=config)

    def lay_out(
        self, targets: Sequence[Target], placed: Placed, asked: Placing
    ) -> Iterator[FileImage]:
        """The weight file and its configuration."""
        del asked
        assert isinstance(placed, PEFTPlaced)  # noqa: S101 - narrows the type: it is our own
        numbers = sorted(range(len(targets)), key=lambda number: targets[number].name)
        yield safetensors_image(SAFETENSORS, targets, numbers, {"format": "pt"})
        yield small(CONFIG, placed.config)


def variant_of_keys(family: Family, path: Path) -> Variant:
    """The variant whose linear layers know most of an adapter's names, and of these the smallest.

    Source: nothing but the names; config.json of the base model tells more.
    """
    file, _ = read_file(path)
    keys = [key.module for t in file.tensors if (key := parse_key(t.name)) is not None]

    def fit(variant: Variant) -> tuple[int, int]:
        table = family.table(variant)
        names = Names(family, table)
        known = sum(names.knows(key) for key in keys)
        return known, -sum(len(m.all_rows()) for m in table)

    return max((v for v in family.variants if not v.canonical), key=fit)


def _canonical(
    folder: PEFTFolder,
    variant: Variant,
    given: PEFTChoices,
    family: Family,
    layers: Mapping[str, int],
) -> bool:
    """Whether q, k, v and gate, up stay apart: as asked, else where no A serves them all."""
    if given.structure == "canonical" and not family.canonical:
        raise RequestError(
            f"enable_canonical_hf_struct is not possible for {family.name}",
            "the flag False: there is no canonical structure for this family",
        )
    if given.structure or not family.canonical:
        return given.structure == "canonical"
    rows = rows_of(folder, family, variant)
    return not all(equal for *_, equal in grouped(rows, layers, folder.parts))


def rows_of(folder: PEFTFolder, family: Family, variant: Variant) -> tuple[Module, ...]:
    """The rows of the weights that an adapter changes.

    Raises:
        TensorError: it changes what is no linear layer in MM format.
    """
    table = family.table(variant)
    names = Names(family, table)
    present: dict[str, set[int]] = {}
    odd: list[str] = []
    for (hub, _), part in folder.parts.items():
        hit = names.layer(hub)
        if hit is None or len(part.a.shape) != 2 or len(part.b.shape) != 2:
            odd.append(part.path)
            continue
        row, layer, _ = hit
        present.setdefault(row.mm, set()).add(layer)
    if odd:
        raise TensorError(
            f"{folder.file.path}: {summarise(odd, 3)} is adapted, which is not a linear layer in "
            "MM format",
            "an adapter of linear layers",
            "merge the adapter into the model (lora_merge), and convert that",
        )
    return restricted(table, {mm: layers or {NO_LAYER} for mm, layers in present.items()})


def _layers(
    folder: PEFTFolder, family: Family, variant: Variant, dims: Mapping[str, int]
) -> dict[str, int]:
    """How many layers each module has, as far as the adapter goes."""
    names = Names(family, family.table(variant))
    found: dict[str, int] = dict.fromkeys(family.module_keys, 0)
    for hub, _ in folder.parts:
        hit = names.layer(hub)
        if hit is not None:
            for key in found:
                found[key] = max(found[key], hit[1] + 1)
    return {key: dims.get(f"{key}.layers", count) for key, count in found.items()}


def _experts(folder: PEFTFolder, names: Names) -> dict[str, int]:
    """How many experts each module has, as far as the adapter shows."""
    found: dict[str, int] = {}
    for hub, inside in folder.parts:
        hit = names.layer(hub)
        if hit is not None and hit[0].of_expert:
            key = f"{names.keys[hit[0].mm]}.experts"
            found[key] = max(found.get(key, 0), hit[2] + 1, inside + 1)
    return found


def refuse_others(folder: PEFTFolder) -> None:
    """Raises RequestError for what an adapter in MM format cannot hold."""
    others = {
        "embeddings": [part.a.name for part in folder.embeddings.values()],
        "DoRA's magnitudes": [tensor.name for tensor in folder.magnitudes.values()],
        "biases of B (lora_bias)": [tensor.name for tensor in folder.biases.values()],
        "trained tokens": [tokens.rows.name for tokens in folder.tokens.values()],
        "whole tensors (modules_to_save, bias)": [t.name for t in folder.replaced.values()],
    }
    for what, names in others.items():
        if names:
            raise RequestError(
                f"{folder.file.path} holds {what}: {summarise(names, 2)}; an adapter in MM format "
                "is A and B of linear layers alone",
                "an adapter without them",
                "merge it into the model (lora_merge), and convert that with hf_to_mm",
            )


FORMAT = PEFT()

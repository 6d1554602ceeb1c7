"""Folders of torch.distributed.checkpoint, as a format."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from mmconvert import converters
from mmconvert.config.dcp import DCPLayout
from mmconvert.converters.family import Family, Variant
from mmconvert.converters.rows import Module
from mmconvert.errors import CheckpointError, LayoutError
from mmconvert.formats import contents, manifest
from mmconvert.formats.base import Format, Opening, Placed, Placing, StoredCheckpoint
from mmconvert.formats.containers.image import FileImage, small
from mmconvert.formats.containers.safetensors import WeightFile
from mmconvert.formats.dcp.folder import RELEASE, TRACKER, find_dcp, is_torch_dist, open_dcp
from mmconvert.formats.dcp.generic import GenericFamily
from mmconvert.formats.dcp.metadata import read_metadata
from mmconvert.formats.dcp.naming import MODEL, Naming
from mmconvert.formats.dcp.opening import (
    fitting_pattern,
    kept_tensors,
    model_of,
    naming_of,
    without_carried,
)
from mmconvert.formats.dcp.output import (
    Written,
    data_file,
    folder_images,
    sharded,
    whole_pieces,
)
from mmconvert.formats.dcp.reader import (
    as_hf,
    closest_variant,
    default_naming,
    family_of_names,
    known_names,
)
from mmconvert.formats.dcp.rules import place_by_rules
from mmconvert.formats.faults import STRICT
from mmconvert.formats.hf.folder import HFCheckpoint
from mmconvert.formats.hf.format import HFStored, check_shapes
from mmconvert.formats.hf.side import hf_side, hf_target
from mmconvert.formats.model import Model, Notes
from mmconvert.formats.wholes import claimed, one_each
from mmconvert.names import NO_LAYER
from mmconvert.plan.parts import in_parts, whole_of
from mmconvert.plan.plan import Key, Side, Whole
from mmconvert.stored import StoredTensor, Target

VERSION_3 = {"checkpoint_version": 3.0}


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The layout of a folder, in words."""

    ranks: int = 1

    def describe(self) -> str:
        """One line for messages."""
        return "whole tensors" if self.ranks == 1 else f"sharded over {self.ranks} ranks"

    def as_dict(self) -> dict[str, object]:
        """The layout as JSON."""
        return {"ranks": self.ranks}


@dataclass(frozen=True, kw_only=True)
class DCPStored(StoredCheckpoint):
    """A folder that was opened; ``tensors`` by Hugging Face, MM or, without a table, flat names."""

    tensors: Mapping[str, StoredTensor]
    by_mm_names: bool = False

    def side(self, modules: tuple[Module, ...] | None = None, *, as_hf: bool = False) -> Side:
        """Its wholes, fused as a table says; the pieces of its tensors in their place."""
        model = self.model
        table = model.modules if modules is None else modules
        if not table:
            side = Side()
            for name, tensor in self.tensors.items():
                side.wholes[Key(name, NO_LAYER)] = whole_of(tensor, len(side.stored))
                side.stored += [part.tensor for part in tensor.parts] or [tensor]
            return side
        if self.by_mm_names:
            return in_parts(claimed(table, self.tensors, self.path, STRICT))
        return in_parts(hf_side(table, model.dims, self.tensors, transposed=not as_hf))


@dataclass(frozen=True, kw_only=True)
class DCPPlaced(Placed):
    """A folder to be written; ``written`` says what each target is, ``naming`` names the rest."""

    written: Sequence[Written]
    naming: Naming = field(default_factory=Naming)


class DCP(Format):
    """``.metadata`` and ``*.distcp`` in a folder: what FSDP2 trainers load and save."""

    name: ClassVar = "dcp"
    title: ClassVar = "DCP"
    naming: ClassVar = "hf"
    needs_original: ClassVar = True
    needs_sizes: ClassVar = True
    own_names: ClassVar = rf"{re.escape(TRACKER)}|release|iter_\d+|\.metadata|__.*\.distcp"
    Layout: ClassVar = DCPLayout

    def recognise(self, path: Path) -> bool:
        """By the names of its files."""
        found = find_dcp(path)
        return found is not None and not is_torch_dist(found[0])

    def family(self, path: Path) -> Family | None:
        """By mmconvert.json, else by the tensors' names. Other models' names alone will do."""
        said = (manifest.read(path)[0] or {}).get("converter")
        families = {**converters.ms_registry(), **converters.registry()}
        if isinstance(said, str) and said in families:
            return families[said]
        found = find_dcp(path)
        names = list(read_metadata(found[0]).tensors) if found else []
        return family_of_names([name for name in names if name.startswith(MODEL)])

    def look(self, path: Path) -> contents.Look:
        """Its tensors under flat names, each whole."""
        checkpoint, family = open_dcp(path), self.family(path)
        wholes: dict[str, Whole] = {}
        stored: list[StoredTensor] = []
        for name, tensor in checkpoint.tensors.items():
            wholes[name] = whole_of(tensor, len(stored))
            stored += [part.tensor for part in tensor.parts] or [tensor]
        names, variant = list(checkpoint.tensors), _variant(path, family)
        prefix = known_names(family, names, variant) if family else None
        if family and prefix is not None and variant is None:
            variant = closest_variant(family, [name[len(prefix) :] for name in names])
        files: dict[Path, list[StoredTensor]] = {}
        for tensor in stored:
            inner = tensor.name.removeprefix(MODEL if prefix is None else prefix)
            files.setdefault(tensor.path, []).append(tensor._replace(name=inner))
        weights = [WeightFile(file, b"", {}, found) for file, found in sorted(files.items())]
        as_checkpoint = HFCheckpoint(checkpoint.folder, {}, weights, None)
        return contents.Look(
            kind=self.name,
            title="DCP folder",
            family=family.name if family else "",
            listing=stored,
            wholes=wholes,
            stored=stored,
            boxes=contents.of_hf(as_checkpoint, family if prefix is not None else None, variant),
            unit="data file",
            iteration=checkpoint.iteration,
            notes=checkpoint.notes,
        )

    def open(self, path: Path, told: Opening) -> StoredCheckpoint:
        """By the family's Hugging Face names, behind a prefix that is found out."""
        checkpoint = open_dcp(path)
        notes = Notes(checkpoint.notes)
        kept = kept_tensors(checkpoint.tensors, told, notes)
        model = model_of(path, told)
        naming: Naming | None = None
        if model.modules:
            naming = naming_of(told, list(kept), path, model.variant)
            if naming is None:
                kept = {name.removeprefix(MODEL): tensor for name, tensor in kept.items()}
            else:
                kept = as_hf(kept, told.family, model.modules, model.dims, naming)
                kept = without_carried(told.family, kept, notes)
        fits = {
            p for p in told.options.drop for t in checkpoint.tensors if fitting_pattern(t, (p,))
        }
        model = replace(
            model, notes=tuple(notes.words), dropped=notes.dropped, patterns=frozenset(fits)
        )
        return DCPStored(
            format=self.name,
            path=path,
            model=model,
            iteration=checkpoint.iteration,
            tensors=kept,
            by_mm_names=naming is None,
        )

    def as_hf(self, family: Family, layout: object) -> bool:
        """Matrices as Hugging Face has them, unless a trainer's rules transpose some."""
        mm = isinstance(layout, DCPLayout) and layout.names == "mm"
        return not mm and not isinstance(family, GenericFamily)

    def place(self, asked: Placing) -> Placed:
        """The tensors of the original under flat names; whole, or divided over ranks."""
        layout = asked.layout if isinstance(asked.layout, DCPLayout) else DCPLayout()
        if layout.ranks < 1:
            raise LayoutError(f"{asked.flags}ranks is {layout.ranks}", "a number of at least 1")
        family, naming = asked.source.model.family, Naming()
        files: Mapping[str, str] = {}
        transposed: frozenset[str] = frozenset()
        if layout.names == "mm":
            side = one_each(asked.wholes)
            side.targets = [t._replace(name=MODEL + t.name) for t in side.targets]
        elif isinstance(family, GenericFamily):
            naming = family.rules.naming
            side, files = place_by_rules(family, asked.wholes)
        else:
            naming = default_naming(family)
            if layout.dcp_prefix != "auto":
                naming = Naming(MODEL + layout.dcp_prefix)
            side, files = _place_by_table(asked, naming)
            rows = [row for module in asked.source.model.plain_modules for row in module.all_rows()]
            transposed = frozenset(row.mm for row in rows if row.transposed)
        if layout.ranks == 1:
            written = whole_pieces(side.targets, files)
        else:
            side, written = sharded(side, layout.ranks)
        return DCPPlaced(
            transposed=transposed,
            side=side,
            layout=Shards(ranks=layout.ranks),
            about=lists_of(asked.source.model),
            written=written,
            naming=naming,
        )

    def lay_out(
        self, targets: Sequence[Target], placed: Placed, asked: Placing
    ) -> Iterator[FileImage]:
        """``release`` with the data files and .metadata, and the tracker file."""
        assert isinstance(placed, DCPPlaced)  # noqa: S101 - narrows the type: it is our own
        carried = [
            t._replace(name=placed.naming.dcp(t.name)) for t in targets[len(placed.written) :]
        ]
        last = max((one.file for one in placed.written), default=data_file(0))
        written = [*placed.written, *whole_pieces(carried, {t.name: last for t in carried})]
        yield from folder_images(RELEASE, written, targets, VERSION_3)
        yield small(TRACKER, RELEASE.encode(), pointer=True)

    def samples(self, model: Model) -> list[tuple[str, object]]:
        """Whole, and divided over three ranks."""
        del model
        return [("complete", DCPLayout()), ("fsdp3", DCPLayout(ranks=3))]


def _variant(path: Path, family: Family | None) -> Variant | None:
    """What our own manifest says of the model."""
    content = manifest.read(path)[0] or {}
    known = family is not None and content.get("converter") == family.converter
    return manifest.variant(content) if known else None


def lists_of(model: Model) -> dict[str, object]:
    """The lists of layers of a model, for the manifest."""
    return {"lists": {key: list(layers) for key, layers in model.variant.lists}}


def _place_by_table(asked: Placing, naming: Naming) -> tuple[Side, dict[str, str]]:
    """The tensors of the original under flat names, stacks flattened; and their files."""
    original = asked.original
    if not isinstance(original, HFStored):
        raise CheckpointError("hf_dir holds no weights", "the original checkpoint")
    headers = original.side(asked.source.model.plain_modules, as_hf=True)
    check_shapes(asked.wholes, headers, asked.source.path, original.path)
    side = hf_target(headers, asked.wholes)
    side.targets = [Target(naming.dcp(t.name), t.dtype, t.shape, stack=()) for t in side.targets]
    files = {
        naming.dcp(t.name): data_file(number)
        for number, file in enumerate(original.checkpoint.files)
        for t in file.tensors
    }
    return side, files


FORMAT = DCP()

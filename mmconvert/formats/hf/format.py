"""Hugging Face checkpoints, as a format."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from mmconvert.converters.family import Family
from mmconvert.converters.rows import Module
from mmconvert.errors import CheckpointError, TensorError
from mmconvert.formats import reading
from mmconvert.formats.base import Format, Opening, Placed, Placing, StoredCheckpoint
from mmconvert.formats.containers.image import FileImage, small
from mmconvert.formats.faults import STRICT, Faults
from mmconvert.formats.hf.choice import INDEX
from mmconvert.formats.hf.folder import HFCheckpoint, open_hf
from mmconvert.formats.hf.model import hf_model
from mmconvert.formats.hf.output import weight_images, with_dtype
from mmconvert.formats.hf.side import hf_side, hf_target
from mmconvert.formats.hf.sides import SideFiles, side_files
from mmconvert.formats.registry import load
from mmconvert.formats.untied import ties, untied_hf
from mmconvert.formats.wholes import plain
from mmconvert.names import summarise
from mmconvert.plan.padding import in_words, pad_vocabulary, vocabulary_keys
from mmconvert.plan.plan import Key, Side, Whole
from mmconvert.stored import SCALED, Target
from mmconvert.words import parse_size

if TYPE_CHECKING:
    from mmconvert.formats.contents import Look

CONFIG = Path("config.json")


@dataclass(frozen=True, kw_only=True)
class HFStored(StoredCheckpoint):
    """A Hugging Face checkpoint that was opened.

    Attributes:
        faults: where those go that are found from now on, as those of its reader did.
        says_untied: config.json is to say that embeddings are not tied.
    """

    faults: Faults = STRICT
    says_untied: bool = False

    @property
    def checkpoint(self) -> HFCheckpoint:
        """Its headers."""
        if self.model.hf is None:
            raise CheckpointError("hf_dir holds no weights", "the original checkpoint")
        return self.model.hf

    def side(self, modules: tuple[Module, ...] | None = None, *, as_hf: bool = False) -> Side:
        """Its wholes, fused as a table says."""
        table = self.model.modules if modules is None else modules
        return hf_side(
            table,
            self.model.dims,
            self.model.hf_tensors,
            transposed=not as_hf,
            faults=self.faults,
            complete=self.checkpoint.complete,
        )

    def untied(self) -> HFStored:
        """See :meth:`StoredCheckpoint.untied`."""
        return replace(self, model=untied_hf(self.model), says_untied=bool(ties(self.model)))


@dataclass(frozen=True, kw_only=True)
class HFPlaced(Placed):
    """A Hugging Face checkpoint to be written; ``sides`` are the files beside the weights."""

    sides: SideFiles


class HuggingFace(Format):
    """config.json and safetensors (or pickles) in a folder, in the names of transformers."""

    name: ClassVar = "hf"
    title: ClassVar = "Hugging Face"
    naming: ClassVar = "hf"
    writes: ClassVar = frozenset({"max_shard_size"})
    needs_original: ClassVar = True
    own_names: ClassVar = ".*"  # a model's code, its pictures, its licence: anything

    def recognise(self, path: Path) -> bool:
        """By config.json, which no other format has."""
        return (path / CONFIG).is_file()

    def owns(self, folder: Path) -> bool:
        """By config.json and weights that it writes."""
        names = os.listdir(folder)
        weights = INDEX in names or any(name.endswith(".safetensors") for name in names)
        return self.recognise(folder) and weights

    def family(self, path: Path) -> Family:
        """By model_type of config.json."""
        from mmconvert.formats.recognise import hf_family

        return hf_family(path)

    def look(self, path: Path) -> Look:
        """Its weight files."""
        checkpoint = open_hf(path)
        try:
            family = self.family(path)
        except CheckpointError:
            family = None
        found = checkpoint.tensors()
        from mmconvert.formats import contents

        wholes, stored = plain(found.items())
        return contents.Look(
            kind=self.name,
            title="Hugging Face checkpoint",
            family=family.name if family else "",
            listing=list(found.values()),
            wholes=wholes,
            stored=stored,
            boxes=contents.of_hf(checkpoint, family),
            unit="weight file",
            notes=checkpoint.notes,
        )

    def open(self, path: Path, told: Opening) -> HFStored:
        """Every tensor has a row, stays in the folder, or is left out by name."""
        model = hf_model(
            told.family,
            path,
            told.options,
            canonical=told.canonical,
            encoders_only=told.encoders_only,
            text_dir=told.text_dir,
            faults=told.faults,
        )
        inputs = () if told.text_dir is None else (told.text_dir,)
        return HFStored(format=self.name, path=path, model=model, inputs=inputs, faults=told.faults)

    def place(self, asked: Placing) -> Placed:
        """The tensors of the original, in the dtypes that the wholes have now."""
        original, source = _original(asked), asked.source
        headers = original.side(source.model.plain_modules, as_hf=True)
        padded = _cut_padding(headers, source)
        check_shapes(asked.wholes, headers, asked.source.path, original.path)
        side = hf_target(headers, asked.wholes)
        changed = [] if asked.cast else _dtype_notes(headers, side, load(source.format).title)
        notes = padded + changed
        if not original.checkpoint.files[0].header:
            notes.append("hf_dir holds pytorch_model*.bin; safetensors are written in their place")
        sides = side_files(original.checkpoint.folder, original.checkpoint.read)
        notes += sides.notes()
        rows = [row for module in source.model.plain_modules for row in module.all_rows()]
        transposed = frozenset(row.mm for row in rows if row.transposed)
        return HFPlaced(
            transposed=transposed, side=side, notes=tuple(notes), not_copied=sides.left, sides=sides
        )

    def lay_out(
        self, targets: Sequence[Target], placed: Placed, asked: Placing
    ) -> Iterator[FileImage]:
        """Weight files and index as the original has them, and the files beside them."""
        assert isinstance(placed, HFPlaced)  # noqa: S101 - narrows the type: it is our own
        original = _original(asked)
        checkpoint, untied = original.checkpoint, original.says_untied
        limit = asked.options.max_shard_size
        yield from weight_images(checkpoint, targets, parse_size(limit) if limit else 0)
        folder, copied = checkpoint.folder, placed.sides.copied
        reading.note(folder / path for path in copied)
        for path in copied:
            if path == CONFIG and (asked.cast or asked.options.dequantize or untied):
                yield small(str(path), with_dtype(folder / path, asked.cast, untied=untied))
            else:
                size = (folder / path).stat().st_size
                yield FileImage(str(path), size, copied=folder / path)


def _original(asked: Placing) -> HFStored:
    if not isinstance(asked.original, HFStored):
        raise CheckpointError("hf_dir holds no weights", "the original checkpoint")
    return asked.original


def check_shapes(wholes: Mapping[Key, Whole], headers: Side, source: Path, original: Path) -> None:
    """Raises TensorError for wholes of other shapes than the original has."""
    for key, whole in wholes.items():
        expected = headers.wholes.get(key)
        if expected is not None and whole.shape != expected.shape:
            raise TensorError(
                f"{source}: {key.name()} is {list(whole.shape)} as a whole; "
                f"{original} asks for {list(expected.shape)}",
                "the whole checkpoint, with its own strategy files, and the hf_dir of its model",
                "give the folder above rank_0, not the file of one rank; or the right hf_dir",
            )


def _cut_padding(headers: Side, source: StoredCheckpoint) -> list[str]:
    """Rows that pad the vocabulary have no place in the files: they must be zeros, and are cut."""
    model = source.model
    if not model.words:
        return []
    rows = model.dims[model.family.vocabulary]
    pad_vocabulary(headers, model.plain_modules, rows)
    return [in_words(vocabulary_keys(headers, model.plain_modules), model.words, rows, "cut from")]


def _dtype_notes(headers: Side, dst: Side, form: str) -> list[str]:
    """Says so where training has changed a dtype: tensors are written as training left them."""
    changed: dict[tuple[str, str], list[str]] = {}
    for old, new in zip(headers.stored, dst.targets, strict=True):
        if old.dtype != new.dtype and old.dtype != SCALED:
            changed.setdefault((old.dtype, new.dtype), []).append(new.name)
    return [
        f"warning: {len(names)} tensors are {old} in hf_dir and {new} in the {form} checkpoint; "
        f"written as {new} (config.json still names its own dtype): {summarise(names)}"
        for (old, new), names in changed.items()
    ]


FORMAT = HuggingFace()

"""A format of another package: a folder of .npy files, one whole tensor each, and an index."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mmconvert import converters
from mmconvert.converters.family import Family, Variant
from mmconvert.converters.rows import Module
from mmconvert.formats import contents
from mmconvert.formats.base import Format, Opening, Placed, Placing, StoredCheckpoint
from mmconvert.formats.containers.image import FileImage, Piece, one_run, small
from mmconvert.formats.contents import Look
from mmconvert.formats.jsonfile import read_json_file
from mmconvert.formats.model import Model
from mmconvert.formats.reading import opened
from mmconvert.formats.wholes import claimed, one_each, plain
from mmconvert.plan.plan import Side
from mmconvert.stored import ITEM_SIZE, StoredTensor, Target

INDEX = "tensors.json"  # name -> number of the file, dtype; the numbers of BF16 stand as uint16


@dataclass(frozen=True, kw_only=True)
class NpyStored(StoredCheckpoint):
    """A folder that was opened."""

    own: Side

    def side(self, modules: tuple[Module, ...] | None = None, *, as_hf: bool = False) -> Side:
        del modules, as_hf
        return self.own


class Npy(Format):
    """Whole MM tensors, under MM names with the model's layer numbers."""

    name: ClassVar = "npy"
    title: ClassVar = "NumPy"
    own_names: ClassVar = r"\d{5}\.npy|tensors\.json"

    def recognise(self, path: Path) -> bool:
        return (path / INDEX).is_file()

    def family(self, path: Path) -> Family:
        return converters.load(str(read_json_file(path / INDEX)["converter"]))

    def look(self, path: Path) -> Look:
        tensors, family = tensors_of(path), self.family(path)
        wholes, stored = plain(tensors.items())
        boxes = contents.of_rank_file({path.name: tensors}, [family])
        return Look(
            kind=self.name,
            title="NumPy folder",
            family=family.name,
            listing=stored,
            wholes=wholes,
            stored=stored,
            boxes=boxes,
        )

    def open(self, path: Path, told: Opening) -> NpyStored:
        index: Any = read_json_file(path / INDEX)
        variant = told.like.variant if told.like else Variant(tied=bool(index["tied"]))
        modules = told.family.table(variant)
        own = claimed(modules, tensors_of(path), path, told.faults)
        model = Model(told.family, variant, modules, index["dims"])
        return NpyStored(format=self.name, path=path, model=model, own=own)

    def place(self, asked: Placing) -> Placed:
        return Placed(side=one_each(asked.wholes))

    def lay_out(
        self, targets: Sequence[Target], placed: Placed, asked: Placing
    ) -> Iterator[FileImage]:
        model = asked.source.model
        for number, t in enumerate(targets):
            header = io.BytesIO()
            descr = "<u2" if t.dtype == "BF16" else f"<f{ITEM_SIZE[t.dtype]}"
            form = {"descr": descr, "fortran_order": False, "shape": t.shape}
            np.lib.format.write_array_header_1_0(header, form)
            head = header.getvalue()
            piece = Piece(number, one_run(len(head), t.nbytes))
            yield FileImage(f"{number:05d}.npy", len(head) + t.nbytes, ((0, head),), (piece,))
        index = {
            "converter": model.family.converter,
            "tied": model.variant.tied,
            "dims": model.dims,
            "tensors": {t.name: [number, t.dtype] for number, t in enumerate(targets)},
        }
        yield small(INDEX, json.dumps(index).encode(), pointer=True)


def tensors_of(path: Path) -> dict[str, StoredTensor]:
    index: Any = read_json_file(path / INDEX)
    found: dict[str, StoredTensor] = {}
    for name, (number, dtype) in index["tensors"].items():
        file = path / f"{number:05d}.npy"
        with opened(file) as stream:
            np.lib.format.read_magic(stream)
            shape, _, _ = np.lib.format.read_array_header_1_0(stream)
            found[name] = StoredTensor(name, dtype, tuple(shape), file, stream.tell())
    return found


FORMAT = Npy()

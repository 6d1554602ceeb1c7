"""Megatron-Core's ``torch_dist`` folders, as a format."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from mmconvert import converters
from mmconvert.converters.family import Family
from mmconvert.converters.rows import Module
from mmconvert.errors import CheckpointError, RequestError
from mmconvert.formats import manifest
from mmconvert.formats.base import NoLayout, Opening, Placed, Placing, StoredCheckpoint
from mmconvert.formats.containers.image import FileImage, small
from mmconvert.formats.containers.ptwriter import pt_image
from mmconvert.formats.contents import Look
from mmconvert.formats.dcp.folder import (
    COMMON,
    RELEASE,
    TRACKER,
    find_dcp,
    is_torch_dist,
    open_dcp,
)
from mmconvert.formats.dcp.format import DCP, lists_of
from mmconvert.formats.dcp.megatron import (
    TEXT,
    serves,
)
from mmconvert.formats.dcp.metadata import read_metadata
from mmconvert.formats.dcp.opening import kept_tensors, model_of
from mmconvert.formats.dcp.output import Written, data_file, folder_images
from mmconvert.formats.dcp.stacks import in_stacks, under_mm_names
from mmconvert.formats.faults import STRICT
from mmconvert.formats.hf.format import HFStored
from mmconvert.formats.hf.side import hf_side, hf_target
from mmconvert.formats.model import Model, Notes
from mmconvert.formats.wholes import claimed
from mmconvert.plan.parts import in_parts
from mmconvert.plan.plan import Block, Side, Whole
from mmconvert.stored import StoredTensor, Target, transpose

BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True, kw_only=True)
class TorchDistStored(StoredCheckpoint):
    """A folder that was opened: ``mm`` under MM names, ``hf`` of a vision encoder as on the hub."""

    mm: Mapping[str, StoredTensor]
    hf: Mapping[str, StoredTensor] = field(default_factory=dict[str, StoredTensor])

    def side(self, modules: tuple[Module, ...] | None = None, *, as_hf: bool = False) -> Side:
        """Its wholes; the pieces of its tensors in their place."""
        table = self.model.modules if modules is None else modules
        if as_hf:
            seen = {r.mm for m in table for r in m.all_rows() if r.transposed}
            side = claimed(table, self.mm, self.path, STRICT)
            for key, whole in side.wholes.items():
                if key.mm in seen:
                    i = whole.copies[0][0].tensor
                    side.stored[i] = turned = transpose(side.stored[i])
                    block = Block(i, 0, 0, 0, 0, *turned.shape)
                    side.wholes[key] = Whole(turned.shape, whole.dtype, [[block]])
        else:
            side = claimed(table, self.mm, self.path, STRICT)
        if self.hf:
            encoders = tuple(m for m in table if m.role != "decoder")
            _add(side, hf_side(encoders, self.model.dims, self.hf, transposed=not as_hf))
        return in_parts(side)


@dataclass(frozen=True, kw_only=True)
class TorchDistPlaced(Placed):
    """A folder to be written."""

    written: Sequence[Written]


class TorchDist(DCP):
    """What Megatron-Core saves with ``--ckpt-format torch_dist``."""

    name: ClassVar = "torch_dist"
    title: ClassVar = "torch_dist"
    naming: ClassVar = ""
    own_names: ClassVar = rf"{re.escape(TRACKER)}|release|iter_\d+"
    Layout: ClassVar = NoLayout

    def recognise(self, path: Path) -> bool:
        """By ``common.pt`` beside .metadata."""
        found = find_dcp(path)
        return found is not None and is_torch_dist(found[0]) and (found[0] / ".metadata").is_file()

    def family(self, path: Path) -> Family | None:
        """By mmconvert.json, else by the keys that the vision encoders differ in."""
        said = (manifest.read(path)[0] or {}).get("converter")
        families = converters.registry()
        if isinstance(said, str) and said in families:
            return families[said]
        found = find_dcp(path)
        names = list(read_metadata(found[0]).tensors) if found else []
        if not any(name.startswith(TEXT) for name in names):
            return None
        third = any("deepstack_merger_list." in name for name in names)
        return families["Qwen3VLMegatronConverter" if third else "Qwen2_5_VLConverter"]

    def look(self, path: Path) -> Look:
        """Its tensors under their keys."""
        return replace(super().look(path), title="torch_dist folder")

    def as_hf(self, family: Family, layout: object) -> bool:
        """Matrices as MM format has them."""
        del family, layout
        return False

    def open(self, path: Path, told: Opening) -> TorchDistStored:
        """Every tensor of the model has a row; layers are taken out of their tensors."""
        checkpoint = open_dcp(path)
        notes = Notes(checkpoint.notes)
        kept = kept_tensors(checkpoint.tensors, told, notes)
        model = model_of(path, told)
        mm: Mapping[str, StoredTensor] = kept
        hf: Mapping[str, StoredTensor] = {}
        if model.modules:
            _check_family(told.family)
            mm, hf = under_mm_names(kept, model, path)
            model = _with_padding(model, mm)
        model = replace(model, notes=tuple(notes.words), dropped=notes.dropped)
        return TorchDistStored(
            format=self.name,
            path=path,
            model=model,
            iteration=checkpoint.iteration,
            mm=mm,
            hf=hf,
        )

    def place(self, asked: Placing) -> TorchDistPlaced:
        """Layers stacked in one tensor each; the vision encoder as Megatron-Bridge has it."""
        model = asked.source.model
        _check_family(model.family)
        own = model.family.converter == "Qwen3VLMegatronConverter"
        modules = tuple(m for m in model.plain_modules if own or m.role == "decoder")
        side, shapes = in_stacks(modules, model.dims, asked.wholes)
        if not own:
            _add(side, _vision_of(asked))
        written = [
            Written(t.name, shape, (0,) * len(shape), shape, data_file(0))
            for t in side.targets
            for shape in (shapes.get(t.name, t.stack or t.shape),)
        ]
        about = lists_of(model)
        return TorchDistPlaced(side=side, layout=NoLayout(), about=about, written=written)

    def lay_out(
        self, targets: Sequence[Target], placed: Placed, asked: Placing
    ) -> Iterator[FileImage]:
        """``release`` with the data file, .metadata, common.pt and metadata.json; tracker file."""
        del asked
        assert isinstance(placed, TorchDistPlaced)  # noqa: S101 - narrows the type: it is our own
        yield from folder_images(RELEASE, placed.written, targets, {}, nested=False)
        yield pt_image(f"{RELEASE}/{COMMON}", {"checkpoint_version": 3.0, "content_metadata": {}})
        yield small(f"{RELEASE}/metadata.json", json.dumps(BACKEND).encode(), pointer=True)
        yield small(TRACKER, RELEASE.encode(), pointer=True)

    def samples(self, model: Model) -> list[tuple[str, object]]:
        """One form."""
        del model
        return [("complete", NoLayout())]


def _with_padding(model: Model, mm: Mapping[str, StoredTensor]) -> Model:
    """The model with the rows that its vocabulary has here, if Megatron has padded it."""
    dim = model.family.vocabulary
    rows = (r.mm for m in model.modules for r in m.before if r.rows == (dim,))
    found = max((mm[name].shape[0] for name in rows if name in mm), default=0)
    words = model.dims.get(dim, 0)
    if not words or found <= words:
        return model
    return replace(model, dims={**model.dims, dim: found}, words=words)


def _check_family(family: Family) -> None:
    if not serves(family):
        raise RequestError(
            f"{family.name} has no torch_dist form here", "Qwen2.5-VL or Qwen3-VL, for torch_dist"
        )


def _add(side: Side, more: Side) -> None:
    """Puts a second side's wholes and tensors behind those of a first one."""
    first = len(side.stored) or len(side.targets)
    side.stored += more.stored
    side.targets += more.targets
    for key, whole in more.wholes.items():
        copies = [[b._replace(tensor=b.tensor + first) for b in copy] for copy in whole.copies]
        side.wholes[key] = Whole(whole.shape, whole.dtype, copies, whole.zeros)


def _vision_of(asked: Placing) -> Side:
    """The vision encoder's Hugging Face tensors, which are Megatron-Bridge's."""
    original = asked.original
    if not isinstance(original, HFStored):
        raise CheckpointError("hf_dir holds no weights", "the original checkpoint")
    modules = asked.source.model.plain_modules
    mine = {r.mm for m in modules if m.role != "decoder" for r in m.all_rows()}
    headers = original.side(modules, as_hf=True)
    wholes = {key: whole for key, whole in headers.wholes.items() if key.mm in mine}
    numbers = sorted({b.tensor for w in wholes.values() for c in w.copies for b in c})
    again = {old: new for new, old in enumerate(numbers)}
    for whole in wholes.values():
        whole.copies = [[b._replace(tensor=again[b.tensor]) for b in c] for c in whole.copies]
    chosen = Side(stored=[headers.stored[i] for i in numbers], wholes=wholes)
    side = hf_target(chosen, asked.wholes)
    side.targets = [t._replace(name=original.model.family.hub_name(t.name)) for t in side.targets]
    return side


FORMAT = TorchDist()

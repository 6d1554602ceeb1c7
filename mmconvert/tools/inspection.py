"""What a checkpoint is: kind, family, sizes, and for MM the layout. Headers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from mmconvert import converters
from mmconvert.config import Options, ParallelConfig
from mmconvert.errors import MMConvertError
from mmconvert.formats.containers.ptfile import read_pt
from mmconvert.formats.containers.safetensors import WeightFile
from mmconvert.formats.hf.folder import HFCheckpoint, open_hf, read_config
from mmconvert.formats.mindspore.folder import is_ms
from mmconvert.formats.mindspore.model import ms_model
from mmconvert.formats.mm.folder import find_weights
from mmconvert.formats.mm.model import mm_model
from mmconvert.formats.mm.source import mm_source
from mmconvert.formats.recognise import family_of, is_hf, knows_all, ms_family_of
from mmconvert.formats.single import (
    HF_FILE,
    MS_FILE,
    RANK_FILE,
    WeightParts,
    adapter_of,
    family_of_file,
    open_file,
)
from mmconvert.sharding.layout import GRID_FLAG, TP_FLAG, Layout
from mmconvert.stored import StoredTensor
from mmconvert.tools import contents
from mmconvert.tools.contents import Box

KINDS = {
    "hf": "Hugging Face checkpoint",
    "mm": "MM checkpoint",
    "mm_rank_file": "MM rank file",
    "hf_weight_file": "Hugging Face weight file",
    "adapter_file": "adapter",
    "ms": "MindSpore checkpoint",
    "ms_file": "MindSpore file",
}
# What each box of a picture is, by kind.
UNITS = {"hf": "weight file", "mm_rank_file": "model chunk", "ms": "rank"}
UNITS |= dict.fromkeys(("ms_file", "hf_weight_file", "adapter_file"), "file")


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        kind: ``hf``, ``mm``, ``mm_rank_file``, ``hf_weight_file``, ``adapter_file``, ``ms`` (rank
            folders) or ``ms_file``.
        family: the family's name; "" if it is not known.
        dtype: the dtypes found, the most bytes first.
        parameters: number of parameters; replicas and tied copies of an MM checkpoint count once.
        nbytes: bytes of all stored tensors, every copy counted.
        tensors: number of stored tensors.
        iteration: ``release`` or a number, for MM.
        layout: for MM.
        listing: name, dtype, shape, file of every stored tensor.
        notes: what is worth knowing.
        boxes: what each weight file, or each model chunk of each rank, holds.
    """

    kind: str
    family: str
    dtype: list[str]
    parameters: int
    nbytes: int
    tensors: int
    iteration: str = ""
    layout: Layout | None = None
    listing: list[StoredTensor] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """The JSON form: keys as documented in docs/json.md."""
        out: dict[str, object] = {
            "kind": self.kind,
            "family": self.family,
            "dtype": self.dtype,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "tensors": self.tensors,
            "iteration": self.iteration,
            "notes": self.notes,
            "contents": [box.as_dict() for box in self.boxes],
        }
        if self.layout is not None:
            out["layout"] = layout_dict(self.layout)
        return out


def layout_dict(layout: Layout) -> dict[str, object]:
    """A layout as JSON, with every key, null where a module is absent."""
    out: dict[str, object] = {flag: layout.tp.get(key) for key, flag in TP_FLAG.items()}
    out |= {"pp_size": layout.pp_size, "vpp_size": layout.vpp_size, "ep_size": layout.ep}
    for key, flag in GRID_FLAG.items():
        grid = layout.grids.get(key)
        out[flag] = None if grid is None else [list(row) for row in grid]
    return out


def inspect(path: Path) -> Inspection:
    """Looks at an HF folder, an MM folder, a MindSpore checkpoint, an adapter or a single file.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    if path.is_file():
        return _file(path)
    if is_hf(path):
        return _hf(path)
    if (adapter := adapter_of(path)) is not None:
        return _file(adapter)
    return _ms(path) if is_ms(path) else _mm(path)


def _file(path: Path) -> Inspection:
    found = open_file(path)
    if found.kind == MS_FILE:
        return _ms(path)
    return _rank_file(path) if found.kind == RANK_FILE else _weight_file(path, found)


def _weight_file(path: Path, found: WeightParts) -> Inspection:
    """A weight file of a Hugging Face checkpoint, or an adapter."""
    tensors = list(found.tensors().values())
    family = family_of_file(path, found.tensors()) if found.kind == HF_FILE else None
    config = read_config(path.parent) if family is not None and is_hf(path.parent) else {}
    file = WeightFile(path, b"", {}, tensors)
    boxes = contents.of_hf(HFCheckpoint(path.parent, config, [file], None), family)
    name = family.name if family else ""
    return _inspection(found.kind, name, tensors, notes=list(found.notes), boxes=boxes)


def _rank_file(path: Path) -> Inspection:
    file = read_pt(path)
    parts = {
        str(key): {
            str(name): tensor for name, tensor in part.items() if isinstance(tensor, StoredTensor)
        }
        for key, part in file.content.items()
        if str(key).startswith("model") and isinstance(part, dict)
    }
    found = [tensor for part in parts.values() for tensor in part.values()]
    others = [key for key in file.content if not str(key).startswith("model")]
    note = [f"beside the weights: {', '.join(map(str, others))}"] if others else []
    boxes = contents.of_rank_file(parts, converters.registry().values())
    return _inspection("mm_rank_file", "", found, notes=note, boxes=boxes)


def _hf(path: Path) -> Inspection:
    checkpoint = open_hf(path)
    found = list(checkpoint.tensors().values())
    try:
        family = ms_family_of(path) or family_of(path)
        name, boxes = family.name, contents.of_hf(checkpoint, family)
    except MMConvertError:
        name, boxes = "", contents.of_hf(checkpoint, None)
    return _inspection("hf", name, found, notes=list(checkpoint.notes), boxes=boxes)


def _ms(path: Path) -> Inspection:
    """A MindSpore file, or a folder of ranks."""
    model = ms_model(path, None, Options())
    side = model.side()
    files = model.checkpoint.parts
    found = [tensor for part in files for tensor in part.values()]
    families = converters.ms_registry().values()
    known = [f.name for f in families if knows_all(f, (t.name for t in found))]
    parts = {
        path.name if path.is_file() else f"rank_{rank}": part for rank, part in enumerate(files)
    }
    return _inspection(
        "ms_file" if path.is_file() else "ms",
        known[0] if known else "",
        found,
        sum(prod(whole.shape) for whole in side.wholes.values()),
        notes=list(model.notes),
        boxes=contents.of_rank_file(parts, families),
    )


def _mm(path: Path) -> Inspection:
    family = family_of(path)
    model, layout, parts = mm_model(family, path, ParallelConfig(), None, Options(), prefix="")
    side = mm_source(model.modules, model.dims, layout, parts)
    found = [tensor for part in parts.values() for tensor in part.values()]
    parameters = sum(prod(whole.shape) for whole in side.wholes.values())
    iteration = find_weights(path)[1]
    boxes = contents.of_mm(model.modules, layout, parts)
    notes = list(model.notes)
    return _inspection("mm", family.name, found, parameters, iteration, layout, notes, boxes)


def _inspection(
    kind: str,
    family: str,
    found: Iterable[StoredTensor],
    parameters: int | None = None,
    iteration: str = "",
    layout: Layout | None = None,
    notes: list[str] | None = None,
    boxes: list[Box] | None = None,
) -> Inspection:
    listing = list(found)
    sizes: Counter[str] = Counter()
    for tensor in listing:
        sizes[tensor.dtype] += tensor.nbytes
    return Inspection(
        kind,
        family,
        [dtype for dtype, _ in sizes.most_common()],
        sum(prod(t.shape) for t in listing) if parameters is None else parameters,
        sum(sizes.values()),
        len(listing),
        iteration,
        layout,
        listing,
        notes or [],
        boxes or [],
    )

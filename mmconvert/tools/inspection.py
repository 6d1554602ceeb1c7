"""What a checkpoint is: kind, family, sizes, and for MM the layout. Headers only."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from math import prod
from pathlib import Path

from mmconvert.config import ParallelConfig
from mmconvert.formats.adapters import holds_adapter
from mmconvert.formats.contents import Box
from mmconvert.formats.look import look
from mmconvert.sharding.layout import Layout, grid_flag
from mmconvert.stored import StoredTensor
from mmconvert.tools.adapters import about


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
        title: the kind in words.
        unit: what a box is, in words.
        optimizer: what state of an optimizer lies beside the weights; empty without one.
    """

    kind: str
    family: str
    dtype: list[str]
    parameters: int
    nbytes: int
    tensors: int
    iteration: str = ""
    layout: Layout | None = None
    listing: list[StoredTensor] = field(default_factory=list[StoredTensor])
    notes: list[str] = field(default_factory=list[str])
    boxes: list[Box] = field(default_factory=list[Box])
    title: str = ""
    unit: str = "file"
    optimizer: dict[str, object] = field(default_factory=dict[str, object])

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
        if self.optimizer:
            out["optimizer"] = self.optimizer
        if self.layout is not None:
            out["layout"] = layout_dict(self.layout)
        return out


def layout_dict(layout: Layout) -> dict[str, object]:
    """A layout as JSON, with every key, null where a module is absent."""
    flags = [field.name for field in fields(ParallelConfig)]
    out: dict[str, object] = {flag: None for flag in flags if flag.endswith("tp_size")}
    out |= {layout.tp_flag(key): size for key, size in layout.tp.items()}
    out |= {"pp_size": layout.pp_size, "vpp_size": layout.vpp_size, "ep_size": layout.ep}
    out |= {flag: None for flag in flags if flag.endswith(grid_flag(""))}
    return out | {grid_flag(k): [list(row) for row in grid] for k, grid in layout.grids.items()}


def inspect(path: Path) -> Inspection:
    """Looks at a checkpoint of any format, an adapter or a single file.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    found = look(path)
    optimizer, said = found.optimizer()
    sizes: Counter[str] = Counter()
    for tensor in found.listing:
        sizes[tensor.dtype] += tensor.nbytes
    return Inspection(
        found.kind,
        found.family,
        [dtype for dtype, _ in sizes.most_common()],
        sum(prod(whole.shape) for whole in found.wholes.values()),
        sum(sizes.values()),
        len(found.listing),
        found.iteration,
        found.layout,
        list(found.listing),
        [*found.notes, *([said] if said else []), *(about(path) if holds_adapter(path) else [])],
        list(found.boxes),
        found.title,
        found.unit,
        optimizer,
    )

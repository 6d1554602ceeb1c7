"""What a diff found: figures by tensor, by layer and by module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mmconvert.executor.distance import Totals

NOT_CONVERTED = "not converted"  # tensors of HF checkpoints that have no place in MM format


@dataclass(frozen=True)
class Facts:
    """One of the two checkpoints: ``kind`` is hf or mm, ``iteration`` is "" for hf."""

    path: Path
    kind: str
    family: str
    dtypes: tuple[str, ...]
    iteration: str = ""


@dataclass(frozen=True)
class At:
    """An element: the stored tensor in words ("" where nothing is stored), index, value."""

    place: str
    index: tuple[int, ...]
    value: float


@dataclass(frozen=True)
class TensorDistance:
    """One whole tensor.

    Attributes:
        name: the MM name with the model's layer number.
        hf_names: the HF tensors that it is made of.
        module: the module's MM name.
        layer: its number, or ``in`` or ``out`` for what stands before or after the layers.
        shape: of the whole.
        dtype_a, dtype_b: as stored.
        totals: the figures.
        a, b: where the largest difference is; None if nothing differs.
        kept: what an optimizer keeps of a weight, if it is that; "" for a weight.
    """

    name: str
    hf_names: tuple[str, ...]
    module: str
    layer: int | str
    shape: tuple[int, ...]
    dtype_a: str
    dtype_b: str
    totals: Totals
    a: At | None
    b: At | None
    kept: str = ""


@dataclass(frozen=True)
class DiffGroup:
    """Tensors together: a module (``layer`` None), or one layer of it."""

    module: str
    layer: int | str | None
    tensors: int
    changed: int
    totals: Totals


@dataclass(frozen=True)
class OtherShape:
    """A tensor that has another shape in B, so that nothing can be compared."""

    name: str
    a: tuple[int, ...]
    b: tuple[int, ...]


@dataclass(frozen=True)
class Diff:
    """The outcome.

    Attributes:
        a, b: the checkpoints.
        tensors: every tensor compared, in the model's order.
        only_a, only_b: names of tensors that the other has not.
        other_shapes: tensors that could not be compared.
        nbytes: bytes of A that were compared.
        notes: what is worth knowing.
        colours: of the modules, by their MM names.
        training: in what training would go on otherwise, in words.
    """

    a: Facts
    b: Facts
    tensors: list[TensorDistance]
    only_a: list[str]
    only_b: list[str]
    other_shapes: list[OtherShape]
    nbytes: int
    notes: list[str] = field(default_factory=list[str])
    colours: Mapping[str, str] = field(default_factory=dict[str, str])
    training: list[str] = field(default_factory=list[str])

    @property
    def equal(self) -> bool:
        """Whether both hold the same tensors with the same numbers."""
        parts = (self.changed(), self.only_a, self.only_b, self.other_shapes, self.training)
        return not any(parts)

    @property
    def totals(self) -> Totals:
        """All tensors together."""
        return _sum(t.totals for t in self.tensors)

    @property
    def weights(self) -> Totals:
        """All weights together, without an optimizer's state."""
        return _sum(t.totals for t in self.tensors if not t.kept)

    @property
    def with_state(self) -> bool:
        """Whether an optimizer's state was compared too."""
        return any(t.kept for t in self.tensors)

    def changed(self) -> list[TensorDistance]:
        """The tensors that differ, the largest part of the model's change first.

        By how much a tensor moved, not by how much of itself: one that was zero has moved by an
        infinite part of itself, and may matter least.
        """
        found = [t for t in self.tensors if t.totals.different]
        return sorted(found, key=lambda t: (-t.totals.gap, -t.totals.largest, t.name))

    def share(self, tensor: TensorDistance) -> float:
        """A tensor's part of the sum of squared differences, 0 to 1; NaN if that is infinite."""
        whole = self.totals.gap
        return (tensor.totals.gap / whole) ** 2 if whole else 0.0

    def odd(self) -> list[TensorDistance]:
        """The tensors that hold NaN or infinite values."""
        return [t for t in self.tensors if t.totals.odd]

    def modules(self) -> list[DiffGroup]:
        """Each module's tensors together, the largest relative L2 first."""
        return sorted(
            _grouped(self.tensors, lambda t: (t.module, None)), key=lambda g: -g.totals.relative
        )

    def layers(self) -> list[DiffGroup]:
        """Each layer's tensors together, in the model's order."""
        rest = [t for t in self.tensors if t.module != NOT_CONVERTED]
        order = {"in": -1, "out": 1 << 30}
        modules = list(dict.fromkeys(t.module for t in rest))
        groups = _grouped(rest, lambda t: (t.module, t.layer))
        return sorted(
            groups,
            key=lambda g: (
                modules.index(g.module),
                g.layer if isinstance(g.layer, int) else order[str(g.layer)],
            ),
        )


def _grouped(
    tensors: Iterable[TensorDistance],
    key: Callable[[TensorDistance], tuple[str, int | str | None]],
) -> list[DiffGroup]:
    groups: dict[tuple[str, int | str | None], list[TensorDistance]] = {}
    for tensor in tensors:
        groups.setdefault(key(tensor), []).append(tensor)
    return [
        DiffGroup(
            *(module, layer, len(found), sum(t.totals.different > 0 for t in found)),
            _sum(t.totals for t in found),
        )
        for (module, layer), found in groups.items()
    ]


def _sum(parts: Iterable[Totals]) -> Totals:
    total = Totals()
    for part in parts:
        total = total.plus(part)
    return total

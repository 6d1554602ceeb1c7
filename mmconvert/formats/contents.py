"""What each weight file, model chunk or rank file of a checkpoint holds: modules, layers, bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mmconvert.converters.family import Family, Variant
from mmconvert.converters.rows import ZEROS, Module, Row, encoders
from mmconvert.formats.hf.folder import HFCheckpoint
from mmconvert.names import NO_LAYER, TemplateIndex
from mmconvert.plan.plan import Whole
from mmconvert.sharding.layout import Chunk, Layout
from mmconvert.sharding.stages import flat
from mmconvert.stored import StoredTensor
from mmconvert.words import ranges

NOT_CONVERTED, LEFT_OUT, OTHER = "not converted", "left out", "other"
GROUPS = 6  # of tensors of an unknown family, by the first word of their names
BEFORE, AFTER = -1, -2  # "layers" of what stands before and after the layers
UNKNOWN = -3


def colours(modules: Sequence[Module]) -> dict[str, str]:
    """What gives modules their colours, by key: ``encoder1``, ``encoder2`` …, ``decoder``."""
    places = {m.key: f"encoder{n}" for n, m in enumerate(encoders(tuple(modules)), 1)}
    return {m.key: places.get(m.key, m.role) for m in modules}


@dataclass(frozen=True)
class Holding:
    """The tensors of one module in one place.

    Attributes:
        module: the module's key, or what else these tensors are, in words.
        layers: their numbers in the model; in a single rank file, in its model chunk.
        before, after: whether it holds tensors that stand before or after the layers.
        nbytes, tensors: how much.
        word: what the module is called in pictures.
        colour: its place among the colours of modules, see :func:`colours`.
    """

    module: str
    layers: tuple[int, ...]
    before: bool
    after: bool
    nbytes: int
    tensors: int
    word: str = ""
    colour: str = ""

    @property
    def words(self) -> str:
        """Such as: in, vision 0-11."""
        name = self.word or self.module
        name += f" {ranges(self.layers)}" if self.layers else ""
        return ("in, " if self.before else "") + name + (", out" if self.after else "")


@dataclass(frozen=True)
class Box:
    """One place: a weight file, or a model chunk of one rank (``chunk``)."""

    name: str
    holdings: tuple[Holding, ...]
    chunk: Chunk | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(holding.nbytes for holding in self.holdings)

    @property
    def tensors(self) -> int:
        """Number of its tensors."""
        return sum(holding.tensors for holding in self.holdings)

    def as_dict(self) -> dict[str, object]:
        """The place as JSON."""
        return {
            "place": self.name,
            "bytes": self.nbytes,
            "tensors": self.tensors,
            "holds": [
                {
                    "module": h.module,
                    "layers": ranges(h.layers),
                    "in": h.before,
                    "out": h.after,
                    "bytes": h.nbytes,
                    "tensors": h.tensors,
                }
                for h in self.holdings
            ],
        }


@dataclass(frozen=True, kw_only=True)
class Look:
    """What was seen.

    Attributes:
        kind: as in JSON: the name of the format, or which kind of file it is.
        title: the kind in words.
        family: the family's name; "" if it is not known.
        listing: every stored tensor.
        wholes: tensors by name, each whole; their blocks refer to ``stored``.
        stored: the tensors that the wholes are made of.
        boxes: what each file, rank or model chunk holds.
        unit: what a box is, in words.
        iteration: of training, where it tells.
        layout: of an MM checkpoint.
        notes: what is worth knowing, in words.
        optimizer: reads what state of an optimizer lies beside the weights: as JSON, and in words.
    """

    kind: str
    title: str
    family: str
    listing: Sequence[StoredTensor]
    wholes: Mapping[str, Whole]
    stored: Sequence[StoredTensor]
    boxes: Sequence[Box]
    unit: str = "file"
    iteration: str = ""
    layout: Layout | None = None
    notes: Sequence[str] = ()
    optimizer: Callable[[], tuple[dict[str, object], str]] = lambda: ({}, "")


@dataclass
class _Pile:
    layers: set[int] = field(default_factory=set[int])
    nbytes: int = 0
    tensors: int = 0


def _box(
    name: str,
    found: Iterable[tuple[str, int, StoredTensor]],
    modules: Sequence[Module] = (),
    chunk: Chunk | None = None,
) -> Box:
    """A place from (module, layer, tensor): ``modules`` in their order, then the others."""
    words, hues = {m.key: m.name for m in modules}, colours(modules)
    piles = {key: _Pile() for key in words}
    for module, layer, tensor in found:
        pile = piles.setdefault(module, _Pile())
        pile.layers.add(layer)
        pile.nbytes += tensor.nbytes
        pile.tensors += 1
    holdings = [
        Holding(
            module,
            tuple(sorted(layer for layer in pile.layers if layer >= 0)),
            BEFORE in pile.layers,
            AFTER in pile.layers,
            pile.nbytes,
            pile.tensors,
            words.get(module, ""),
            hues.get(module, ""),
        )
        for module, pile in piles.items()
        if pile.tensors
    ]
    return Box(name, tuple(holdings), chunk)


def of_mm(
    modules: Sequence[Module],
    layout: Layout,
    parts: Mapping[Chunk, Mapping[str, StoredTensor]],
) -> list[Box]:
    """Every model chunk of every rank of an MM checkpoint."""
    index = TemplateIndex((row.mm, (m.key, section)) for m, section, row in _sections(modules))
    boxes: list[Box] = []
    for chunk, tensors in sorted(parts.items()):
        stage = chunk.virtual * layout.pp_size + chunk.rank.pp
        first = {key: sum(flat(grid)[:stage]) for key, grid in layout.grids.items()}
        found: list[tuple[str, int, StoredTensor]] = []
        for name, tensor in tensors.items():
            module, layer = _placed(index.find(name))
            found.append((module, layer + first[module] if layer >= 0 else layer, tensor))
        name = layout.folder(chunk.rank)
        name += f" {layout.part(chunk.virtual)}" if layout.vpp_size > 1 else ""
        boxes.append(_box(name, found, modules, chunk))
    return boxes


def of_rank_file(
    parts: Mapping[str, Mapping[str, StoredTensor]], families: Iterable[Family]
) -> list[Box]:
    """Every model chunk of a single rank file. Layers are numbered as there: from 0.

    Such a file may not tell its family, so any family's table may know a name.
    """
    table: dict[str, tuple[str, int]] = {}
    known: dict[str, Module] = {}
    for family in families:
        for variant in family.variants:
            for module, section, row in _sections(family.modules(variant)):
                table.setdefault(row.mm, (module.key, section))
                known.setdefault(module.key, module)
    index = TemplateIndex(table.items())
    modules = sorted(known.values(), key=lambda m: m.role != "encoder")
    boxes: list[Box] = []
    for part, tensors in parts.items():
        found = ((*_placed(index.find(name)), tensor) for name, tensor in tensors.items())
        boxes.append(_box(part, found, modules))
    return boxes


def _sections(modules: Iterable[Module]) -> Iterator[tuple[Module, int, Row]]:
    """Every row with BEFORE, AFTER, or 0 for those of the layers."""
    for module in modules:
        first = module.everywhere + module.before
        for section, rows in ((BEFORE, first), (0, module.layer), (AFTER, module.after)):
            for row in rows:
                yield module, section, row


def _placed(hit: tuple[tuple[str, int], int, int] | None) -> tuple[str, int]:
    """Module and layer of a name, from what the index says of it."""
    if hit is None:
        return OTHER, UNKNOWN
    (module, section), number, _ = hit
    return module, section if number == NO_LAYER else number


def of_hf(
    checkpoint: HFCheckpoint, family: Family | None, variant: Variant | None = None
) -> list[Box]:
    """Every weight file of an HF checkpoint; without a family, by the first word of names.

    Args:
        variant: of the model; None: what config.json says of it.
    """
    if family is None:
        return _by_first_word(checkpoint)
    modules = family.modules(variant or Variant(traits=family.traits(checkpoint.config)))
    table: dict[str, tuple[str, int]] = {}
    for module, section, row in _sections(modules):
        for name in row.hf:
            if name != ZEROS:
                table.setdefault(name, (module.key, section))
    index = TemplateIndex(table.items())

    def place(name: str) -> tuple[str, int]:
        hub = family.hub_name(name)
        hit = index.find(hub)
        if hit is None and family.why_carried(hub):
            return NOT_CONVERTED, UNKNOWN
        if hit is None and family.why_dropped(hub):
            return LEFT_OUT, UNKNOWN
        return _placed(hit)

    return [
        _box(file.path.name, ((*place(t.name), t) for t in file.tensors), modules)
        for file in checkpoint.files
    ]


def _by_first_word(checkpoint: HFCheckpoint) -> list[Box]:
    sizes: dict[str, int] = {}
    for file in checkpoint.files:
        for tensor in file.tensors:
            word = tensor.name.partition(".")[0]
            sizes[word] = sizes.get(word, 0) + tensor.nbytes
    kept = set(sorted(sizes, key=lambda word: -sizes[word])[:GROUPS])

    def place(name: str) -> tuple[str, int]:
        word = name.partition(".")[0]
        return (word if word in kept else OTHER), UNKNOWN

    return [
        _box(file.path.name, ((*place(t.name), t) for t in file.tensors))
        for file in checkpoint.files
    ]

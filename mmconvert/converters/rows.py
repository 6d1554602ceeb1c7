"""What a family table is made of: rows and modules, and their names in each naming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from mmconvert.errors import RequestError
from mmconvert.names import EXPERT, NO_EXPERT, TemplateIndex, fields, fill
from mmconvert.sharding.layout import tp_flag
from mmconvert.sharding.spans import Concat, Interleave, Part, Split

Fuse = Concat | Interleave | Part
Role = Literal["encoder", "decoder", "head"]
Medium = Literal["pictures", "sounds"]

ZEROS = ""  # in a row's HF names: as many zeros as the first source has, kept by no HF tensor
CONCAT = Concat()
OUTPUT_LAYER = "text_decoder.output_layer.weight"


@dataclass(frozen=True)
class Row:
    """One line of a table: a whole tensor, and what each naming calls it or makes it of.

    Attributes:
        names: naming -> templates of its names, in the order in which they are fused. Its
            ``own`` naming has one, that of the whole; ``{layer}`` is the local number in a
            checkpoint, ``{expert}`` that on its expert-parallel rank. In others, ZEROS among them
            is a part that only the whole has. A name without ``{expert}`` in the row of an expert
            is of a tensor that stacks the experts along its first dimension. ``{index}`` is the
            place of the layer among those of ``only``.
        own: the naming of the whole.
        fuses: naming -> how its tensors form the whole; absent: one below the other.
        cuts: naming -> how the whole is divided over tp ranks; None copies it to every rank.
        sources: the naming that the row is looked at from; see :func:`in_naming`.
        rows: names of the dimensions that give the rows of each HF tensor, as the whole has them;
            () leaves them unchecked.
        cols: name of the dimension that gives the columns; "" leaves them unchecked.
        tied_to: MM name of the row whose tensor this one repeats (tied embeddings). Such a row
            stands only on another model chunk than its original's, and may be absent in HF.
        transposed: the one HF tensor, a matrix or a stack of them, is stored the other way round.
        only: name of the list of layers that have this row; "" is all of them.
        layers: that list, where it is known; None is all layers.
        keeps_dtype: no ``--dtype`` casts it.
    """

    names: Mapping[str, tuple[str, ...]] = field(hash=False)
    own: str = "mm"
    fuses: Mapping[str, Fuse] = field(default_factory=dict[str, Fuse], hash=False)
    cuts: Mapping[str, Split | None] = field(default_factory=dict[str, Split | None], hash=False)
    sources: str = "hf"
    rows: tuple[str, ...] = ()
    cols: str = ""
    tied_to: str = ""
    transposed: bool = False
    only: str = ""
    layers: tuple[int, ...] | None = None
    keeps_dtype: bool = False

    @property
    def mm(self) -> str:
        """The template of the whole's name: the MM name, in a table that leads to MM format."""
        return self.names[self.own][0]

    @property
    def hf(self) -> tuple[str, ...]:
        """The templates of what it is made of: the HF names, unless it is looked at otherwise."""
        return self.names[self.sources]

    @property
    def fuse(self) -> Fuse:
        """How these form the whole."""
        return self.fuses.get(self.sources, CONCAT)

    @property
    def shard(self) -> Split | None:
        """How the whole is divided over tp ranks in its own naming."""
        return self.cuts.get(self.own)

    @property
    def of_expert(self) -> bool:
        """Whether there is one such tensor for each expert."""
        return EXPERT in self.mm

    @property
    def of_stack(self) -> bool:
        """Whether it is an expert's and HF has one tensor for all experts."""
        return self.of_expert and not any(EXPERT in name for name in self.hf)

    def hf_names(self, layer: int, expert: int = NO_EXPERT) -> list[str]:
        """The HF tensors that make it, in hub spelling; of stacked experts that of all."""
        index = self.layers.index(layer) if self.layers and layer in self.layers else layer
        return [fill(name, layer, expert, index) for name in self.hf if name != ZEROS]


def row(
    mm: str,
    *hf: str,
    rows: str = "",
    cols: str = "",
    fuse: Fuse = CONCAT,
    shard: Split | None = None,
    tied_to: str = "",
    transposed: bool = False,
    only: str = "",
    own: str = "mm",
    names: Mapping[str, str | tuple[str, ...]] | None = None,
    fuses: Mapping[str, Fuse] | None = None,
    cuts: Mapping[str, Split | None] | None = None,
) -> Row:
    """A :class:`Row`, with ``rows`` as words: ``rows="KEY.q KEY.kv KEY.kv"``, and ``{}`` in a
    name for ``{layer}``.

    Args:
        mm: the name of the whole, in the naming ``own``; ``shard`` is how that cuts it.
        hf: the names of the HF tensors that ``fuse`` makes it of.
        names, fuses, cuts: the same in further namings.
    """
    given: dict[str, str | tuple[str, ...]] = {"hf": hf, own: mm, **(names or {})}
    listed = {k: (found,) if isinstance(found, str) else found for k, found in given.items()}
    return Row(
        {naming: tuple(map(fields, templates)) for naming, templates in listed.items()},
        own,
        {"hf": fuse, **(fuses or {})},
        {own: shard, **(cuts or {})},
        rows=tuple(rows.split()),
        cols=cols,
        tied_to=tied_to,
        transposed=transposed,
        only=only,
    )


@dataclass(frozen=True)
class Module:
    """An encoder or decoder of a family: rows before its layers, in each layer, after them.

    Attributes:
        key: names its stage grid, tp size and sizes: ``KEY_pp_layers``, ``KEY_tp_size``,
            ``KEY.layers``.
        label: the module's MM name, for people.
        role: an encoder hands features to the decoder, and stands before it in the pipeline;
            a head is an output layer that is a module of its own.
        word: what it is called in pictures; not given: the first word of its label.
        medium: what an encoder takes in.
        beside_text: whether training can use it only as a whole, on the first stage of the text.
        everywhere: rows outside the layers whose tensors stand on every pipeline stage.
    """

    key: str
    label: str
    before: tuple[Row, ...]
    layer: tuple[Row, ...]
    after: tuple[Row, ...]
    role: Role = "encoder"
    word: str = ""
    medium: Medium = "pictures"
    beside_text: bool = False
    everywhere: tuple[Row, ...] = ()

    def all_rows(self) -> tuple[Row, ...]:
        """Every row, in model order."""
        return self.everywhere + self.before + self.layer + self.after

    @property
    def tp_flag(self) -> str:
        """The user's name of its tensor-parallel size."""
        return tp_flag(self.key, self.key if self.role == "decoder" else "")

    @property
    def name(self) -> str:
        """What it is called in pictures."""
        return self.word or self.label.partition("_")[0]

    @property
    def has_experts(self) -> bool:
        """Whether some of its tensors are an expert's."""
        return any(r.of_expert for r in self.layer)


def bound(modules: tuple[Module, ...], lists: Mapping[str, tuple[int, ...]]) -> tuple[Module, ...]:
    """The table with the lists of layers that its rows name."""
    return tuple(
        replace(
            m, layer=tuple(replace(r, layers=lists.get(r.only)) if r.only else r for r in m.layer)
        )
        for m in modules
    )


def with_experts_transposed(modules: tuple[Module, ...]) -> tuple[Module, ...]:
    """The table whose experts of stacks have their rows where others have columns."""

    def changed(r: Row) -> Row:
        if not r.of_stack:
            return r
        return replace(r, rows=(r.cols,), cols=r.rows[0], transposed=not r.transposed)

    return tuple(replace(m, layer=tuple(map(changed, m.layer))) for m in modules)


def decoder_of(modules: Sequence[Module]) -> str:
    """The key of the module that comes after all encoders; "" if it is not there."""
    return next((m.key for m in modules if m.role == "decoder"), "")


def vocabulary_of(decoder: str) -> str:
    """The dimension that counts a decoder's words."""
    return f"{decoder}.vocab"


def encoders(modules: tuple[Module, ...]) -> tuple[Module, ...]:
    """The table without what follows the encoders."""
    return tuple(m for m in modules if m.role == "encoder")


def in_naming(modules: tuple[Module, ...], naming: str) -> tuple[Module, ...]:
    """The table as a format of another naming than Hugging Face's sees it: ``row.hf`` are its
    names, and ``row.fuse`` is how its tensors form the whole.

    Raises:
        RequestError: a row has no name there.
    """

    def seen(r: Row) -> Row:
        if naming not in r.names:
            raise RequestError(
                f"{r.mm} has no name in the naming {naming}",
                f"one of {', '.join(sorted(r.names))}",
                "complete the family's table",
            )
        if naming == r.sources:
            return r
        alone = len(r.names[naming]) != len(r.rows)
        rows = () if alone else r.rows
        return replace(r, sources=naming, rows=rows, transposed=False)

    return tuple(
        replace(
            m,
            before=tuple(map(seen, m.before)),
            layer=tuple(map(seen, m.layer)),
            after=tuple(map(seen, m.after)),
            everywhere=tuple(map(seen, m.everywhere)),
        )
        for m in modules
    )


def mm_index(modules: tuple[Module, ...]) -> TemplateIndex[tuple[Module, Row]]:
    """Finds the row of an MM name."""
    return TemplateIndex((r.mm, (m, r)) for m in modules for r in m.all_rows())


def hf_templates(modules: tuple[Module, ...]) -> TemplateIndex[Row]:
    """Finds the row of an HF name in hub spelling."""
    found: dict[str, Row] = {}
    for module in modules:
        for r in module.all_rows():
            for name in r.hf:
                if name != ZEROS:
                    found.setdefault(name, r)
    return TemplateIndex(found.items())

"""An adapter of PEFT as a side of a plan: the matrices of MM format that its own form.

Where MM format packs several of Hugging Face's linear layers into one (q, k, v; gate, up), one A
serves them all. If theirs are equal, that is it. Else A is theirs one below the other, and B has
a block for each: exact as a product, at the sum of their ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from mmconvert.adapters import MM_A, MM_B, WEIGHT, Settings
from mmconvert.converters.configs import Dims
from mmconvert.converters.rows import Module
from mmconvert.errors import RequestError, TensorError
from mmconvert.executor.compare import same_bytes
from mmconvert.formats.mm.instances import Instance, experts_of, instances
from mmconvert.formats.peft.folder import LoraPair, PartKey
from mmconvert.names import number, summarise
from mmconvert.plan.dtypes import joint_dtype
from mmconvert.plan.plan import Block, Key, Scaled, Side, Term, UnstoredBlock, Whole, matrix
from mmconvert.sharding.spans import Span


class Packed(NamedTuple):
    """What one linear layer of MM format is made of.

    Attributes:
        item: its row and layer.
        parts: of each Hugging Face layer; None where that is not adapted.
        spans: the rows of each beside those of the whole.
        rank: that it needs.
        equal: one A serves all parts.
    """

    item: Instance
    parts: list[LoraPair | None]
    spans: list[list[Span]]
    rank: int
    equal: bool

    @property
    def rows(self) -> int:
        """Rows of the whole B."""
        return sum(span.length for spans in self.spans for span in spans)

    @property
    def found(self) -> list[LoraPair]:
        """The parts that are adapted."""
        return [part for part in self.parts if part is not None]


def packed(
    base: Sequence[Module], layers: Mapping[str, int], parts: Mapping[PartKey, LoraPair], dims: Dims
) -> list[Packed]:
    """The linear layers of MM format that an adapter changes.

    Args:
        base: the rows that it changes, each in the layers that it changes.
        layers: how many each module has.

    Raises:
        TensorError: shapes that do not fit, or sizes that are not known.
    """
    found: list[Packed] = []
    for item, mine, equal in grouped(base, layers, parts, experts_of(base, dims)):
        there = [part for part in mine if part is not None]
        rank = there[0].rank if equal else sum(part.rank for part in there)
        found.append(Packed(item, mine, _spans(item, mine, dims), rank, equal))
    return found


def grouped(
    base: Sequence[Module],
    layers: Mapping[str, int],
    parts: Mapping[PartKey, LoraPair],
    experts: Mapping[str, int] | None = None,
) -> Iterator[tuple[Instance, list[LoraPair | None], bool]]:
    """The linear layers of MM format, the parts of each, and whether one A serves them all."""
    for item in instances(base, layers, experts):
        mine = [parts.get(place) for place in item.hf_places()]
        there = [part for part in mine if part is not None]
        if not there:
            raise TensorError(
                f"{item.key.name()} is adapted in some experts only", "all experts of a layer"
            )
        whole = len(there) == len(mine)
        yield item, mine, whole and all(_same_a(there[0], part) for part in there[1:])


def _same_a(one: LoraPair, other: LoraPair) -> bool:
    """Whether two parts have the same A and scaling."""
    if (one.a.shape, one.a.dtype, one.scale) != (other.a.shape, other.a.dtype, other.scale):
        return False
    same = same_bytes(one.a, other.a)
    return bool(same) or (same is None and bool(same_bytes(other.a, one.a) is None))


def _spans(item: Instance, parts: Sequence[LoraPair | None], dims: Dims) -> list[list[Span]]:
    row = item.row
    lengths: list[int] = []
    for place, part in enumerate(parts):
        known = dims.get(row.rows[place]) if place < len(row.rows) else None
        twins = [
            other.b.shape[0]
            for i, other in enumerate(parts)
            if other is not None and row.rows[i : i + 1] == row.rows[place : place + 1]
        ]
        length = part.b.shape[0] if part is not None else known or (twins[0] if twins else 0)
        if part is not None and known not in (None, length):
            raise TensorError(
                f"{part.b.name} is {list(part.b.shape)}; the base model has {known} rows there",
                "an adapter and a base model of one size",
                "give the base model that the adapter was trained on",
            )
        if not length:
            raise _unknown(item, row.rows[place] if place < len(row.rows) else "its rows")
        lengths.append(length)
    unit = getattr(row.fuse, "groups", "")
    if unit and unit not in dims:
        raise _unknown(item, unit)
    for part in parts:
        cols = dims.get(row.cols)
        if part is not None and cols not in (None, matrix(part.a.shape)[1]):
            raise TensorError(
                f"{part.a.name} is {list(part.a.shape)}; the base model has {cols} columns there",
                "an adapter and a base model of one size",
                "give the base model that the adapter was trained on",
            )
    return row.fuse.maps(lengths, dims)


def _unknown(item: Instance, what: str) -> TensorError:
    return TensorError(
        f"{item.key.name()}: {what} of the base model is not known",
        "the sizes of the base model, with its number of heads",
        "give --cfg.base_hf_dir, a folder with the base model's config.json, or --cfg.base_mm_dir",
    )


class Uniform(NamedTuple):
    """The one rank and scaling that MM format knows; None where nothing tells alpha."""

    rank: int
    scale: float | None

    def factor(self, part: LoraPair) -> float:
        """What a layer's B is multiplied with, so that the one scaling is its own."""
        return 1.0 if part.scale is None or not self.scale else part.scale / self.scale


def adapter_side(found: Sequence[Packed], of: Uniform) -> Side:
    """The matrices of MM format, all of one rank and scaling."""
    side, rank = Side(), of.rank
    for layer in found:
        item = layer.item
        stem = item.row.mm.removesuffix(WEIGHT)
        key_a = Key(stem + MM_A, item.layer, item.expert)
        key_b = Key(stem + MM_B, item.layer, item.expert)
        first = layer.found[0]
        width = matrix(first.a.shape)[1]
        for part in layer.found:
            if matrix(part.a.shape)[1] != width:
                raise TensorError(
                    f"{part.a.name} is {list(part.a.shape)}, {first.a.name} {list(first.a.shape)}",
                    f"one width, as {item.row.mm} is made of both",
                )
        a = Whole((rank, width), joint_dtype([part.a.dtype for part in layer.found]), [[]])
        b = Whole((layer.rows, rank), joint_dtype([part.b.dtype for part in layer.found]), [[]])
        side.wholes[key_a], side.wholes[key_b] = a, b
        _fill(side, layer, (key_a, key_b), of)
    return side


def _fill(side: Side, layer: Packed, keys: tuple[Key, Key], of: Uniform) -> None:
    """Where the parts lie in A and B, and what is zero there."""
    a, b = (side.wholes[key] for key in keys)
    rank, width, column = of.rank, a.shape[1], 0
    for part, spans in zip(layer.parts, layer.spans, strict=True):
        own = 0 if part is None else part.rank
        if part is not None:
            block = Block(len(side.stored), 0, 0, column, 0, own, width)
            if layer.equal and a.copies[0]:
                a.copies.append([block])
            else:
                a.copies[0].append(block)
            side.stored.append(part.a)
            number = len(side.stored)
            rows = [Block(number, s.start, 0, s.whole, column, s.length, own) for s in spans]
            if (factor := of.factor(part)) == 1:
                b.copies[0] += rows
            else:
                height = part.b.shape[0]
                whole = Block(number, 0, 0, 0, 0, height, own)
                term = Term(part.path, (), (whole,), own, height, own, factor)
                side.scaled.append(Scaled(keys[1], term, rows))
                b.zeros += [UnstoredBlock(s.whole, column, s.length, own) for s in spans]
            side.stored.append(part.b)
        rest = column + own
        gaps = [(s.whole, 0, s.length, column) for s in spans]
        gaps += [(s.whole, rest, s.length, rank - rest) for s in spans]
        b.zeros += [UnstoredBlock(*gap) for gap in gaps if gap[3]]
        column = 0 if layer.equal else rest
    if layer.rank < rank:
        a.zeros.append(UnstoredBlock(layer.rank, 0, rank - layer.rank, width))


def notes_of(found: Sequence[Packed], of: Uniform, settings: Settings) -> list[str]:
    """What is worth knowing of the adapter in MM format.

    Args:
        settings: as they are to be noted: of the matrices of MM format.
    """
    stacked = [layer for layer in found if not layer.equal]
    own = max(part.rank for layer in found for part in layer.found)
    words = (
        f"train with --lora-r {settings.r} --lora-alpha {_alpha(settings)} --lora-target-modules "
        + " ".join(settings.targets)
    )
    if of.rank == own:
        return [words]
    modules = {layer.item.row.mm.removesuffix(WEIGHT).rpartition(".")[2] for layer in stacked}
    dead = sum(of.rank - layer.rank for layer in found)
    more = (
        f"; {number(range(dead), 'rank')} of padding in other layers stay zero in further training"
        if dead
        else ""
    )
    return [
        f"warning: {summarise(modules)} joins layers with an A of their own: rank {own} becomes "
        f"{of.rank}, exact as a product (--cfg.exact_rank refuses this){more}; a model trained "
        "with canonical_model keeps q, k, v and gate, up apart and the rank as it is",
        words,
    ]


def _alpha(settings: Settings) -> str:
    return "ALPHA (as it was trained)" if settings.alpha is None else f"{settings.alpha:g}"


def refuse_growth(found: Sequence[Packed], canonical: bool) -> None:
    """Raises RequestError for layers whose rank would grow, as ``exact_rank`` asks."""
    for layer in found:
        if not layer.equal:
            names = [part.a.name for part in layer.found]
            raise RequestError(
                f"{layer.item.key.name()} is made of layers with an A of their own: "
                f"{summarise(names, 3)}",
                "one A for all, as --cfg.exact_rank asks",
                "give --cfg.common_model_config.enable_canonical_hf_struct True and train with "
                "canonical_model"
                if canonical
                else "leave --cfg.exact_rank out, or train the adapter in MM format",
            )


def with_rank(
    settings: Settings, of: Uniform, found: Sequence[Packed], canonical: bool
) -> Settings:
    """The settings of the matrices of MM format."""
    modules = {layer.item.row.mm.removesuffix(WEIGHT).rpartition(".")[2] for layer in found}
    return replace(
        settings,
        r=of.rank,
        alpha=None if of.scale is None else of.scale * of.rank,
        targets=tuple(sorted(modules)),
        rslora=False,
        ranks=(),
        alphas=(),
        structure="canonical" if canonical else "fused",
    )

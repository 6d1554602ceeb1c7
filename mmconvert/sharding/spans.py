"""Fuse and shard maps: how rows of several tensors form one, and how one is divided.

A map is a list of :class:`Span`: runs of rows (or columns) of a part beside the runs of the
whole that they are. Nothing here knows about names, files or data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mmconvert.errors import LayoutError, TensorError, UnknownSizeError


class Span(NamedTuple):
    """``length`` rows of a part from ``start`` on are the rows of the whole from ``whole`` on."""

    start: int
    whole: int
    length: int


@dataclass(frozen=True)
class Concat:
    """The sources stand one below the other."""

    def maps(self, lengths: Sequence[int], dims: dict[str, int]) -> list[list[Span]]:
        """One list of spans per source; ``lengths`` are the sources' numbers of rows."""
        del dims
        return _interleaved(lengths, 1)


@dataclass(frozen=True)
class Interleave:
    """The sources are cut into groups, which alternate: a1 b1 c1 a2 b2 c2 ...

    Attributes:
        groups: name of the dimension that counts the groups (query groups, or heads).
        packed_qkv: the one source is q, k and v below each other; its thirds alternate.

    Source: Megatron's ``SelfAttention`` reads ``linear_qkv`` per query group as q, k, v.
    """

    groups: str
    packed_qkv: bool = False

    def maps(self, lengths: Sequence[int], dims: dict[str, int]) -> list[list[Span]]:
        """One list of spans per source.

        Raises:
            TensorError: rows that do not divide into the groups.
        """
        groups = dims[self.groups]
        if self.packed_qkv:
            (length,) = lengths
            if length % 3:
                raise TensorError(f"{length} rows cannot be q, k and v of equal size")
            thirds = _interleaved([length // 3] * 3, groups)
            return [
                [
                    Span(span.start + part * (length // 3), span.whole, span.length)
                    for part, spans in enumerate(thirds)
                    for span in spans
                ]
            ]
        return _interleaved(lengths, groups)


def _interleaved(lengths: Sequence[int], groups: int) -> list[list[Span]]:
    for length in lengths:
        if length % groups:
            raise TensorError(f"{length} rows cannot be divided into {groups} query groups")
    steps = [length // groups for length in lengths]
    maps: list[list[Span]] = []
    for part, step in enumerate(steps):
        before, stride = sum(steps[:part]), sum(steps)
        maps.append([Span(g * step, g * stride + before, step) for g in range(groups)])
    return maps


@dataclass(frozen=True)
class Part:
    """The whole is one of several equal parts of its one source, which other wholes share.

    Attributes:
        index: which part, from 0.
        of: number of parts.
        groups: name of the dimension that counts the groups, each of which holds all parts:
            a1 b1 c1 a2 b2 c2 ...; "" where the parts stand one below the other.
    """

    index: int
    of: int
    groups: str = ""

    def maps(self, lengths: Sequence[int], dims: dict[str, int]) -> list[list[Span]]:
        """The spans of the one source.

        Raises:
            TensorError: rows that do not divide into the groups and parts.
        """
        (length,) = lengths
        groups = dims[self.groups] if self.groups else 1
        if length % (groups * self.of):
            heads = f"{groups} groups of " if self.groups else ""
            raise TensorError(f"{length} rows do not divide into {heads}{self.of} parts")
        step = length // (groups * self.of)
        return [[Span((g * self.of + self.index) * step, g * step, step) for g in range(groups)]]


@dataclass(frozen=True)
class Split:
    """How a whole tensor is divided over tensor-parallel ranks.

    Attributes:
        axis: 0 divides rows (column-parallel in Megatron's words), 1 columns (row-parallel).
        parts: the axis holds this many equal parts (gate and up; q, k and v), each divided.
        unit: name of the dimension that counts what must stay whole (heads, query groups).
        uneven: the first ranks hold one unit more where the units do not divide evenly.
    """

    axis: int = 0
    parts: int = 1
    unit: str = ""
    uneven: bool = False

    def spans(self, length: int, size: int, rank: int, dims: dict[str, int]) -> list[Span]:
        """What ``rank`` of ``size`` holds of an axis of ``length``.

        Where the number of units is not known, it is not checked that ``size`` keeps them whole.

        Raises:
            LayoutError: the axis cannot be divided so.
            UnknownSizeError: uneven units whose number is not known.
        """
        if size == 1:
            return [Span(0, 0, length)]
        part = length // self.parts
        if length % self.parts:
            raise LayoutError(f"{length} cannot be divided into {self.parts} parts of equal size")
        if self.uneven and self.unit and self.unit not in dims:
            raise UnknownSizeError(
                f"the number of {self.unit_words} is not known, and shapes do not tell it",
                "mmconvert.json beside the checkpoint, or the original model's config.json",
                "give --cfg.hf_config.hf_dir, the folder of the original model",
            )
        units = dims.get(self.unit, part)
        if part % units:
            raise LayoutError(f"{part} does not divide into {units} {self.unit_words}")
        if units % size and not self.uneven:
            raise LayoutError(
                f"{units} {self.unit_words} cannot be divided over tp size {size}",
                f"a tp size among {divisors(units)}",
                "choose such a size for this module",
            )
        first, count = share(units, size, rank)
        if count == 0:
            raise LayoutError(
                f"{units} {self.unit_words} leave tp rank {rank} of {size} without any",
                f"a tp size of at most {units}",
            )
        step = part // units
        return [
            Span(p * count * step, p * part + first * step, count * step) for p in range(self.parts)
        ]

    @property
    def unit_words(self) -> str:
        """The unit in words, for messages."""
        if self.unit:
            return self.unit.replace(".", " ").replace("_", " ")
        return "rows" if self.axis == 0 else "columns"

    def observed(self, lengths: Sequence[int]) -> list[list[Span]]:
        """The spans that shards of these lengths have, whatever divided them.

        Raises:
            TensorError: a shard that does not hold its parts in equal sizes.
        """
        for length in lengths:
            if length % self.parts:
                raise TensorError(f"a shard of {length} is not {self.parts} equal parts")
        if len(lengths) == 1:
            return [[Span(0, 0, lengths[0])]]
        steps = [length // self.parts for length in lengths]
        part = sum(steps)
        maps: list[list[Span]] = []
        for rank, step in enumerate(steps):
            before = sum(steps[:rank])
            maps.append([Span(p * step, p * part + before, step) for p in range(self.parts)])
        return maps


COLUMN = Split()  # rows; Megatron's ColumnParallelLinear, VocabParallelEmbedding
ROW = Split(axis=1)  # columns; Megatron's RowParallelLinear
GATED = Split(parts=2)  # rows of gate and of up each


def heads(unit: str) -> Split:
    """Rows in whole heads or query groups."""
    return Split(unit=unit)


def head_columns(unit: str) -> Split:
    """Columns in whole heads or query groups: what an attention's output projection reads."""
    return Split(axis=1, unit=unit)


def share(units: int, size: int, rank: int) -> tuple[int, int]:
    """First unit and number of units of ``rank``; the first ``units % size`` ranks hold one more.

    Source: the reference's uneven division of heads and vocabulary (mm-checkpoints, section 2).
    """
    each, more = divmod(units, size)
    return rank * each + min(rank, more), each + (rank < more)


def divisors(number: int) -> list[int]:
    """The sizes that divide ``number``, at most the first twelve."""
    return [d for d in range(1, number + 1) if number % d == 0][:12]

"""The rows of adapters, derived from a family's rows: no table of their own.

A linear layer whose rows are divided (column-parallel) has B divided in the same way and A on every
rank; one whose columns are divided (row-parallel) has A divided and B on every rank. What fuses
the rows of the weight fuses those of B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from mmconvert.adapters import MM_A, MM_B, WEIGHT
from mmconvert.converters.configs import Dims
from mmconvert.converters.rows import Module, Row
from mmconvert.errors import TensorError
from mmconvert.names import INDEX, NO_LAYER
from mmconvert.sharding.spans import Span

# Modules with a matrix that are no linear layer: nothing adapts them in MM format.
NO_LINEAR = {"word_embeddings", "pos_embed", "position_embedding", "router"}


def is_linear(row: Row) -> bool:
    """Whether a row is the weight of a linear layer."""
    module, dot, kind = row.mm.rpartition(".")
    return dot + kind == WEIGHT and bool(row.cols) and module.rpartition(".")[2] not in NO_LINEAR


def linear(modules: Iterable[Module]) -> tuple[Module, ...]:
    """A table's linear layers alone."""
    return _filtered(modules, lambda row: row if is_linear(row) else None)


def restricted(
    modules: Iterable[Module], present: Mapping[str, Iterable[int]]
) -> tuple[Module, ...]:
    """The rows that an adapter changes, each in the layers that it changes.

    Args:
        present: the layers by the row's template; NO_LAYER for those outside the layers.

    Raises:
        TensorError: some layers of a row whose Hugging Face names count those that have it.
    """

    def cut(row: Row) -> Row | None:
        if row.mm not in present:
            return None
        layers = tuple(sorted(set(present[row.mm]) - {NO_LAYER}))
        counted = layers and any(INDEX in name for name in row.hf)
        if counted and row.layers not in (None, layers):
            raise TensorError(
                f"{row.mm} is adapted in layers {list(layers)} only",
                f"adapters in all layers that have it: {list(row.layers or ())}",
                "merge the adapter into the Hugging Face model (lora_merge), and convert that",
            )
        return replace(row, layers=layers) if layers else row

    return _filtered(modules, cut)


def like(modules: Iterable[Module], base: Iterable[Module]) -> tuple[Module, ...]:
    """The rows of a table that stand in another of the same family, in the same layers."""
    layers = {r.mm: r.layers for m in base for r in m.all_rows()}
    return _filtered(
        modules, lambda row: replace(row, layers=layers[row.mm]) if row.mm in layers else None
    )


def _filtered(modules: Iterable[Module], cut: Callable[[Row], Row | None]) -> tuple[Module, ...]:
    found: list[Module] = []
    for m in modules:
        parts = [m.before, m.layer, m.after, m.everywhere]
        before, layer, after, every = (
            tuple(new for row in rows if (new := cut(row)) is not None) for rows in parts
        )
        if before or layer or after or every:
            found.append(replace(m, before=before, layer=layer, after=after, everywhere=every))
    return tuple(found)


def derived(modules: Iterable[Module]) -> tuple[Module, ...]:
    """The rows of A and B of each linear layer of a table."""

    def both(rows: Sequence[Row]) -> tuple[Row, ...]:
        return tuple(new for row in rows for new in pair(row))

    return tuple(
        replace(
            m,
            before=both(m.before),
            layer=both(m.layer),
            after=both(m.after),
            everywhere=both(m.everywhere),
        )
        for m in modules
    )


def pair(row: Row) -> tuple[Row, Row]:
    """The rows of A and B of a linear layer."""
    stem = row.mm.removesuffix(WEIGHT)
    by_columns = row.shard is not None and row.shard.axis == 1
    parts = tuple(name for name in row.hf if name)
    plain = replace(row, tied_to="", transposed=False, keeps_dtype=False)
    a = {row.own: (stem + MM_A,), row.sources: parts}
    b = {row.own: (stem + MM_B,), row.sources: parts}
    return (
        replace(plain, names=a, rows=(), cuts={row.own: row.shard if by_columns else None}),
        replace(plain, names=b, cols="", cuts={row.own: None if by_columns else row.shard}),
    )


def part_lengths(row: Row, rows: int, dims: Dims) -> list[int] | None:
    """The numbers of rows of each Hugging Face tensor of a whole with ``rows`` rows; None where
    the sizes are not known.
    """
    if len(row.hf) == 1:
        return [rows]
    if row.rows and all(name in dims for name in row.rows):
        found = [dims[name] for name in row.rows]
        return found if sum(found) == rows else None
    if row.rows and len(set(row.rows)) == 1 and rows % len(row.hf) == 0:
        return [rows // len(row.hf)] * len(row.hf)
    return None


def part_spans(row: Row, rows: int, dims: Dims, name: str) -> list[list[Span]]:
    """For each Hugging Face tensor of a whole: its rows beside those of the whole.

    Raises:
        TensorError: sizes that are not known, or do not fit.
    """
    lengths = part_lengths(row, rows, dims)
    unknown = getattr(row.fuse, "groups", "")
    if lengths is None or (unknown and unknown not in dims):
        sizes = [dims.get(name, "?") for name in row.rows]
        raise TensorError(
            f"{name} has {rows} rows; how they lie in Hugging Face's layers is not known "
            f"({', '.join(row.rows)}: {sizes}"
            + (f"; {unknown} {dims.get(unknown, '?')})" if unknown else ")"),
            "the sizes of the base model, with its number of heads",
            "give the folder of the base model as --cfg.hf_config.hf_dir: no more than its "
            "config.json is needed",
        )
    return row.fuse.maps(lengths, dims)

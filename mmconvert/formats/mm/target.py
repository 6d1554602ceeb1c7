"""An MM checkpoint that is to be written, as a side of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

from mmconvert.converters.configs import Dims
from mmconvert.converters.rows import Module
from mmconvert.errors import LayoutError, TensorError, UnknownSizeError
from mmconvert.formats.mm.instances import Instance, placements
from mmconvert.names import NO_LAYER
from mmconvert.plan.plan import Block, Key, Side, Whole, matrix
from mmconvert.sharding.layout import Layout
from mmconvert.sharding.spans import Span, Split
from mmconvert.stored import Target

LARGEST_TP = 128  # the largest size that advice names


def mm_target(
    modules: Sequence[Module], dims: Dims, layout: Layout, wholes: Mapping[Key, Whole]
) -> Side:
    """An MM checkpoint to be written, of wholes whose shapes and dtypes are known.

    Raises:
        LayoutError: a tensor that cannot be divided as the layout wants.
    """
    side = Side()
    for item, stage, name, eps in placements(modules, layout, dims):
        source = wholes.get(item.key)
        if source is None:
            raise TensorError(
                f"{item.key.name()} is missing in the source",
                "every tensor that the target holds",
            )
        whole = side.wholes.setdefault(item.key, Whole(source.shape, source.dtype))
        size = layout.tp[item.module.key]
        for ep, tp in product(eps, range(layout.tp_folders)):
            rank = tp % size
            try:
                spans = shard_spans(item, source.shape, size, rank, dims)
            except LayoutError as error:
                raise _with_sizes_that_do(error, item, wholes, dims) from None
            shape = _shard_shape(item.row.shard, source.shape, spans)
            if rank == 0 or item.row.shard is None:
                whole.copies.append([])
            whole.copies[-1] += shard_blocks(len(side.targets), item.row.shard, source.shape, spans)
            side.targets.append(Target(name, source.dtype, shape, layout.chunk(tp, stage, ep)))
    return side


def _with_sizes_that_do(
    error: LayoutError, bad: Instance, wholes: Mapping[Key, Whole], dims: Dims
) -> LayoutError:
    """The error, naming the tp sizes that every tensor of the module allows."""
    if isinstance(error, UnknownSizeError):  # no size can be advised without that number
        return error
    shapes = {key.mm: whole.shape for key, whole in wholes.items()}
    rows = [r for r in bad.module.all_rows() if r.mm in shapes]
    found = [(Instance(bad.module, r, NO_LAYER), shapes[r.mm]) for r in rows]

    def does(size: int) -> bool:
        try:
            for item, shape in found:
                shard_spans(item, shape, size, size - 1, dims)
        except LayoutError:
            return False
        return True

    sizes = [size for size in range(1, LARGEST_TP + 1) if does(size)]
    flag = bad.module.tp_flag
    whole = f"the whole {bad.module.label} allows {flag} among {sizes}"
    return LayoutError(error.what, f"{error.expected}; {whole}", error.fix)


def shard_spans(
    item: Instance, shape: tuple[int, ...], size: int, rank: int, dims: Dims
) -> list[Span]:
    """What tp rank ``rank`` holds of a whole of this shape, along the axis that is divided.

    Raises:
        LayoutError: the whole cannot be divided so; names the flag and the tensor.
    """
    split = item.row.shard
    length = matrix(shape)[split.axis if split else 0]
    if split is None:
        return [Span(0, 0, length)]
    try:
        return split.spans(length, size, rank, dims)
    except LayoutError as error:
        flag = item.module.tp_flag
        raise type(error)(
            f"{flag} {size}: {item.key.name()}: {error.what}", error.expected, error.fix
        ) from None


def _shard_shape(
    split: Split | None, shape: tuple[int, ...], spans: Sequence[Span]
) -> tuple[int, ...]:
    if split is None:
        return shape
    length = sum(s.length for s in spans)
    return (length, *shape[1:]) if split.axis == 0 else (shape[0], length)


def shard_blocks(
    tensor: int, split: Split | None, shape: tuple[int, ...], spans: Sequence[Span]
) -> list[Block]:
    """The rectangles of the whole that a shard with these spans is."""
    rows, cols = matrix(shape)
    if split is not None and split.axis == 1:
        return [Block(tensor, 0, s.start, 0, s.whole, rows, s.length) for s in spans]
    return [Block(tensor, s.start, 0, s.whole, 0, s.length, cols) for s in spans]

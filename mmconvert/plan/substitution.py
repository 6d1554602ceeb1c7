"""Whole tensors and rows of an adapter that stand in the place of the base model's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from mmconvert.errors import TensorError
from mmconvert.names import NO_EXPERT
from mmconvert.plan.plan import Block, Key, Side, Whole, Zeros, matrix
from mmconvert.plan.products import (
    Adapter,
    ProductPlace,
    ProductPlaces,
    TrainedTokens,
    check_tied,
    no_place,
)
from mmconvert.sharding.spans import Span
from mmconvert.stored import StoredTensor


def substituted(
    src: Side, places: ProductPlaces, adapters: Iterable[Adapter]
) -> tuple[Side, list[Zeros], set[int]]:
    """A side in which an adapter's whole tensors stand in the place of the base model's.

    Returns:
        the side; the rectangles of the base model's tensors that count no more; the tensors that
        take the dtype of what they replace.
    """
    side = replace(src, stored=list(src.stored), wholes=dict(src.wholes))
    gone: list[Zeros] = []
    new: set[int] = set()
    for adapter in adapters:
        for name, tensor in adapter.replaced.items():
            check_tied(adapter.where, name, places)
            place = places.find(name, NO_EXPERT)
            if place is None:
                raise no_place(adapter.where, tensor.name)
            whole = side.wholes[place.key]
            rows = sum(span.length for span in place.spans)
            if tensor.shape[:1] != (rows,) or tensor.shape[1:] != whole.shape[1:]:
                raise TensorError(
                    f"{adapter.where}: {tensor.name} is {list(tensor.shape)}; the base model's is "
                    f"{[rows, *whole.shape[1:]]}",
                    "a tensor of the base model's size",
                    "give the base model that the adapter was trained on",
                )
            new.add(len(side.stored))
            gone += _put(side, tensor, place.key, place.spans)
        for name, tokens in adapter.tokens.items():
            place = places.find(name, NO_EXPERT)
            if place is None:
                raise no_place(adapter.where, tokens.rows.name)
            spans = _token_spans(adapter.where, tokens, place, side.wholes[place.key])
            new.add(len(side.stored))
            gone += _put(side, tokens.rows, place.key, spans)
    return side, gone, new


def _put(side: Side, tensor: StoredTensor, key: Key, spans: Sequence[Span]) -> list[Zeros]:
    """Puts a tensor's rows in the place of others of a whole; what counts no more."""
    whole, number = side.wholes[key], len(side.stored)
    kept, lost = _without(whole, spans)
    width = matrix(whole.shape)[1]
    kept += [Block(number, s.start, 0, s.whole, 0, s.length, width) for s in spans]
    side.wholes[key] = replace(whole, copies=[kept])
    side.stored.append(tensor)
    return [Zeros(key, b.tensor, b.row, b.col, b.rows, b.cols) for b in lost]


def _token_spans(
    where: str, tokens: TrainedTokens, place: ProductPlace, whole: Whole
) -> list[Span]:
    """Each trained row beside the row of the whole that it replaces.

    Raises:
        TensorError: not a row for each number, or numbers that the embedding does not have.
    """
    rows, width = matrix(whole.shape)
    size = (len(tokens.numbers), width)
    beyond = [number for number in tokens.numbers if not 0 <= number < rows]
    if tokens.rows.shape != size or beyond or len(place.spans) != 1:
        raise TensorError(
            f"{where}: {tokens.rows.name} is {list(tokens.rows.shape)}, for the tokens "
            f"{list(tokens.numbers[:5])}; the base model's embedding is {[rows, width]}",
            f"a row for each token of trainable_token_indices: {list(size)}",
            "give the base model that the adapter was trained on",
        )
    return [Span(i, number, 1) for i, number in enumerate(tokens.numbers)]


def _without(whole: Whole, spans: Sequence[Span]) -> tuple[list[Block], list[Block]]:
    """The blocks of a whole outside some of its rows; those inside, and of all other copies."""
    kept: list[Block] = []
    lost = [block for blocks in whole.copies[1:] for block in blocks]
    taken = sorted((s.whole, s.whole + s.length) for s in spans)
    for b in whole.copies[0]:
        row, end = b.whole_row, b.whole_row + b.rows
        for first, last in [*taken, (end, end)]:
            upto = min(max(first, row), end)
            kept += [_rows(b, row, upto)] if row < upto else []
            below = min(max(last, upto), end)
            lost += [_rows(b, upto, below)] if upto < below else []
            row = below
    return kept, lost


def _rows(block: Block, first: int, last: int) -> Block:
    """Some rows of a block, as the whole counts them."""
    row = block.row + first - block.whole_row
    return block._replace(row=row, whole_row=first, rows=last - first)

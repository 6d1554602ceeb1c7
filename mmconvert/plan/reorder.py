"""Wholes in the row order of another table: reading vision q, k and v left uninterleaved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mmconvert.converters.configs import Dims
from mmconvert.converters.rows import Module
from mmconvert.errors import LayoutError
from mmconvert.plan.plan import Block, Key, Side, Whole, matrix
from mmconvert.sharding.spans import Span


def reorder(src: Side, modules: Sequence[Module], expected: Sequence[Module], dims: Dims) -> Side:
    """The same side with wholes in the row order of another table (``--vit-qkv``).

    Only rows with one source can differ so. Rows of both tables are those of that source,
    rearranged: each block is followed back to the source and on to the expected order.

    Raises:
        LayoutError: the number of heads is not known.
    """
    want = {r.mm: r.fuse for m in expected for r in m.all_rows()}
    changed = {r.mm: r for m in modules for r in m.all_rows() if want.get(r.mm, r.fuse) != r.fuse}
    wholes: dict[Key, Whole] = {}
    for key, whole in src.wholes.items():
        wholes[key] = whole
        if key.mm not in changed:
            continue
        rows = matrix(whole.shape)[0]
        try:
            (old,) = changed[key.mm].fuse.maps([rows], dims)
            (new,) = want[key.mm].maps([rows], dims)
        except KeyError as error:
            raise LayoutError(
                f"{key.name()} cannot be reordered: the number {error} is not known",
                "the number of heads",
                "give --cfg.hf_config.hf_dir, the folder of the original model",
            ) from None
        copies = [_moved(blocks, old, new) for blocks in whole.copies]
        wholes[key] = Whole(whole.shape, whole.dtype, copies)
    return replace(src, wholes=wholes)


def _moved(blocks: Sequence[Block], old: Sequence[Span], new: Sequence[Span]) -> list[Block]:
    moved: list[Block] = []
    for b in blocks:
        for o in old:
            for n in new:
                # Rows that lie in this block, in this old span and in this new span.
                first = max(b.whole_row, o.whole, o.whole + n.start - o.start)
                last = min(
                    b.whole_row + b.rows,
                    o.whole + o.length,
                    o.whole + n.start + n.length - o.start,
                )
                if first < last:
                    row = n.whole + (o.start + first - o.whole) - n.start
                    moved.append(
                        b._replace(
                            row=b.row + first - b.whole_row, whole_row=row, rows=last - first
                        )
                    )
    return moved

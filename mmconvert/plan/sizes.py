"""Whether the whole tensors of a model agree about its sizes.

Slices that are put together by the strategy files of another layout often fit each other: only
the wholes are too large. A table names the dimension behind each size, so two tensors that give
one dimension two sizes cannot be of one model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mmconvert.converters.configs import Dims
from mmconvert.converters.rows import Module, Row, mm_index
from mmconvert.errors import TensorError
from mmconvert.plan.plan import Key, Whole, matrix
from mmconvert.sharding.spans import Part


def check_agreement(
    wholes: Mapping[Key, Whole], table: Sequence[Module], dims: Dims, path: Path
) -> None:
    """Compares the sizes of tensors that a table knows; others are left alone.

    Args:
        wholes: as MM stores them.
        dims: sizes that are known for certain.
        path: of the checkpoint, for messages.

    Raises:
        TensorError: two sizes for one dimension.
    """
    index = mm_index(tuple(table))
    known = {dim: (size, "config.json") for dim, size in dims.items()}
    for key, whole in wholes.items():
        hit = index.find(key.name())
        if hit is None:
            continue
        for dim, size in _sizes(hit[0][1], whole.shape):
            first, where = known.setdefault(dim, (size, key.name()))
            if first != size:
                raise TensorError(
                    f"{path}: {key.name()} {list(whole.shape)}, as a whole, means that {dim} is "
                    f"{size}; by {where} it is {first}",
                    "the whole checkpoint of one model, with its own strategy files",
                    "give the strategy files of this very checkpoint, and the folder above "
                    "rank_0, not the file of one rank",
                )


def _sizes(row: Row, shape: Sequence[int]) -> list[tuple[str, int]]:
    """The dimensions that a whole shows, with their sizes; the rows of fused ones are not told
    apart.
    """
    rows, cols = matrix(shape)
    found = [(row.cols, cols)] if row.cols else []
    if len(row.rows) == 1 and row.rows[0]:
        of = row.fuse.of if isinstance(row.fuse, Part) else 1
        found.append((row.rows[0], rows * of))
    return found

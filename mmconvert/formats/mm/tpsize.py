"""The tensor-parallel size of a module of an MM checkpoint, by the shapes of its shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice

from mmconvert.converters.configs import MAX_SIZE, Dims
from mmconvert.converters.rows import Module, Row
from mmconvert.errors import CheckpointError
from mmconvert.formats.mm.folder import MMCheckpoint
from mmconvert.names import fill
from mmconvert.plan.plan import matrix
from mmconvert.sharding.layout import Chunk, Rank
from mmconvert.stored import StoredTensor

# Whether two stored tensors hold the same bytes; None if a tensor is one repeated byte, so that
# equality says nothing.
SameBytes = Callable[[StoredTensor, StoredTensor], bool | None]


def tp_size(module: Module, checkpoint: MMCheckpoint, dims: Dims, same: SameBytes) -> int:
    """The tensor-parallel size of one module.

    Raises:
        CheckpointError: shapes that no size explains.
    """
    folders = checkpoint.tp_folders
    if folders == 1:
        return 1
    rows = sorted(first_layer(module, checkpoint), key=lambda item: item[0].shard is None)
    divided = [(row, shards) for row, shards in rows if row.shard]
    sizes = [d for d in range(1, folders + 1) if folders % d == 0]
    fitting = [size for size in sizes if explains(rows, size, dims)]
    if not fitting:
        _, shards = divided[0] if divided else rows[0]
        raise CheckpointError(
            f"{module.label}: no tp size from {sizes} explains the shapes; {shards[0].name} is "
            f"{[list(t.shape) for t in shards][:4]} on the first ranks",
            "a checkpoint and a config.json of one model",
            "give the hf_dir of the model that this checkpoint was made from",
            cause="wrong-shape",
            path=checkpoint.folder,
        )
    if len(fitting) == 1 or not divided:
        return fitting[0]
    # Shapes alone fit several sizes: ranks that hold the same shard hold the same bytes.
    for _, shards in sorted(divided, key=lambda item: -item[1][0].nbytes):
        if same(shards[0], shards[0]) is None:
            continue
        for size in fitting:
            if all(same(shards[r % size], t) is not False for r, t in enumerate(shards)):
                return size
    return folders


def likely_tp_size(module: Module, checkpoint: MMCheckpoint, dims: Dims) -> int:
    """The size that explains most tensors, each by itself, where :func:`tp_size` finds none."""
    folders = checkpoint.tp_folders
    rows = first_layer(module, checkpoint)
    sizes = [d for d in range(1, folders + 1) if folders % d == 0]
    return max(sizes, key=lambda size: (sum(explains([r], size, dims) for r in rows), size))


def whole_tp_size(module: Module, checkpoint: MMCheckpoint, dims: Dims) -> int:
    """How many shards like those of tp rank 0 make the tensors that ``dims`` asks for.

    1 if the tensors do not agree on a number. Larger than the number of rank folders where
    folders are missing.
    """
    counts: set[float] = set()
    for row, shards in first_layer(module, checkpoint):
        names = (row.cols,) if row.shard and row.shard.axis else row.rows
        if row.shard and names and all(name in dims for name in names):
            length = matrix(shards[0].shape)[row.shard.axis]
            counts.add(sum(dims[name] for name in names) / length if length else 0)
    count = counts.pop() if len(counts) == 1 else 1.0
    return int(count) if count.is_integer() and count > 0 else 1


def first_layer(module: Module, checkpoint: MMCheckpoint) -> list[tuple[Row, list[StoredTensor]]]:
    """Rows of the module's outer parts and of one layer, with their shards by tp rank."""
    found: dict[str, tuple[Row, list[StoredTensor]]] = {}
    for chunk, tensors in checkpoint.parts.items():
        if chunk.rank.tp or chunk.rank.ep:
            continue
        for r in module.all_rows():
            if r.mm in found or r.tied_to:
                continue
            for name in _first_names(r, tensors):
                places = [
                    Chunk(Rank(tp, chunk.rank.pp), chunk.virtual)
                    for tp in range(checkpoint.tp_folders)
                ]
                shards = [checkpoint.parts[p][name] for p in places if name in checkpoint.parts[p]]
                if len(shards) == checkpoint.tp_folders:
                    found[r.mm] = (r, shards)
    return list(found.values())


def _first_names(row: Row, tensors: Mapping[str, StoredTensor]) -> list[str]:
    """The name of a row's tensor in the first layer of a chunk that has it, if one has."""
    if not row.only:
        name = fill(row.mm, 0, 0)
        return [name] if name in tensors else []
    names = (fill(row.mm, layer, 0) for layer in range(MAX_SIZE["layers"]))
    return list(islice((name for name in names if name in tensors), 1))


def explains(rows: Sequence[tuple[Row, list[StoredTensor]]], size: int, dims: Dims) -> bool:
    """Whether a tp size gives every dimension one value throughout a module."""
    known = dict(dims)
    for row, shards in rows:
        group = shards[:size]
        if any(t.shape != group[i % size].shape for i, t in enumerate(shards)):
            return False
        height, width = matrix(group[0].shape)
        if row.shard:
            length = sum(matrix(t.shape)[row.shard.axis] for t in group)
            height, width = (length, width) if row.shard.axis == 0 else (height, length)
        expected = [(row.cols, width)] if row.cols else []
        names = set(row.rows)
        if len(names) == 1 and height % len(row.rows) == 0:
            expected.append((row.rows[0], height // len(row.rows)))
        elif names and names <= known.keys() and sum(known[n] for n in row.rows) != height:
            return False
        for dim, value in expected:
            if known.setdefault(dim, value) != value:
                return False
    return True

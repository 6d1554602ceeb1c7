"""An existing MM checkpoint as a side of a plan."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from mmconvert.converters.configs import Dims
from mmconvert.converters.rows import Module, mm_index
from mmconvert.errors import LayoutError, ReplicaError, TensorError, blamed
from mmconvert.formats.faults import STRICT, Faults
from mmconvert.formats.mm.instances import Instance, placements
from mmconvert.formats.mm.target import shard_blocks, shard_spans
from mmconvert.names import number, summarise
from mmconvert.plan.dtypes import joint_dtype
from mmconvert.plan.plan import Side, Whole, exchanged, matrix
from mmconvert.sharding.layout import Chunk, Layout, Rank
from mmconvert.sharding.spans import Span
from mmconvert.stored import StoredTensor, transpose

TRANSPOSED = "experts-transposed"
ChunkTensors = Mapping[Chunk, Mapping[str, StoredTensor]]


def mm_source(
    modules: Sequence[Module],
    dims: Dims,
    layout: Layout,
    parts: ChunkTensors,
    *,
    transposed: bool = False,
    faults: Faults = STRICT,
    complete: bool = True,
) -> Side:
    """An existing MM checkpoint as wholes.

    Args:
        dims: sizes if known; what is known is checked. The number of experts must be.
        parts: tensors by name, by chunk; every one must be the place of some row.
        transposed: whether the wholes of rows that say so have the orientation of Hugging Face,
            which is to be written: their tensors are seen transposed.
        faults: where those go after which reading goes on.
        complete: whether tensors that are missing are a fault; else they are passed over.

    Raises:
        TensorError: missing tensors, or shards that do not fit together.
    """
    side = Side()
    missing: list[str] = []
    for item, name, shards, absent in _places(modules, dims, layout, parts):
        if not absent:
            size = layout.tp[item.module.key]
            faults.attempt(lambda i=item, n=size, s=shards: _add_shards(side, i, n, s, dims), None)
        elif not complete:
            continue
        elif not item.row.tied_to:
            missing += [f"{name} ({layout.folder(rank)})" for rank in absent]
        elif shards:
            missing.append(f"{name} (on {len(shards)} of {layout.tp_folders} tp ranks only)")
    if missing:
        raise TensorError(
            f"{number(missing, 'tensor')} missing: {summarise(missing)}",
            "every tensor of the model on its rank",
            "copy the checkpoint again, with all its rank folders",
            cause="missing-tensor",
        )
    return as_stored_in_hf(side, modules) if transposed else side


def _places(
    modules: Sequence[Module], dims: Dims, layout: Layout, parts: ChunkTensors
) -> Iterator[tuple[Instance, str, list[StoredTensor], list[Rank]]]:
    """Every place of every tensor: its shards by tp rank, and the ranks that lack theirs."""
    for item, stage, name, eps in placements(modules, layout, dims, every_tied=True):
        for ep in eps:
            shards: list[StoredTensor] = []
            absent: list[Rank] = []
            for tp in range(layout.tp_folders):
                chunk = layout.chunk(tp, stage, ep)
                tensor = parts.get(chunk, {}).get(name)
                if tensor is None:
                    absent.append(chunk.rank)
                else:
                    shards.append(tensor)
            yield item, name, shards, absent


def as_stored_in_hf(side: Side, modules: Sequence[Module]) -> Side:
    """The side with the wholes of transposed rows in the orientation of Hugging Face."""
    return transposed_wholes(side, {r.mm for m in modules for r in m.all_rows() if r.transposed})


def transposed_wholes(side: Side, rows: Collection[str]) -> Side:
    """The side with the wholes of these rows transposed."""
    for key, whole in side.wholes.items():
        if key.mm not in rows:
            continue
        whole.shape = whole.shape[::-1]
        whole.copies = [[exchanged(block) for block in blocks] for blocks in whole.copies]
        for tensor in {block.tensor for blocks in whole.copies for block in blocks}:
            side.stored[tensor] = transpose(side.stored[tensor])
    return side


def _add_shards(
    side: Side, item: Instance, size: int, shards: Sequence[StoredTensor], dims: Dims
) -> None:
    """Adds the whole that the shards of one tensor make, in the order of their tp ranks."""
    first = shards[0]
    with blamed("wrong-shape", first.path, first.name, "copy the rank folders of this stage again"):
        _add_whole(side, item, size, shards, dims)


def _add_whole(
    side: Side, item: Instance, size: int, shards: Sequence[StoredTensor], dims: Dims
) -> None:
    split = item.row.shard
    axis = split.axis if split else 0
    group = shards[:size]
    for rank, tensor in enumerate(shards):
        together = joint_dtype((shards[0].dtype, tensor.dtype))
        like = group[rank % size] if split and together else shards[0]
        if tensor.shape != like.shape or not together:
            raise ReplicaError(
                f"{tensor.name}: {tensor.dtype} {list(tensor.shape)} in {tensor.path}, "
                f"{like.dtype} {list(like.shape)} in {like.path}",
                "one kind of numbers, and equal shapes on ranks that hold the same shard",
            )
    if split is None:
        shape, spans = group[0].shape, [[Span(0, 0, matrix(group[0].shape)[0])]] * size
    else:
        lengths = [matrix(t.shape)[axis] for t in group]
        try:
            spans = split.observed(lengths)
        except TensorError as error:
            raise TensorError(f"{group[0].name} in {group[0].path}: {error.what}") from None
        shape = tuple(sum(lengths) if i == axis else n for i, n in enumerate(group[0].shape))
        _check_division(item, shape, size, spans, dims, group[0])
    _check_whole(item, shape, dims, group[0])
    kept = item.row.keeps_dtype
    whole = side.wholes.setdefault(item.key, Whole(shape, group[0].dtype, keeps_dtype=kept))
    dtype = joint_dtype((whole.dtype, *(tensor.dtype for tensor in shards)))
    if whole.shape != shape or not dtype:
        raise ReplicaError(
            f"{group[0].name} in {group[0].path} is {group[0].dtype} {list(shape)}; the tensor "
            f"that it {'is tied to' if item.row.tied_to else 'repeats'} is {whole.dtype} "
            f"{list(whole.shape)}",
            "equal tensors",
        )
    if dtype != whole.dtype:
        odd = next(tensor for tensor in shards if tensor.dtype not in whole.dtype.split("+"))
        like = next((f"in {t.path} {t.dtype}" for t in shards if t.dtype != odd.dtype), "")
        whole.dtype = dtype
        whole.mixed = f"{odd.name} in {odd.path} is {odd.dtype}, {like or 'its original is not'}"
    for rank, tensor in enumerate(shards):
        if split is None or rank % size == 0:
            whole.copies.append([])
        whole.copies[-1] += shard_blocks(len(side.stored), split, shape, spans[rank % size])
        side.stored.append(tensor)


def _check_division(
    item: Instance,
    shape: tuple[int, ...],
    size: int,
    observed: list[list[Span]],
    dims: Dims,
    tensor: StoredTensor,
) -> None:
    """The shards' sizes must be those that the rule gives, where the rule's numbers are known."""
    split = item.row.shard
    if split is None or (split.uneven and split.unit not in dims):
        return
    try:
        expected = [shard_spans(item, shape, size, rank, dims) for rank in range(size)]
    except LayoutError as error:
        raise TensorError(f"{tensor.path}: {error.what}", error.expected) from None
    if expected != observed:
        raise TensorError(
            f"{tensor.name} in {tensor.path.parent.parent}: the shards hold "
            f"{[sum(s.length for s in spans) for spans in observed]}",
            f"{[sum(s.length for s in spans) for spans in expected]}",
        )


def _check_whole(item: Instance, shape: tuple[int, ...], dims: Dims, tensor: StoredTensor) -> None:
    rows, cols = matrix(shape)
    want_rows = [dims.get(dim, -1) for dim in item.row.rows]
    want_cols = dims.get(item.row.cols, -1)
    if item.row.of_stack and (rows, cols) == (want_cols, sum(want_rows)) != (cols, rows):
        raise transposed_experts(tensor)
    bad_rows = want_rows and -1 not in want_rows and sum(want_rows) != rows
    if bad_rows or (want_cols not in (-1, cols)):
        raise TensorError(
            f"{tensor.name} in {tensor.path} is a shard of {list(shape)}; config.json asks for "
            f"{[sum(want_rows) if bad_rows else rows, want_cols if want_cols != -1 else cols]}",
            "a checkpoint and a config.json of one model",
            "give the hf_dir of the model that this checkpoint was made from",
        )


def transposed_experts(tensor: StoredTensor) -> TensorError:
    """The fault of an expert of a stack that stands the other way round."""
    return TensorError(
        f"{tensor.name} in {tensor.path} is {list(tensor.shape)}: transposed, as the reference's "
        "converter writes experts that transformers 5 stacked",
        "the outputs of each expert's matrices in rows, as Megatron has them",
        "resplit with --experts transposed writes them so; mm_to_hf takes the flag too",
        cause=TRANSPOSED,
        path=tensor.path,
        tensors=(tensor.name,),
    )


def claim_mm(
    modules: Sequence[Module], dims: Dims, layout: Layout, parts: ChunkTensors
) -> list[str]:
    """MM names that no row claims, or that stand where they should not; ``name (folder)``."""
    index = mm_index(tuple(modules))
    expected: dict[int, set[str]] = {}  # each ep rank has the same names
    for _, stage, name, _ in placements(modules, layout, dims, every_tied=True):
        expected.setdefault(stage, set()).add(name)
    lost: list[str] = []
    for chunk, tensors in parts.items():
        stage = chunk.virtual * layout.pp_size + chunk.rank.pp
        for name in tensors:
            if name in expected.get(stage, ()):
                continue
            closest = "" if index.find(name) else index.closest(name)
            hint = f", closest known name {closest}" if closest else ""
            lost.append(f"{name} ({layout.folder(chunk.rank)}{hint})")
    return lost

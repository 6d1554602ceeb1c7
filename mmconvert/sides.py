"""The sides of a plan, made from a family's table: an HF folder, an MM checkpoint, or an MM
checkpoint that is yet to be written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from mmconvert.converters.family import Dims, Module, Row, mm_index
from mmconvert.errors import LayoutError, ReplicaError, TensorError
from mmconvert.formats.stored import StoredTensor
from mmconvert.names import NO_LAYER, summarise
from mmconvert.plan import Block, Key, Side, Target, Whole, matrix
from mmconvert.sharding.layout import TP_FLAG, Chunk, Layout
from mmconvert.sharding.spans import Span, Split
from mmconvert.sharding.stages import first_stage, last_stage, locate, total


class Instance(NamedTuple):
    """A row for one layer (NO_LAYER before and after the layers)."""

    module: Module
    row: Row
    layer: int

    @property
    def key(self) -> Key:
        """The whole that this row makes, or repeats."""
        return Key(self.row.tied_to or self.row.mm, self.layer)


def instances(modules: Sequence[Module], layers: Mapping[str, int]) -> Iterator[Instance]:
    """Every row of a table for every layer; ``layers`` counts them by module key."""
    for module in modules:
        for r in module.before:
            yield Instance(module, r, NO_LAYER)
        for layer in range(layers[module.key]):
            for r in module.layer:
                yield Instance(module, r, layer)
        for r in module.after:
            yield Instance(module, r, NO_LAYER)


# ------------------------------------------------------------------------------------------ HF


def hf_side(modules: Sequence[Module], dims: Dims, tensors: Mapping[str, StoredTensor]) -> Side:
    """An HF checkpoint as wholes.

    Args:
        tensors: by name in hub spelling; each must be the source of some row.

    Raises:
        TensorError: missing tensors, or shapes that are not those of config.json.
    """
    side = Side([])
    number: dict[str, int] = {}
    missing: list[str] = []
    layers = {m.key: dims[f"{m.key}.layers"] for m in modules}
    for item in instances(modules, layers):
        names = [name.replace("{}", str(item.layer)) for name in item.row.hf]
        absent = [name for name in names if name not in tensors]
        if absent:
            missing += [] if item.row.tied_to else absent
            continue
        found = [tensors[name] for name in names]
        for name, tensor in zip(names, found, strict=True):
            number.setdefault(name, len(number))
            if number[name] == len(side.tensors):
                side.tensors.append(tensor)  # pyright: ignore[reportArgumentType] - a stored side
        whole = _fused(item.row, found, [number[n] for n in names], dims)
        known = side.wholes.setdefault(item.key, whole)
        if known is not whole:  # a tied head that the checkpoint stores beside the embedding
            if (known.shape, known.dtype) != (whole.shape, whole.dtype):
                raise TensorError(
                    f"{names[0]} is {whole.dtype} {list(whole.shape)}, the embedding that it is "
                    f"tied to {known.dtype} {list(known.shape)}",
                    "equal tensors, as config.json says tie_word_embeddings",
                )
            known.copies += whole.copies
    if missing:
        raise TensorError(
            f"{len(missing)} tensors are missing: {summarise(missing)}",
            "every tensor of the model, in the names of the hub or of transformers",
            "download the weight files again; if config.json is of another model, replace it",
        )
    return side


def _fused(item: Row, found: Sequence[StoredTensor], numbers: Sequence[int], dims: Dims) -> Whole:
    lengths: list[int] = []
    for i, tensor in enumerate(found):
        rows, cols = matrix(tensor.shape)
        _check_size(tensor, "rows", rows, item.rows[i] if item.rows else "", dims)
        _check_size(tensor, "columns", cols, item.cols, dims)
        lengths.append(rows)
        if tensor.shape[1:] != found[0].shape[1:] or tensor.dtype != found[0].dtype:
            raise TensorError(
                f"{tensor.name} is {tensor.dtype} {list(tensor.shape)} and {found[0].name} "
                f"{found[0].dtype} {list(found[0].shape)}",
                f"one dtype and one width, as {item.mm} is made of both",
            )
    try:
        maps = item.fuse.maps(lengths, dims)
    except TensorError as error:
        raise TensorError(
            f"{found[0].name}: {error.what}", "sizes as config.json gives them"
        ) from None
    blocks = [
        Block(number, span.start, 0, span.whole, 0, span.length, matrix(tensor.shape)[1])
        for number, tensor, spans in zip(numbers, found, maps, strict=True)
        for span in spans
    ]
    shape = (sum(lengths), *found[0].shape[1:]) if found[0].shape else ()
    return Whole(shape, found[0].dtype, [blocks])


def _check_size(tensor: StoredTensor, what: str, size: int, dim: str, dims: Dims) -> None:
    if dim in dims and dims[dim] != size:
        raise TensorError(
            f"{tensor.name} {list(tensor.shape)} has {size} {what}; config.json makes it "
            f"{dims[dim]} ({dim})",
            "weights and config.json of one model",
            "replace config.json or the weights by those that belong together",
        )


def hf_target(model: Side, wholes: Mapping[Key, Whole]) -> Side:
    """An HF checkpoint to be written: the tensors of ``model``, in the dtypes of ``wholes``."""
    dtypes: dict[int, str] = {}
    side = Side([])
    for key, whole in model.wholes.items():
        dtype = wholes[key].dtype if key in wholes else whole.dtype
        side.wholes[key] = Whole(whole.shape, dtype, whole.copies)
        for blocks in whole.copies:
            dtypes.update({block.tensor: dtype for block in blocks})
    side.tensors = [Target(t.name, dtypes[i], t.shape) for i, t in enumerate(model.tensors)]
    return side


# ------------------------------------------------------------------------------------------ MM


def placements(
    modules: Sequence[Module], layout: Layout, *, every_tied: bool = False
) -> Iterator[tuple[Instance, int, str]]:
    """Every tensor of an MM checkpoint: instance, stage, name there.

    What stands before the layers is on the first stage with a layer of its module, what stands
    after them on the last. A tied row stands only on another stage than the tensor that it
    repeats; ``every_tied`` yields it in any case, since other tools leave it there too.
    """
    layers = {key: total(grid) for key, grid in layout.grids.items()}
    found = {m.key: locate(layout.grids[m.key]) for m in modules}
    origin: dict[str, int] = {}
    for item in instances(modules, layers):
        grid = layout.grids[item.module.key]
        if item.layer != NO_LAYER:
            stage, local = found[item.module.key][item.layer]
        elif item.row in item.module.before:
            stage, local = first_stage(grid), NO_LAYER
        else:
            stage, local = last_stage(grid), NO_LAYER
        if item.row.tied_to and origin[item.row.tied_to] == stage and not every_tied:
            continue
        origin.setdefault(item.row.mm, stage)
        yield item, stage, item.row.mm.replace("{}", str(local))


def mm_target(
    modules: Sequence[Module], dims: Dims, layout: Layout, wholes: Mapping[Key, Whole]
) -> Side:
    """An MM checkpoint to be written, of wholes whose shapes and dtypes are known.

    Raises:
        LayoutError: a tensor that cannot be divided as the layout wants.
    """
    targets: list[Target] = []
    side = Side(targets)
    for item, stage, name in placements(modules, layout):
        source = wholes.get(item.key)
        if source is None:
            raise TensorError(f"{item.key.name()} is missing in the source")
        whole = side.wholes.setdefault(item.key, Whole(source.shape, source.dtype))
        size = layout.tp[item.module.key]
        for tp in range(layout.tp_folders):
            rank = tp % size
            spans = _spans(item, source.shape, size, rank, dims)
            shape = _shard_shape(item.row.shard, source.shape, spans)
            if rank == 0 or item.row.shard is None:
                whole.copies.append([])
            whole.copies[-1] += _blocks(len(targets), item.row.shard, source.shape, spans)
            targets.append(Target(name, source.dtype, shape, layout.chunk(tp, stage)))
    return side


def _spans(item: Instance, shape: tuple[int, ...], size: int, rank: int, dims: Dims) -> list[Span]:
    split = item.row.shard
    length = matrix(shape)[split.axis if split else 0]
    if split is None:
        return [Span(0, 0, length)]
    try:
        return split.spans(length, size, rank, dims)
    except LayoutError as error:
        flag = TP_FLAG[item.module.key]
        raise LayoutError(
            f"{flag} {size}: {item.key.name()}: {error.what}", error.wanted, error.fix
        ) from None


def _shard_shape(
    split: Split | None, shape: tuple[int, ...], spans: Sequence[Span]
) -> tuple[int, ...]:
    if split is None:
        return shape
    length = sum(s.length for s in spans)
    return (length, *shape[1:]) if split.axis == 0 else (shape[0], length)


def _blocks(
    tensor: int, split: Split | None, shape: tuple[int, ...], spans: Sequence[Span]
) -> list[Block]:
    rows, cols = matrix(shape)
    if split is not None and split.axis == 1:
        return [Block(tensor, 0, s.start, 0, s.whole, rows, s.length) for s in spans]
    return [Block(tensor, s.start, 0, s.whole, 0, s.length, cols) for s in spans]


Parts = Mapping[Chunk, Mapping[str, StoredTensor]]


def mm_source(modules: Sequence[Module], dims: Dims, layout: Layout, parts: Parts) -> Side:
    """An existing MM checkpoint as wholes.

    Args:
        dims: sizes if known; what is known is checked.
        parts: tensors by name, by chunk; every one must be the place of some row.

    Raises:
        TensorError: missing tensors, or shards that do not fit together.
    """
    tensors: list[StoredTensor] = []
    side = Side(tensors)
    missing: list[str] = []
    for item, stage, name in placements(modules, layout, every_tied=True):
        shards: list[StoredTensor] = []
        for tp in range(layout.tp_folders):
            chunk = layout.chunk(tp, stage)
            tensor = parts.get(chunk, {}).get(name)
            if tensor is not None:
                shards.append(tensor)
            elif not item.row.tied_to:
                missing.append(f"{name} ({layout.folder(chunk.rank)})")
        if len(shards) == layout.tp_folders:
            _add_shards(side, item, layout.tp[item.module.key], shards, dims)
        elif shards:
            missing.append(f"{name} (on {len(shards)} of {layout.tp_folders} tp ranks only)")
    if missing:
        raise TensorError(
            f"{len(missing)} tensors are missing: {summarise(missing)}",
            "every tensor of the model on its rank",
            "copy the checkpoint again, with all its rank folders",
        )
    return side


def _add_shards(
    side: Side, item: Instance, size: int, shards: Sequence[StoredTensor], dims: Dims
) -> None:
    split = item.row.shard
    axis = split.axis if split else 0
    group = shards[:size]
    for rank, tensor in enumerate(shards):
        like = group[rank % size] if split else shards[0]
        if tensor.shape != like.shape or tensor.dtype != shards[0].dtype:
            raise ReplicaError(
                f"{tensor.name}: {tensor.dtype} {list(tensor.shape)} in {tensor.path}, "
                f"{like.dtype} {list(like.shape)} in {like.path}",
                "one dtype, and equal shapes on ranks that hold the same shard",
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
    whole = side.wholes.setdefault(item.key, Whole(shape, group[0].dtype))
    if (whole.shape, whole.dtype) != (shape, group[0].dtype):
        raise ReplicaError(
            f"{group[0].name} in {group[0].path} is {group[0].dtype} {list(shape)}; the tensor "
            f"that it is tied to is {whole.dtype} {list(whole.shape)}",
            "equal tensors",
        )
    for rank, tensor in enumerate(shards):
        if split is None or rank % size == 0:
            whole.copies.append([])
        whole.copies[-1] += _blocks(len(side.tensors), split, shape, spans[rank % size])
        side.tensors.append(tensor)  # pyright: ignore[reportArgumentType] - a stored side


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
        wanted = [_spans(item, shape, size, rank, dims) for rank in range(size)]
    except LayoutError as error:
        raise TensorError(f"{tensor.path}: {error.what}", error.wanted) from None
    if wanted != observed:
        raise TensorError(
            f"{tensor.name} in {tensor.path.parent.parent}: the shards hold "
            f"{[sum(s.length for s in spans) for spans in observed]}",
            f"{[sum(s.length for s in spans) for spans in wanted]}",
        )


def _check_whole(item: Instance, shape: tuple[int, ...], dims: Dims, tensor: StoredTensor) -> None:
    rows, cols = matrix(shape)
    want_rows = [dims.get(dim, -1) for dim in item.row.rows]
    want_cols = dims.get(item.row.cols, -1)
    bad_rows = want_rows and -1 not in want_rows and sum(want_rows) != rows
    if bad_rows or (want_cols not in (-1, cols)):
        raise TensorError(
            f"{tensor.name} in {tensor.path} is a shard of {list(shape)}; config.json makes it "
            f"{[sum(want_rows) if bad_rows else rows, want_cols if want_cols != -1 else cols]}",
            "a checkpoint and a config.json of one model",
            "give the hf_dir of the model that this checkpoint was made from",
        )


def claim_mm(modules: Sequence[Module], layout: Layout, parts: Parts) -> list[str]:
    """MM names that no row claims, or that stand where they should not; ``name (folder)``."""
    index = mm_index(tuple(modules))
    expected: dict[int, set[str]] = {}
    for _, stage, name in placements(modules, layout, every_tied=True):
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


def reorder(src: Side, modules: Sequence[Module], wanted: Sequence[Module], dims: Dims) -> Side:
    """The same side with wholes in the row order of another table (``--vit-qkv``).

    Only rows with one source can differ so. Rows of both tables are those of that source,
    rearranged: each block is followed back to the source and on to the wanted order.

    Raises:
        LayoutError: the number of heads is not known.
    """
    want = {r.mm: r.fuse for m in wanted for r in m.all_rows()}
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
    return Side(src.tensors, wholes)


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

"""An HF checkpoint as a side of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

from mmconvert.causes.tensors import missing as missing_tensors
from mmconvert.converters.configs import Dims
from mmconvert.converters.rows import OUTPUT_LAYER, ZEROS, Module, Row
from mmconvert.errors import TensorError, blamed
from mmconvert.formats.faults import STRICT, Faults
from mmconvert.formats.mm.instances import Instance, experts_of, instances
from mmconvert.names import EXPERT, NO_LAYER, number, summarise
from mmconvert.plan.dtypes import in_words, joint_dtype
from mmconvert.plan.plan import Block, Key, Side, UnstoredBlock, Whole, matrix
from mmconvert.stored import StoredTensor, Target, expert_of, transpose


class _Source(NamedTuple):
    """A tensor, or one expert of a stack, as a plan sees it.

    Attributes:
        tensor: with the sizes of this source.
        stored: what the side stores; the same, or all experts one below the other.
        row: the first row of this source there.
        stack: the shape of ``stored`` in the file, if that is another.
    """

    tensor: StoredTensor
    stored: StoredTensor
    row: int = 0
    stack: tuple[int, ...] = ()


def hf_side(
    modules: Sequence[Module],
    dims: Dims,
    tensors: Mapping[str, StoredTensor],
    *,
    transposed: bool = False,
    faults: Faults = STRICT,
    complete: bool = True,
) -> Side:
    """An HF checkpoint as wholes.

    Args:
        tensors: by name in hub spelling; each must be the source of some row.
        transposed: whether rows that say so see their tensor transposed. Only what is read can be:
            the wholes have the orientation of what is written. What is read is also taken expert
            by expert from stacked tensors; what is written is one tensor. Views are always read.
        faults: where those go after which reading goes on.
        complete: whether missing tensors are a fault of their own, not of files that are damaged.

    Raises:
        TensorError: missing tensors, or shapes that are not those of config.json.
    """
    made = _Wholes(dims, experts_of(modules, dims), transposed)
    missing: dict[str, list[str]] = {}
    layers = {m.key: dims[f"{m.key}.layers"] for m in modules}
    for item in instances(modules, layers, made.experts):
        names = item.hf_names()
        absent = [name for name in names if name not in tensors]
        if not absent:
            found = [tensors[name] for name in names]
            faults.attempt(lambda item=item, found=found: made.add(item, found), None)
        elif not item.row.tied_to:
            there = missing.setdefault(_place(item), [])
            there += [name for name in absent if name not in there]
        made.used.update(names)
    if complete:
        folder = next((tensor.path.parent for tensor in tensors.values()), Path())
        for fault in missing_tensors(missing, heads(modules), folder):
            faults.add(fault)
        beyond = [tensor for name, tensor in tensors.items() if name not in made.used]
        _check_beyond(modules, dims, beyond, faults)
    return made.side


class _Wholes:
    """Makes wholes of the tensors of a checkpoint, one row for one layer and expert at a time."""

    def __init__(self, dims: Dims, experts: Mapping[str, int], read: bool) -> None:
        self.side = Side()
        self.dims = dims
        self.experts = experts
        self.read = read
        self.numbers: dict[str, int] = {}
        self.used: set[str] = set()

    def add(self, item: Instance, tensors: Sequence[StoredTensor]) -> None:
        """Adds the whole that an instance makes of its tensors."""
        with blamed("wrong-shape", tensors[0].path, tensors[0].name):
            count = self.experts.get(item.module.key, 0)
            found = _sources(item, tensors, count, read=self.read)
            _check_sizes(item.row, found, self.dims, read=self.read)
            placed: list[tuple[int, _Source]] = []
            for source in found:
                number = self.numbers.setdefault(source.stored.name, len(self.numbers))
                placed.append((number, source))
                if number == len(self.side.stored):
                    _store(self.side, source)
            _add_whole(self.side, item, found[0].tensor, _fused(item.row, placed, self.dims))


def _place(item: Instance) -> str:
    """Where in the model an instance stands, in words."""
    label, layer = item.module.label, item.layer
    return f"{label} layer {layer}" if layer != NO_LAYER else f"{label}, outside its layers"


def _check_beyond(
    modules: Sequence[Module], dims: Dims, beyond: Sequence[StoredTensor], faults: Faults
) -> None:
    """Tensors that have a row, of layers or experts that config.json does not count."""
    if not beyond:
        return
    counts = [f"{m.key} {dims[f'{m.key}.layers']}" for m in modules]
    counts += [f"{key} {count} experts" for key, count in experts_of(modules, dims).items()]
    fault = TensorError(
        f"{number(beyond, 'tensor')} beyond the layers that config.json gives "
        f"({', '.join(counts)}): {summarise(tensor.name for tensor in beyond)}",
        "weights and config.json of one model",
        "use the config.json and the weight files of one download",
        cause="extra-layers",
        path=min(beyond).path,
        tensors=sorted(tensor.name for tensor in beyond),
    )
    faults.add(fault)


def heads(modules: Sequence[Module]) -> set[str]:
    """The names of the output layer."""
    return {name for m in modules for r in m.all_rows() if r.mm == OUTPUT_LAYER for name in r.hf}


def _store(side: Side, source: _Source) -> None:
    if source.stack:
        side.stacks[len(side.stored)] = source.stack
    side.stored.append(source.stored)


def _sources(
    item: Instance, found: Sequence[StoredTensor], experts: int, *, read: bool
) -> list[_Source]:
    """What an instance is made of.

    Args:
        experts: the number of experts in a layer.
        read: see ``transposed`` of :func:`hf_side`.

    Raises:
        TensorError: a stack of another number of experts.
    """
    sources: list[_Source] = []
    for tensor, template in zip(found, (n for n in item.row.hf if n != ZEROS), strict=True):
        seen = tensor
        if item.row.of_expert and EXPERT not in template:
            if len(tensor.shape) < 2 or tensor.shape[0] != experts:
                raise TensorError(
                    f"{tensor.name} is {list(tensor.shape)}; config.json says {experts} experts",
                    f"the {experts} experts along the first dimension",
                    "use the config.json and the weight files of one download",
                )
            seen = expert_of(tensor, item.expert)
            if not read and tensor.strides is None and not tensor.parts:
                rows, cols = seen.shape[0], prod(seen.shape[1:])
                below = tensor._replace(shape=(experts * rows, cols), strides=None)
                sources.append(_Source(seen, below, item.expert * rows, tensor.shape))
                continue
        if read and item.row.transposed:
            seen = transpose(seen)
        sources.append(_Source(seen, seen))
    return sources


def _add_whole(side: Side, item: Instance, tensor: StoredTensor, whole: Whole) -> None:
    """Adds a whole; a tied head that the checkpoint stores too is a copy of the embedding."""
    whole.keeps_dtype = item.row.keeps_dtype
    known = side.wholes.setdefault(item.key, whole)
    if known is whole:
        return
    dtype = joint_dtype((known.dtype, whole.dtype))
    if known.shape != whole.shape or not dtype:
        raise TensorError(
            f"{tensor.name} is {whole.dtype} {list(whole.shape)}, the embedding that it is "
            f"tied to {known.dtype} {list(known.shape)}",
            "equal tensors, as config.json says tie_word_embeddings",
        )
    if dtype != known.dtype:
        known.dtype = dtype
        known.mixed = f"{tensor.name} is {tensor.dtype}, the embedding that it is tied to is not"
    known.copies += whole.copies


def _fused(item: Row, found: Sequence[tuple[int, _Source]], dims: Dims) -> Whole:
    """The whole that numbered sources make."""
    first = found[0][1].tensor
    stored = iter(found)
    parts = [None if name == ZEROS else next(stored) for name in item.hf]
    lengths: list[int] = []
    for part in parts:
        if part is None:  # as the reference does: zeros like the first source
            lengths.append(matrix(first.shape)[0])
            continue
        tensor = part[1].tensor
        lengths.append(matrix(tensor.shape)[0])
        if tensor.shape[1:] != first.shape[1:] or not joint_dtype((tensor.dtype, first.dtype)):
            raise TensorError(
                f"{tensor.name} is {tensor.dtype} {list(tensor.shape)} and {first.name} "
                f"{first.dtype} {list(first.shape)}",
                f"one width and one kind of numbers, as {item.mm} is made of both",
            )
    try:
        maps = item.fuse.maps(lengths, dims)
    except TensorError as error:
        raise TensorError(
            f"{first.name}: {error.what}", "sizes as config.json gives them"
        ) from None
    rows = sum(span.length for spans in maps for span in spans)
    dtype = joint_dtype([source.tensor.dtype for _, source in found])
    whole = Whole((rows, *first.shape[1:]) if first.shape else (), dtype, [[]])
    odd = next((s.tensor for _, s in found if s.tensor.dtype != first.dtype), None)
    whole.mixed = in_words(first, odd) if odd else ""
    for part, spans in zip(parts, maps, strict=True):
        if part is None:
            width = matrix(first.shape)[1]
            whole.zeros += [UnstoredBlock(span.whole, 0, span.length, width) for span in spans]
            continue
        source, (_, cols), row = part[0], matrix(part[1].tensor.shape), part[1].row
        whole.copies[0] += [
            Block(source, row + s.start, 0, s.whole, 0, s.length, cols) for s in spans
        ]
    return whole


def _check_sizes(item: Row, found: Sequence[_Source], dims: Dims, *, read: bool) -> None:
    """Raises TensorError for tensors whose sizes are not those of config.json."""
    places = [i for i, name in enumerate(item.hf) if name != ZEROS]
    for i, (tensor, *_) in zip(places, found, strict=True):
        rows, cols = matrix(tensor.shape)
        if item.transposed and not read:
            rows, cols = cols, rows
        _check_size(tensor, "rows", rows, item.rows[i] if item.rows else "", dims)
        _check_size(tensor, "columns", cols, item.cols, dims)


def _check_size(tensor: StoredTensor, what: str, size: int, dim: str, dims: Dims) -> None:
    if dim in dims and dims[dim] != size:
        raise TensorError(
            f"{tensor.name} {list(tensor.shape)} has {size} {what}; config.json asks for "
            f"{dims[dim]} ({dim})",
            "weights and config.json of one model",
            "use the config.json and the weight files of one download",
            path=tensor.path,
            tensors=[tensor.name],
        )


def hf_target(model: Side, wholes: Mapping[Key, Whole]) -> Side:
    """An HF checkpoint to be written: the tensors of ``model``, in the dtypes of ``wholes``.

    Raises:
        TensorError: several dtypes for parts of one tensor.
    """
    dtypes: dict[int, str] = {}
    side = Side()
    for key, whole in model.wholes.items():
        dtype = wholes[key].dtype if key in wholes else whole.dtype
        side.wholes[key] = Whole(whole.shape, dtype, whole.copies, whole.zeros)
        for i in {block.tensor for blocks in whole.copies for block in blocks}:
            if dtypes.setdefault(i, dtype) != dtype:
                raise TensorError(
                    f"{key.name()} is {dtype}; other parts of {model.stored[i].name} are "
                    f"{dtypes[i]}",
                    "one dtype for the parts of one tensor",
                    "cast them all, with --dtype",
                )
    side.targets = [
        Target(t.name, dtypes[i], t.shape, stack=model.stacks.get(i, ()))
        for i, t in enumerate(model.stored)
    ]
    return side

"""An HF checkpoint as a side of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmconvert.causes.tensors import missing as missing_tensors
from mmconvert.converters.family import OUTPUT_LAYER, ZEROS, Dims, Module, Row
from mmconvert.errors import TensorError
from mmconvert.formats.mm.instances import Instance, instances
from mmconvert.names import summarise
from mmconvert.plan.dtypes import in_words, joint_dtype
from mmconvert.plan.plan import Block, Key, Side, Whole, matrix
from mmconvert.stored import StoredTensor, Target, transpose


def hf_side(
    modules: Sequence[Module],
    dims: Dims,
    tensors: Mapping[str, StoredTensor],
    *,
    transposed: bool = False,
) -> Side:
    """An HF checkpoint as wholes.

    Args:
        tensors: by name in hub spelling; each must be the source of some row.
        transposed: whether rows that say so see their tensor transposed. Only what is read can be:
            the wholes have the orientation of what is written.

    Raises:
        TensorError: missing tensors, or shapes that are not those of config.json.
    """
    side = Side()
    numbers: dict[str, int] = {}
    missing: list[str] = []
    layers = {m.key: dims[f"{m.key}.layers"] for m in modules}
    for item in instances(modules, layers):
        names = [name.replace("{}", str(item.layer)) for name in item.row.hf if name != ZEROS]
        absent = [name for name in names if name not in tensors]
        if absent:
            missing += [] if item.row.tied_to else absent
            continue
        found = [tensors[name] for name in names]
        _check_sizes(item.row, found, dims)
        if transposed and item.row.transposed:
            found = [transpose(tensor) for tensor in found]
        for name, tensor in zip(names, found, strict=True):
            numbers.setdefault(name, len(numbers))
            if numbers[name] == len(side.stored):
                side.stored.append(tensor)
        _add_whole(side, item, found[0], _fused(item.row, found, [numbers[n] for n in names], dims))
    if missing:
        raise missing_tensors(missing, heads(modules))
    beyond = [tensor.name for name, tensor in tensors.items() if name not in numbers]
    if beyond:
        raise TensorError(
            f"{len(beyond)} tensors are beyond the layers that config.json counts "
            f"({', '.join(f'{m.key} {layers[m.key]}' for m in modules)}): {summarise(beyond)}",
            "weights and config.json of one model",
            "replace config.json or the weights by those that belong together",
        )
    return side


def heads(modules: Sequence[Module]) -> set[str]:
    """The names of the output layer."""
    return {name for m in modules for r in m.all_rows() if r.mm == OUTPUT_LAYER for name in r.hf}


def _add_whole(side: Side, item: Instance, tensor: StoredTensor, whole: Whole) -> None:
    """Adds a whole; a tied head that the checkpoint stores too is a copy of the embedding."""
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


def partial_hf(
    modules: Sequence[Module], dims: Dims, tensors: Mapping[str, StoredTensor]
) -> tuple[Side, list[Instance], list[TensorError]]:
    """What of an HF checkpoint can be read as wholes; which rows lack tensors; what is wrong.

    For looking at a damaged checkpoint; see :func:`hf_side`.
    """
    side = Side()
    lacking: list[Instance] = []
    faults: list[TensorError] = []
    layers = {m.key: dims[f"{m.key}.layers"] for m in modules}
    for item in instances(modules, layers):
        names = [name.replace("{}", str(item.layer)) for name in item.row.hf if name != ZEROS]
        found = [tensors[name] for name in names if name in tensors]
        if len(found) < len(names):
            lacking += [] if item.row.tied_to else [item]
            continue
        first = len(side.stored)
        try:
            _check_sizes(item.row, found, dims)
            whole = _fused(item.row, found, list(range(first, first + len(found))), dims)
            _add_whole(side, item, found[0], whole)
        except TensorError as error:
            faults.append(error)
            continue
        side.stored += found
    return side, lacking, faults


def _fused(item: Row, found: Sequence[StoredTensor], numbers: Sequence[int], dims: Dims) -> Whole:
    first = found[0]
    stored = iter(zip(numbers, found, strict=True))
    parts = [None if name == ZEROS else next(stored) for name in item.hf]
    lengths: list[int] = []
    for part in parts:
        if part is None:  # as the reference does: zeros like the first source
            lengths.append(matrix(first.shape)[0])
            continue
        tensor = part[1]
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
    dtype = joint_dtype([tensor.dtype for tensor in found])
    whole = Whole((rows, *first.shape[1:]) if first.shape else (), dtype, [[]])
    odd = next((tensor for tensor in found if tensor.dtype != first.dtype), None)
    whole.mixed = in_words(first, odd) if odd else ""
    for part, spans in zip(parts, maps, strict=True):
        if part is None:
            whole.zeros += [(span.whole, span.length) for span in spans]
            continue
        source, cols = part[0], matrix(part[1].shape)[1]
        whole.copies[0] += [Block(source, s.start, 0, s.whole, 0, s.length, cols) for s in spans]
    return whole


def _check_sizes(item: Row, found: Sequence[StoredTensor], dims: Dims) -> None:
    """Raises TensorError for tensors whose sizes are not those of config.json."""
    places = [i for i, name in enumerate(item.hf) if name != ZEROS]
    for i, tensor in zip(places, found, strict=True):
        rows, cols = matrix(tensor.shape)
        _check_size(tensor, "rows", rows, item.rows[i] if item.rows else "", dims)
        _check_size(tensor, "columns", cols, item.cols, dims)


def _check_size(tensor: StoredTensor, what: str, size: int, dim: str, dims: Dims) -> None:
    if dim in dims and dims[dim] != size:
        raise TensorError(
            f"{tensor.name} {list(tensor.shape)} has {size} {what}; config.json makes it "
            f"{dims[dim]} ({dim})",
            "weights and config.json of one model",
            "replace config.json or the weights by those that belong together",
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
    side.targets = [Target(t.name, dtypes[i], t.shape) for i, t in enumerate(model.stored)]
    return side

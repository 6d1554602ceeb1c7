"""Checkpoints in the names of any naming that a table has, beside those of Hugging Face and MM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mmconvert.converters.configs import Dims
from mmconvert.converters.rows import Module, in_naming
from mmconvert.errors import TensorError
from mmconvert.formats.faults import STRICT, Faults
from mmconvert.formats.hf.side import hf_side, hf_target
from mmconvert.formats.mm.instances import Instance, experts_of, instances
from mmconvert.names import EXPERT
from mmconvert.plan.plan import Key, Side, Whole
from mmconvert.stored import StoredTensor


def side_in(
    naming: str,
    modules: Sequence[Module],
    dims: Dims,
    tensors: Mapping[str, StoredTensor],
    faults: Faults = STRICT,
) -> Side:
    """The wholes that tensors with the names of a naming form.

    Raises:
        TensorError: missing tensors, or shapes that are not those of the model.
        RequestError: a row has no name there.
    """
    return hf_side(in_naming(tuple(modules), naming), dims, tensors, transposed=True, faults=faults)


def target_in(
    naming: str, modules: Sequence[Module], dims: Dims, wholes: Mapping[Key, Whole]
) -> Side:
    """What a checkpoint in a naming is to store; its shapes are those of the wholes and of the
    sizes that rows name.

    Raises:
        TensorError: a row is made of several tensors whose sizes are unknown.
        RequestError: a row has no name there.
    """
    table = in_naming(tuple(modules), naming)
    layers = {m.key: dims[f"{m.key}.layers"] for m in table}
    experts = experts_of(table, dims)
    made: dict[str, StoredTensor] = {}
    for item in instances(table, layers, experts):
        if item.row.tied_to:
            continue
        whole = wholes[item.key]
        lengths = _lengths(item, whole, dims)
        names = zip(item.hf_names(), (n for n in item.row.hf if n), lengths, strict=True)
        for name, template, length in names:
            shape = (length, *whole.shape[1:]) if whole.shape else ()
            if item.row.of_expert and EXPERT not in template:
                shape = (experts[item.module.key], *shape)
            made.setdefault(name, StoredTensor(name, whole.dtype, shape, Path(), 0))
    return hf_target(hf_side(table, dims, made), wholes)


def _lengths(item: Instance, whole: Whole, dims: Dims) -> list[int]:
    """The rows of each tensor that an instance is made of."""
    row = item.row
    if row.rows and all(dim in dims for dim in row.rows):
        return [dims[dim] for dim, name in zip(row.rows, row.hf, strict=True) if name]
    if len(row.hf) == 1:
        return [whole.shape[0] if whole.shape else 0]
    raise TensorError(
        f"{item.key.name()} is made of {', '.join(item.hf_names())}, whose sizes are unknown",
        "a table that names the sizes of each",
        "give rows= in the family's table",
    )

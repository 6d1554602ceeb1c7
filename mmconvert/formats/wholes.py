"""Sides of a plan for checkpoints that store each whole as one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from mmconvert.converters.rows import Module, mm_index
from mmconvert.errors import TensorError
from mmconvert.formats.faults import Faults
from mmconvert.names import NO_LAYER
from mmconvert.plan.plan import Block, Key, Side, Whole, matrix
from mmconvert.stored import StoredTensor, Target


def plain(
    tensors: Iterable[tuple[str, StoredTensor]],
) -> tuple[dict[str, Whole], list[StoredTensor]]:
    """Tensors that are stored whole, by name."""
    wholes: dict[str, Whole] = {}
    stored: list[StoredTensor] = []
    for name, tensor in tensors:
        block = Block(len(stored), 0, 0, 0, 0, *matrix(tensor.shape))
        wholes[name] = Whole(tensor.shape, tensor.dtype, [[block]])
        stored.append(tensor)
    return wholes, stored


def claimed(
    modules: tuple[Module, ...], tensors: Mapping[str, StoredTensor], path: Path, faults: Faults
) -> Side:
    """The side of tensors that are each one whole, in the names of a table.

    Raises:
        TensorError: a name that no row has.
    """
    index, side = mm_index(modules), Side()
    for name, tensor in tensors.items():
        hit = index.find(name)
        if hit is None:
            faults.add(TensorError(f"{path}: {name} has no place in the model", "its tensors only"))
            continue
        (_, row), layer, expert = hit
        block = Block(len(side.stored), 0, 0, 0, 0, *matrix(tensor.shape))
        side.wholes[Key(row.mm, layer, expert)] = Whole(tensor.shape, tensor.dtype, [[block]])
        side.stored.append(tensor)
    return side


def one_each(wholes: Mapping[Key, Whole]) -> Side:
    """The side of a checkpoint to be written that holds every whole as one tensor."""
    side = Side()
    for number, (key, whole) in enumerate(wholes.items()):
        block = Block(number, 0, 0, 0, 0, *matrix(whole.shape))
        side.wholes[key] = Whole(whole.shape, whole.dtype, [[block]])
        side.targets.append(Target(key.name(), whole.dtype, whole.shape))
    return side


def verbatim(named: Iterable[tuple[str, StoredTensor]], path: Path) -> tuple[Side, Side]:
    """Both sides of a plan that writes every tensor as it is, under another name.

    Args:
        path: where they are read, for messages.

    Raises:
        TensorError: two of one name.
    """
    src = Side()
    for name, tensor in named:
        key, block = Key(name, NO_LAYER), Block(len(src.stored), 0, 0, 0, 0, *matrix(tensor.shape))
        if key in src.wholes:
            raise TensorError(
                f"{path}: {tensor.name} and another tensor are both {name}",
                "one spelling of each name",
            )
        src.wholes[key] = Whole(tensor.shape, tensor.dtype, [[block]])
        src.stored.append(tensor)
    return src, one_each(src.wholes)

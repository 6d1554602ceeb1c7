"""Wholes of a generic table as tensors of DCP: experts put into their stacks, ties repeated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from mmconvert.errors import TensorError
from mmconvert.formats.dcp.generic import GenericFamily
from mmconvert.formats.dcp.naming import ExpertSlot
from mmconvert.formats.dcp.output import data_file
from mmconvert.names import NO_LAYER, fill
from mmconvert.plan.plan import Block, Key, Side, Whole, matrix
from mmconvert.stored import Target

MERGED = data_file(100)  # where merged tensors go, as MindSpeed-MM appends them


class _In(NamedTuple):
    """An expert's whole in a stack."""

    key: Key
    whole: Whole
    slot: ExpertSlot


def place_by_rules(
    family: GenericFamily, wholes: Mapping[Key, Whole]
) -> tuple[Side, dict[str, str]]:
    """The side to be written, and the data file of each tensor.

    Raises:
        TensorError: experts of different shapes or dtypes.
    """
    side = Side()
    stacks: dict[str, list[_In]] = {}
    files: dict[str, str] = {}
    numbers = {name: n for n, names in enumerate(family.files.values()) for name in names}
    for key, whole in wholes.items():
        slot = family.slots.get(key.mm)
        if slot is not None:
            stacks.setdefault(fill(slot.name, key.layer), []).append(_In(key, whole, slot))
            continue
        name = family.rules.naming.dcp(key.mm)
        _add(side, key, whole, Target(name, whole.dtype, whole.shape))
        files[name] = data_file(numbers.get(key.mm, 0))
    for name, found in stacks.items():
        _add_stack(side, name, found)
        source = found[0].key.mm.removesuffix("[{expert}]")
        number = numbers.get(fill(source, found[0].key.layer), 0)
        files[name] = MERGED if found[0].slot.merged else data_file(number)
    for repeated, source in family.rules.ties:
        key = Key(source, NO_LAYER)
        if key in side.wholes and Key(repeated, NO_LAYER) not in side.wholes:
            name, whole = family.rules.naming.dcp(repeated), side.wholes[key]
            block = Block(len(side.targets), 0, 0, 0, 0, *matrix(whole.shape))
            side.targets.append(Target(name, whole.dtype, whole.shape))
            whole.copies.append([block])
            files[name] = data_file(numbers.get(source, 0))
    if family.rules.one_file:
        files = dict.fromkeys(files, data_file(0))
    return side, files


def _add(side: Side, key: Key, whole: Whole, target: Target) -> None:
    block = Block(len(side.targets), 0, 0, 0, 0, *matrix(whole.shape))
    side.wholes[key] = Whole(whole.shape, whole.dtype, [[block]])
    side.targets.append(target)


def _add_stack(side: Side, name: str, found: list[_In]) -> None:
    """A stack of experts; gate and up of one lie beside each other."""
    shapes = {one.whole.shape for one in found} | {found[0].whole.shape}
    dtypes = {one.whole.dtype for one in found}
    experts = max(one.key.expert for one in found) + 1
    slot = found[0].slot
    if len(shapes) > 1 or len(dtypes) > 1 or len(found) != experts * slot.columns:
        raise TensorError(
            f"{name} would be made of {len(found)} matrices of {len(shapes)} shapes and "
            f"{len(dtypes)} dtypes",
            "the same shape and dtype for each expert, gate and up for each",
        )
    rows, cols = shapes.pop()
    number = len(side.targets)
    for key, whole, one in found:
        block = Block(number, key.expert * rows, one.column * cols, 0, 0, rows, cols)
        side.wholes[key] = Whole(whole.shape, whole.dtype, [[block]])
    shape = (experts * rows, slot.columns * cols)
    stack = () if slot.flat else (experts, rows, shape[1])
    side.targets.append(Target(name, dtypes.pop(), shape, stack=stack))

"""Layers and experts in the stacked tensors of Megatron-Core: taken out, and put there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mmconvert.converters.rows import Module
from mmconvert.errors import TensorError
from mmconvert.formats.dcp.megatron import (
    HF_VISION,
    KeyPlace,
    hf_vision,
    joined,
    key_of,
    place_of,
)
from mmconvert.formats.mm.instances import Instance, experts_of, instances
from mmconvert.formats.model import Model
from mmconvert.names import EXPERT, number, summarise
from mmconvert.plan.plan import Block, Key, Side, Whole
from mmconvert.stored import StoredTensor, Target, expert_of


def under_mm_names(
    tensors: Mapping[str, StoredTensor], model: Model, path: Path
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """The tensors under MM names, and those of a vision encoder that has the hub's.

    Raises:
        TensorError: tensors that are missing, or that nothing claims.
    """
    before = hf_vision(tensors)
    hf = {}
    if before != "-":
        prefix = before + HF_VISION[-1]
        hf = {n.removeprefix(before): t for n, t in tensors.items() if n.startswith(prefix)}
        hf = {model.family.hub_name(name): tensor for name, tensor in hf.items()}
    used = {name for name in tensors if before != "-" and name.startswith(before + HF_VISION[-1])}
    modules = [m for m in model.modules if before == "-" or m.role == "decoder"]
    layers = {m.key: model.dims[f"{m.key}.layers"] for m in modules}
    found: dict[str, StoredTensor] = {}
    missing: dict[str, None] = {}
    for item in instances(modules, layers, experts_of(modules, model.dims)):
        name, tensor = _taken(tensors, item)
        if item.row.tied_to:
            continue
        if tensor is None:
            missing[name] = None
            continue
        used.add(name)
        found[item.key.name()] = tensor._replace(name=f"{name} of {item.key.name()}")
    if missing:
        raise TensorError(
            f"{path}: {number(missing, 'tensor')} missing: {summarise(missing)}",
            f"every tensor of {model.family.name}, as Megatron-Core names it",
            "take the checkpoint of the whole model",
        )
    if beyond := [name for name in tensors if name not in used]:
        raise TensorError(
            f"{path}: {number(beyond, 'tensor')} with no place in {model.family.form}: "
            f"{summarise(beyond)}",
            f"only tensors of {model.family.name}",
            "leave them out with --drop 'NAME' (a pattern; may be repeated)",
        )
    return found, hf


def _taken(tensors: Mapping[str, StoredTensor], item: Instance) -> tuple[str, StoredTensor | None]:
    """The key that a whole lies under, and the whole; None if it is not there."""
    place = _place(item)
    name = key_of(place, item)
    together = joined(place.key)
    if name in tensors or not place.by_layer or together not in tensors:
        tensor = tensors.get(name)
    else:
        name, tensor = together, tensors[together]
        if not 0 <= item.layer < tensor.shape[0]:
            return name, None
        tensor = expert_of(tensor, item.layer)
    if tensor is not None and place.by_expert:
        tensor = expert_of(tensor, item.expert)
    return name, tensor


def _place(item: Instance) -> KeyPlace:
    experts = any(EXPERT in row.mm for row in item.module.layer)
    return place_of(item.row, item.module, experts=experts)


def in_stacks(
    modules: Sequence[Module], dims: Mapping[str, int], wholes: Mapping[Key, Whole]
) -> tuple[Side, dict[str, tuple[int, ...]]]:
    """The wholes in the tensors of Megatron, and the shapes of these.

    Raises:
        TensorError: layers of different shapes or dtypes.
    """
    side = Side()
    shapes: dict[str, tuple[int, ...]] = {}
    held: dict[str, list[tuple[Instance, Whole]]] = {}
    layers = {m.key: dims[f"{m.key}.layers"] for m in modules}
    experts = experts_of(modules, dims)
    for item in instances(modules, layers, experts):
        if item.row.tied_to or item.key not in wholes:
            continue
        place = _place(item)
        name = joined(place.key) if place.by_layer else key_of(place, item)
        held.setdefault(name, []).append((item, wholes[item.key]))
    for name, found in held.items():
        shape, dtype = found[0][1].shape, found[0][1].dtype
        if any((whole.shape, whole.dtype) != (shape, dtype) for _, whole in found):
            raise TensorError(
                f"{name} would be made of layers of different shapes or dtypes",
                "equal layers, as Megatron-Core stacks them",
                "cast them all, with --dtype",
            )
        item = found[0][0]
        place = _place(item)
        axes = [layers[item.module.key]] * place.by_layer
        axes += [experts.get(item.module.key, 0)] * place.by_expert
        _add_stack(side, name, found, axes)
        shapes[name] = (*axes, *shape)
    return side, shapes


def _add_stack(
    side: Side, name: str, found: Sequence[tuple[Instance, Whole]], axes: Sequence[int]
) -> None:
    """One tensor: its wholes one below the other."""
    count = 1
    for length in axes:
        count *= length
    if len(found) != count:
        raise TensorError(
            f"{name} would hold {len(found)} of {count} layers and experts",
            "layers that are all alike, as Megatron-Core stacks them",
        )
    shape, dtype = found[0][1].shape, found[0][1].dtype
    for place, (item, whole) in enumerate(found):
        rows, cols = _matrix(shape)
        block = Block(len(side.targets), place * rows, 0, 0, 0, rows, cols)
        side.wholes[item.key] = Whole(whole.shape, whole.dtype, [[block]])
    high = (shape[0] * count, *shape[1:]) if shape else ()
    stack = (*axes, *shape) if axes else ()
    side.targets.append(Target(name, dtype, high, stack=stack))


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    cols = 1
    for length in shape[1:]:
        cols *= length
    return (shape[0] if shape else 1), cols

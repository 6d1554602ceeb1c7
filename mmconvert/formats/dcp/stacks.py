"""Layers and experts in the stacked tensors of Megatron-Core: taken out, and put there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mmconvert.converters.rows import Module
from mmconvert.errors import LEAVE_OUT, TensorError
from mmconvert.formats.dcp.megatron import (
    EXPERTS,
    HF_VISION,
    KeyPlace,
    hf_vision,
    joined,
    key_of,
    place_of,
    without_te,
)
from mmconvert.formats.mm.instances import Instance, experts_of, instances
from mmconvert.formats.model import Model
from mmconvert.names import EXPERT, number, summarise
from mmconvert.plan.plan import Block, Key, Side, Whole
from mmconvert.stored import StoredTensor, Target, below, expert_of


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
        hub = _of_hub(model.modules)
        hf = {hub + name: tensor for name, tensor in hf.items()}
    used = {name for name in tensors if before != "-" and name.startswith(before + HF_VISION[-1])}
    modules = [m for m in model.modules if before == "-" or m.role == "decoder"]
    layers = {m.key: model.dims[f"{m.key}.layers"] for m in modules}
    found: dict[str, StoredTensor] = {}
    missing: dict[str, None] = {}
    experts = experts_of(modules, model.dims)
    for item in instances(modules, layers, experts):
        key = item.module.key
        names, tensor = _taken(tensors, item, (layers[key], experts.get(key, 0)))
        if item.row.tied_to:
            continue
        if tensor is None:
            missing[names[0]] = None
            continue
        used.update(names)
        found[item.key.name()] = tensor._replace(name=f"{names[0]} of {item.key.name()}")
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
            LEAVE_OUT,
        )
    return found, hf


def _of_hub(modules: Sequence[Module]) -> str:
    """What the hub has before ``visual.`` of a vision encoder."""
    names = (name for m in modules if m.role != "decoder" for r in m.all_rows() for name in r.hf)
    return next((n.partition(HF_VISION[-1])[0] for n in names if HF_VISION[-1] in n), "")


def _taken(
    tensors: Mapping[str, StoredTensor], item: Instance, lengths: tuple[int, int]
) -> tuple[tuple[str, ...], StoredTensor | None]:
    """The keys that a whole lies under, and the whole; None if it is not there.

    Args:
        lengths: the layers of the module, and the experts of each.

    Raises:
        TensorError: a tensor of another number of layers or experts.
    """
    place = _place(item)
    forms = [form for one in (place, without_te(place)) for form in _forms(one, item)]
    for name, by_layer, by_expert in forms:
        keys = (name,) if name in tensors else (f"{name}_w", f"{name}_v")
        if not all(key in tensors for key in keys):
            continue
        found = [tensors[key] for key in keys]
        tensor = found[0] if len(found) == 1 else below(found[0], found[1])
        axes = ((by_layer, item.layer), (by_expert, item.expert))
        for (stacked, index), length in zip(axes, lengths, strict=True):
            if stacked:
                _check_length(tensor, name, length)
                tensor = expert_of(tensor, index)
        return keys, tensor
    return (forms[0][0],), None


def _forms(place: KeyPlace, item: Instance) -> list[tuple[str, bool, bool]]:
    """Keys that a whole may lie under, and whether layers and experts are dimensions there: of one
    tensor, or numbered (``singleton_local_shards``).
    """
    own = key_of(place, item)
    forms = [(own, False, place.by_expert)]
    if place.by_layer:
        forms.append((joined(place.key), True, place.by_expert))
    if place.by_expert:
        forms.append((own.replace(EXPERTS, f"{EXPERTS}{item.expert}."), False, False))
    return forms


def _check_length(tensor: StoredTensor, name: str, length: int) -> None:
    if not tensor.shape or tensor.shape[0] != length:
        raise TensorError(
            f"{name} holds {tensor.shape[0] if tensor.shape else 'no'} layers or experts; "
            f"config.json says {length}",
            "the checkpoint and config.json of one model",
            "give the hf_dir of this model",
        )


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
            "layers that are all of one form, as Megatron-Core stacks them",
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

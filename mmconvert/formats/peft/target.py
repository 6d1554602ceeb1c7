"""An adapter of PEFT that is to be written, as a side of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mmconvert.adapters import HF_A, HF_B, MM_A, MM_B, PREFIX, WEIGHT
from mmconvert.converters.adapters import part_spans
from mmconvert.converters.family import Family
from mmconvert.converters.rows import ZEROS, Module
from mmconvert.formats.mm.instances import experts_of, instances
from mmconvert.formats.model import Model
from mmconvert.names import EXPERT
from mmconvert.plan.plan import Block, Key, Side, Whole
from mmconvert.stored import Target


def spelled(family: Family, hub: str, names: str) -> str:
    """A hub name as a module of transformers is called: since 4.52, or before."""
    if names == "old":
        return hub
    for prefix, start in family.spellings:
        if hub.startswith(start):
            return prefix + hub[len(start) :]
    return hub


def spelling_note(family: Family, names: str) -> str:
    """Which transformers loads what is written; "" where there is one spelling."""
    if not family.spellings:
        return ""
    since = "4.52 and later" if names == "new" else "before 4.52"
    other = "old" if names == "new" else "new"
    return (
        f"names of transformers {since}; others load such an adapter without any effect: for them "
        f"give --cfg.names {other}"
    )


class AdaptedPaths(NamedTuple):
    """What an adapter changes, in one spelling.

    Attributes:
        modules: paths of linear layers.
        parameters: paths of parameters that stack experts.
    """

    modules: dict[str, None]
    parameters: dict[str, None]


def stack_note(adapted: AdaptedPaths) -> str:
    """Which transformers and PEFT load adapters of stacked experts; "" where there are none."""
    if not adapted.parameters:
        return ""
    return (
        "stacked experts are adapted by target_parameters, A of their inputs, as PEFT 0.21 has "
        "them with transformers 5; PEFT 0.18 and transformers 4 exchange A and B, and cannot load "
        "this"
    )


def peft_target(model: Model, wholes: Mapping[Key, Whole], names: str) -> tuple[Side, AdaptedPaths]:
    """The matrices of every Hugging Face layer, and what they change.

    Raises:
        TensorError: sizes that are not known.
    """
    side, adapted = Side(), AdaptedPaths({}, {})
    assert model.adapter is not None  # noqa: S101 - narrows the type: it is an adapter's
    base: tuple[Module, ...] = model.adapter.base
    layers = {m.key: model.dims.get(f"{m.key}.layers", 0) for m in base}
    stacks: dict[str, dict[str, list[tuple[Key, Key]]]] = {}
    for item in instances(base, layers, experts_of(base, model.dims)):
        stem = item.row.mm.removesuffix(WEIGHT)
        key_a = Key(stem + MM_A, item.layer, item.expert)
        key_b = Key(stem + MM_B, item.layer, item.expert)
        if item.row.of_expert and EXPERT not in item.row.hf[0]:
            path = spelled(model.family, item.hf_names()[0], names)
            module = stacks.setdefault(path.rpartition(".")[0], {})
            module.setdefault(path, []).append((key_a, key_b))
            continue
        a, b = wholes[key_a], wholes[key_b]
        rank, width = a.shape
        new_a = side.wholes[key_a] = Whole(a.shape, a.dtype)
        new_b = side.wholes[key_b] = Whole(b.shape, b.dtype, [[]])
        spans = part_spans(item.row, b.shape[0], model.dims, key_b.name())
        stored = [s for s, name in zip(spans, item.row.hf, strict=True) if name != ZEROS]
        for hub, part in zip(item.hf_names(), stored, strict=True):
            path = spelled(model.family, hub, names).removesuffix(WEIGHT)
            adapted.modules[path] = None
            number = len(side.targets)
            new_a.copies.append([Block(number, 0, 0, 0, 0, rank, width)])
            side.targets.append(Target(PREFIX + path + HF_A, a.dtype, a.shape))
            rows = sum(span.length for span in part)
            new_b.copies[0] += [
                Block(number + 1, s.start, 0, s.whole, 0, s.length, rank) for s in part
            ]
            side.targets.append(Target(PREFIX + path + HF_B, b.dtype, (rows, rank)))
    for module, parameters in stacks.items():
        for depth, (path, keys) in enumerate(reversed(parameters.items())):
            adapted.parameters[path] = None
            _stack(side, wholes, keys, PREFIX + module + ".base_layer" * depth)
    return side, adapted


def _stack(
    side: Side, wholes: Mapping[Key, Whole], keys: Sequence[tuple[Key, Key]], name: str
) -> None:
    """A and B of all experts of a parameter, as PEFT has them: see ``formats.peft.stacks``."""
    first_a, first_b = (wholes[key] for key in keys[0])
    (rank, width), rows, count = first_a.shape, first_b.shape[0], len(keys)
    number = len(side.targets)
    side.targets.append(Target(name + HF_A, first_a.dtype, (count * rank, width)))
    side.targets.append(Target(name + HF_B, first_b.dtype, (rows, rank * count)))
    for expert, (key_a, key_b) in enumerate(keys):
        a, b = wholes[key_a], wholes[key_b]
        block = Block(number, expert * rank, 0, 0, 0, rank, width)
        side.wholes[key_a] = Whole(a.shape, a.dtype, [[block]])
        columns = [Block(number + 1, 0, k * count + expert, 0, k, rows, 1) for k in range(rank)]
        side.wholes[key_b] = Whole(b.shape, b.dtype, [columns])

"""An adapter of PEFT that is to be written, as a side of a plan."""

from __future__ import annotations

from collections.abc import Mapping

from mmconvert.adapters import HF_A, HF_B, MM_A, MM_B, PREFIX, WEIGHT
from mmconvert.converters.adapters import part_spans
from mmconvert.converters.family import Family
from mmconvert.converters.rows import ZEROS, Module
from mmconvert.errors import TensorError
from mmconvert.formats.mm.instances import Instance, experts_of, instances
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


def peft_target(
    model: Model, wholes: Mapping[Key, Whole], names: str
) -> tuple[Side, dict[str, None]]:
    """The matrices of every Hugging Face layer, and the paths of these layers.

    Raises:
        TensorError: a layer of MM format that has no counterpart, or sizes that are not known.
    """
    side, paths = Side(), dict[str, None]()
    assert model.adapter is not None  # noqa: S101 - narrows the type: it is an adapter's
    base: tuple[Module, ...] = model.adapter.base
    layers = {m.key: model.dims.get(f"{m.key}.layers", 0) for m in base}
    for item in instances(base, layers, experts_of(base, model.dims)):
        stem = item.row.mm.removesuffix(WEIGHT)
        key_a = Key(stem + MM_A, item.layer, item.expert)
        key_b = Key(stem + MM_B, item.layer, item.expert)
        a, b = wholes[key_a], wholes[key_b]
        _check_counterpart(item)
        rank, width = a.shape
        new_a = side.wholes[key_a] = Whole(a.shape, a.dtype)
        new_b = side.wholes[key_b] = Whole(b.shape, b.dtype, [[]])
        spans = part_spans(item.row, b.shape[0], model.dims, key_b.name())
        stored = [s for s, name in zip(spans, item.row.hf, strict=True) if name != ZEROS]
        for hub, part in zip(item.hf_names(), stored, strict=True):
            path = spelled(model.family, hub, names).removesuffix(WEIGHT)
            paths[path] = None
            number = len(side.targets)
            new_a.copies.append([Block(number, 0, 0, 0, 0, rank, width)])
            side.targets.append(Target(PREFIX + path + HF_A, a.dtype, a.shape))
            rows = sum(span.length for span in part)
            new_b.copies[0] += [
                Block(number + 1, s.start, 0, s.whole, 0, s.length, rank) for s in part
            ]
            side.targets.append(Target(PREFIX + path + HF_B, b.dtype, (rows, rank)))
    return side, paths


def _check_counterpart(item: Instance) -> None:
    """Raises TensorError for a module of MM format that is no module in Hugging Face."""
    if item.row.of_expert and not any(EXPERT in name for name in item.row.hf):
        raise TensorError(
            f"{item.key.name()} is adapted; Hugging Face keeps all experts of a layer in one "
            f"tensor, {item.row.hf[0]}, which is no linear layer of PEFT's",
            "an adapter of modules that both have",
            "merge the adapter into the model (lora_merge)",
        )

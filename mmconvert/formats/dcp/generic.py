"""Models of any kind: a table made of a Hugging Face checkpoint's own names and a trainer's rules.

Each tensor is a whole by itself. Experts that lie otherwise in DCP are a whole each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from mmconvert.converters.configs import Dims
from mmconvert.converters.family import Carried, Family, Variant
from mmconvert.converters.rows import Module, Row, row
from mmconvert.errors import TensorError
from mmconvert.formats.dcp.naming import Expert, ExpertSlot, Rules, expert_of_rules
from mmconvert.formats.hf.folder import open_hf
from mmconvert.formats.model import dropped_by
from mmconvert.stored import StoredTensor


@dataclass(frozen=True, kw_only=True)
class GenericFamily(Family):
    """A table of one checkpoint.

    Attributes:
        rules: how its tensors are named and stored in DCP.
        slots: where experts lie there, by the row's MM name.
        files: the weight files of the Hugging Face checkpoint: file -> its tensors.
    """

    rules: Rules = field(default_factory=Rules)
    slots: Mapping[str, ExpertSlot] = field(default_factory=dict[str, ExpertSlot])
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])


def generic_family(
    converter: str,
    hf_dir: Path,
    rules: Rules,
    *,
    drop: tuple[str, ...] = (),
    carried: tuple[Carried, ...] = (),
) -> GenericFamily:
    """The table of a Hugging Face checkpoint.

    Args:
        converter: name of the command.
        drop: patterns of tensors that are left out.
        carried: tensors that are not converted: they stay in, and return from, ``hf_dir``.

    Raises:
        CheckpointError: it cannot be read; TensorError: experts that are not complete.
    """
    checkpoint = open_hf(hf_dir)
    tensors = {
        name: tensor
        for name, tensor in checkpoint.tensors().items()
        if not dropped_by((name,), drop) and not any(name.startswith(c.prefix) for c in carried)
    }
    plain, experts = _sorted(rules, tensors)
    dims: Dims = {"all.layers": 0}
    rows = [
        replace(row(name, name), keeps_dtype=keeps_dtype(name, tensors[name].dtype))
        for name in plain
    ]
    rows += [
        row(name, name, tied_to=source)
        for name, source in rules.ties
        if name not in tensors and source in plain
    ]
    modules = [Module("all", "all", tuple(rows), (), (), role="decoder")]
    slots: dict[str, ExpertSlot] = {}
    for number, group in enumerate(_groups(experts)):
        module = _module(f"experts{number}", group, dims)
        modules.append(module)
        slots |= {r.mm: group[r.mm][0].slot for r in module.layer}
    kind = checkpoint.config.get("model_type")
    table = tuple(modules)

    def sizes(config: Mapping[str, object]) -> Dims:
        del config
        return dict(dims)

    def all_modules(variant: Variant) -> tuple[Module, ...]:
        del variant
        return table

    def no_text(config: Mapping[str, object]) -> Mapping[str, object]:
        del config
        return {}

    return GenericFamily(
        name=converter.removesuffix("Converter"),
        converter=converter,
        model_types=frozenset({kind} if isinstance(kind, str) else ()),
        dims=sizes,
        modules=all_modules,
        text_config=no_text,
        carried=carried,
        variants=(Variant(),),
        canonical=False,
        form="DCP",
        rules=rules,
        slots=slots,
        files={f.path.name: tuple(t.name for t in f.tensors) for f in checkpoint.files},
    )


def keeps_dtype(name: str, dtype: str) -> bool:
    """Whether a tensor is in float32 among others in bfloat16 for a reason, and stays so."""
    return dtype == "F32" and name.endswith(("e_score_correction_bias", "expert_bias", ".A_log"))


AlikeExperts = dict[str, list[Expert]]


def _sorted(
    rules: Rules, tensors: Mapping[str, StoredTensor]
) -> tuple[list[str], dict[str, list[Expert]]]:
    """The names of tensors that go as they are; the others by the row that they form."""
    plain: list[str] = []
    experts: dict[str, list[Expert]] = {}
    for name, tensor in tensors.items():
        found = expert_of_rules(rules, name, tensor.shape)
        if found is None:
            plain.append(name)
        else:
            mm = found.hf if found.slot.merged else f"{found.hf}[{{expert}}]"
            experts.setdefault(mm, []).append(found)
    return plain, experts


def _groups(experts: Mapping[str, list[Expert]]) -> list[AlikeExperts]:
    """Rows by the stack of layers that they stand in and the number of experts there."""
    groups: dict[tuple[str, int], AlikeExperts] = {}
    for mm, found in experts.items():
        groups.setdefault((found[0].stem, _count(mm, found)), {})[mm] = found
    return list(groups.values())


def _count(mm: str, found: list[Expert]) -> int:
    """How many experts each layer has.

    Raises:
        TensorError: not the same number in each.
    """
    by_layer: dict[int, set[int]] = {}
    for one in found:
        by_layer.setdefault(one.layer, set()).add(one.experts)
    if not found[0].slot.merged:
        counts = {one.experts for one in found}
    else:
        counts = {len(numbers) for numbers in by_layer.values()}
        counts |= {max(numbers) + 1 for numbers in by_layer.values()}
    if len(counts) > 1:
        raise TensorError(
            f"{mm}: {min(counts)} experts in some layers, {max(counts)} in others",
            "the same number of experts in each, counted from 0",
            "download the weights again",
        )
    return counts.pop()


def _module(key: str, group: AlikeExperts, dims: Dims) -> Module:
    """The rows of experts in one stack of layers."""
    rows: list[Row] = []
    for mm, found in group.items():
        slot = found[0].slot
        layers = tuple(sorted({one.layer for one in found}))
        made = row(mm, found[0].hf, transposed=not slot.flat or slot.merged)
        rows.append(replace(made, layers=layers))
        dims[f"{key}.experts"] = _count(mm, found)
        dims[f"{key}.layers"] = max(dims.get(f"{key}.layers", 0), layers[-1] + 1)
    return Module(key, key, (), tuple(rows), ())

"""DCP tensors as those of a Hugging Face checkpoint: renamed, experts taken out of their stacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmconvert import converters
from mmconvert.converters.configs import Dims
from mmconvert.converters.family import Family, Variant
from mmconvert.converters.rows import Module, hf_templates
from mmconvert.errors import TensorError
from mmconvert.formats.dcp.generic import GenericFamily
from mmconvert.formats.dcp.naming import KNOWN_PREFIXES, PREFIXES, ExpertSlot, Naming
from mmconvert.formats.mm.instances import experts_of, instances
from mmconvert.names import EXPERT, fill, number, summarise
from mmconvert.stored import StoredTensor, expert_of, rows_of, stacked, transpose, transpose_each

NamedTensors = Mapping[str, StoredTensor]


def known_names(family: Family, names: Sequence[str], variant: Variant | None = None) -> str | None:
    """The prefix under which a family's Hugging Face names stand; None if they do not, all of
    them.

    Args:
        variant: of the model, where it is known.
    """
    tables = [hf_templates(family.modules(one)) for one in _variants(family, variant)]

    def knows(name: str) -> bool:
        hub = family.hub_name(name)
        return bool(
            any(table.find(hub) for table in tables)
            or family.why_carried(hub)
            or family.why_dropped(hub)
        )

    for prefix in KNOWN_PREFIXES:
        inner = [name[len(prefix) :] for name in names if name.startswith(prefix)]
        if inner and len(inner) == len(names) and all(map(knows, inner)):
            return prefix
    return None


def closest_variant(family: Family, names: Sequence[str]) -> Variant:
    """The variant whose table knows most of the names."""
    tables = {one: hf_templates(family.modules(one)) for one in family.variants}
    hub = [family.hub_name(name) for name in names]
    return max(tables, key=lambda one: sum(tables[one].find(name) is not None for name in hub))


def _variants(family: Family, variant: Variant | None) -> Sequence[Variant]:
    return family.variants if variant is None else (variant,)


def family_of_names(names: Sequence[str]) -> Family | None:
    """The one family that knows all names; None if there is none, or several."""
    families = {**converters.ms_registry(), **converters.registry()}
    found = [f for f in families.values() if known_names(f, names) is not None]
    return found[0] if len(found) == 1 else None


def default_naming(family: Family) -> Naming:
    """As the trainer of a family names tensors."""
    return Naming("model." + PREFIXES.get(family.converter, ""))


def as_hf(
    tensors: NamedTensors, family: Family, modules: Sequence[Module], dims: Dims, naming: Naming
) -> dict[str, StoredTensor]:
    """The tensors under names of the hub, with stacks as Hugging Face has them.

    Raises:
        TensorError: two tensors of one name, or experts that do not fit.
    """
    if isinstance(family, GenericFamily):
        return _by_rules(tensors, family, dims)
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(naming.prefix)
        found[family.hub_name(inner)] = tensor
    counts = experts_of(modules, dims)
    for item in instances(
        modules, {m.key: dims[f"{m.key}.layers"] for m in modules}, dict.fromkeys(counts, 1)
    ):
        if not item.row.of_expert:
            continue
        for template, name in zip(item.row.hf, item.hf_names(), strict=True):
            tensor = found.get(name)
            if tensor is not None and EXPERT not in template and len(tensor.shape) == 2:
                found[name] = _stack(tensor, counts[item.module.key])
    return found


def _stack(tensor: StoredTensor, experts: int) -> StoredTensor:
    if not experts or tensor.shape[0] % experts:
        raise TensorError(
            f"{tensor.name} is {list(tensor.shape)}; config.json says {experts} experts",
            f"the rows of {experts} experts one below the other",
            "give the hf_dir of this model",
        )
    return stacked(tensor, experts)


def _by_rules(tensors: NamedTensors, family: GenericFamily, dims: Dims) -> dict[str, StoredTensor]:
    """By the rules of a trainer; each Hugging Face tensor must be there."""
    modules = family.table(family.variants[0])
    found: dict[str, StoredTensor] = {}
    used: set[str] = set()
    missing: dict[str, None] = {}
    layers = {m.key: dims[f"{m.key}.layers"] for m in modules}
    counts = experts_of(modules, dims)
    for item in instances(modules, layers, counts):
        slot = family.slots.get(item.row.mm)
        name = item.hf_names()[0]
        flat = family.rules.naming.dcp(name) if slot is None else fill(slot.name, item.layer)
        if flat not in tensors:
            missing |= {} if item.row.tied_to else {flat: None}
            continue
        used.add(flat)
        tensor = tensors[flat]
        if slot is None:
            found[name] = tensor._replace(name=name)
        elif slot.merged or name not in found:
            found[name] = _taken(tensor, slot, counts[item.module.key], item.expert)._replace(
                name=name
            )
    if missing:
        raise TensorError(
            f"{number(missing, 'tensor')} of the original model not in the checkpoint: "
            f"{summarise(missing)}",
            f"every tensor that {family.converter} writes",
            "take the checkpoint of the whole model, with the prefixes that it was written with; "
            "or leave tensors out by name, with --drop",
        )
    if beyond := [name for name in tensors if name not in used]:
        raise TensorError(
            f"{number(beyond, 'tensor')} that the original model does not have: "
            f"{summarise(beyond)}",
            "tensors of the original model only",
            "leave them out by name, with --drop",
        )
    return found


def _taken(tensor: StoredTensor, slot: ExpertSlot, experts: int, expert: int) -> StoredTensor:
    """What a slot holds, as Hugging Face has it: one expert's matrix, or their stack."""
    stack = _stack(tensor, experts) if len(tensor.shape) == 2 else tensor
    if len(stack.shape) != 3 or stack.shape[0] != experts or stack.shape[2] % slot.columns:
        raise TensorError(
            f"{tensor.name} is {list(tensor.shape)}; the original model has {experts} experts",
            "the stacked matrices of all experts",
            "give the folder of the original model",
        )
    if not slot.merged:
        return stack if slot.flat else transpose_each(stack)
    rows = stack.shape[2] // slot.columns
    return rows_of(transpose(expert_of(stack, expert)), slot.column * rows, rows)

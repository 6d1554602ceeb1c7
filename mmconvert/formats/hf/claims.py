"""Which row claims each tensor of an HF checkpoint, by its name on the hub; the others by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mmconvert.causes.tensors import unusable
from mmconvert.config import Options
from mmconvert.converters.family import Family
from mmconvert.converters.rows import OUTPUT_LAYER, Module, hf_templates
from mmconvert.errors import LEAVE_OUT, CheckpointError, FormError, TensorError
from mmconvert.formats.faults import STRICT, Faults
from mmconvert.formats.hf.folder import HFCheckpoint
from mmconvert.formats.model import Notes, dropped_by, drops_too_much
from mmconvert.names import number, summarise
from mmconvert.stored import StoredTensor

CLOSEST = 20  # names for which the closest known one is looked for: it takes a while


def by_hub_name(
    family: Family, checkpoint: HFCheckpoint, faults: Faults = STRICT
) -> dict[str, StoredTensor]:
    """The tensors by their names on the hub; two of one name are a fault."""
    found: dict[str, StoredTensor] = {}
    other: list[StoredTensor] = []
    for tensor in (t for file in checkpoint.files for t in file.tensors):
        name = family.hub_name(tensor.name)
        other += [] if name.endswith(tensor.name) else [tensor]  # a prefix alone is no spelling
        if name in found:
            fault = TensorError(
                f"{tensor.name} in {tensor.path} and {found[name].name} in "
                f"{found[name].path.name} are the same tensor of the model",
                "one spelling of each name",
                "keep one of them: download the weight files from one revision of the model",
                cause="duplicate-tensor",
                path=tensor.path,
                tensors=[tensor.name],
            )
            faults.add(fault)
        found[name] = tensor
    if other:
        faults.remark(_other_spelling(family, checkpoint, other))
    return found


def _other_spelling(
    family: Family, checkpoint: HFCheckpoint, other: Sequence[StoredTensor]
) -> CheckpointError:
    version = checkpoint.config.get("transformers_version")
    wrote = f"; config.json says {version}" if isinstance(version, str) else ""
    return CheckpointError(
        f"{len(other)} of {sum(len(f.tensors) for f in checkpoint.files)} tensors are named as "
        f"transformers 4.52 and later name them, not as on the hub: {other[0].name} for "
        f"{family.hub_name(other[0].name)}{wrote}",
        fix="nothing: both are read, and mm_to_hf writes the names of its hf_dir",
        cause="other-spelling",
        path=other[0].path,
        tensors=[other[0].name],
    )


def hf_form_of(
    family: Family,
    table: tuple[Module, ...],
    tensors: Mapping[str, StoredTensor],
    config: Mapping[str, object],
    folder: Path,
) -> FormError | None:
    """Why tensors, by their names on the hub, are no plain weights of the family's model."""
    index = hf_templates(table)
    elsewhere = {n for n in tensors if family.why_dropped(n) or family.why_carried(n)}
    return unusable(
        {name: t for name, t in tensors.items() if name not in elsewhere},
        lambda name: bool(index.find(name) or family.why_carried(name)),
        config,
        folder,
    )


def claim_hf(
    family: Family,
    table: tuple[Module, ...],
    tensors: Mapping[str, StoredTensor],
    options: Options,
    notes: Notes,
    faults: Faults,
) -> dict[str, StoredTensor]:
    """The tensors that have a row; the others are named in notes, or are an error."""
    index = hf_templates(table)
    kept: dict[str, StoredTensor] = {}
    lost: dict[str, StoredTensor] = {}
    reasons: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        pattern = dropped_by((name, tensor.name), options.drop)
        why = f"--drop {pattern}" if pattern else family.why_dropped(name)
        if pattern and (hit := index.find(name)) and hit[0].mm != OUTPUT_LAYER:
            raise drops_too_much(pattern, tensor.name)
        if why:
            reasons.setdefault(why, []).append(tensor.name)
        elif index.find(name):
            kept[name] = tensor
        else:
            closest = index.closest(name) if len(lost) < CLOSEST else ""
            lost[tensor.name + (f" (closest known name: {closest})" if closest else "")] = tensor
    if lost:
        first = lost[min(lost)]
        names = [n for n in tensors if n not in kept and not index.find(n)]
        if _of_other_model(family, names):
            raise CheckpointError(
                f"{number(names, 'tensor')} of another {family.name} than that of config.json: "
                f"{summarise(sorted(names))}",
                "weights and config.json of one model",
                "use the config.json and the weight files of one download",
                cause="other-model",
                path=first.path,
            )
        fault = TensorError(
            f"{number(lost, 'tensor')} with no place in {family.form}: {summarise(lost)}",
            f"only tensors of {family.name}",
            LEAVE_OUT,
            cause="unknown-tensor",
            path=first.path,
            tensors=sorted(t.name for t in lost.values()),
        )
        faults.add(fault)
    for why, names in reasons.items():
        notes.drop(why, names)
    return kept


def _of_other_model(family: Family, names: Sequence[str]) -> bool:
    """Whether another model of the family has tensors of these names."""
    tables = (hf_templates(family.modules(v)) for v in family.variants)
    return any(all(table.find(name) for name in names) for table in tables)

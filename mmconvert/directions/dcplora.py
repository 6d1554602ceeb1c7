"""Adapters in DCP folders of FSDP2 trainers: written for training, merged after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mmconvert.adapters import MM_A, MM_B, PREFIX, WEIGHT, parse_key
from mmconvert.config import Options
from mmconvert.convert import convert
from mmconvert.errors import CheckpointError, TensorError
from mmconvert.events import Events
from mmconvert.executor.apart import check_apart
from mmconvert.formats.base import Placed
from mmconvert.formats.containers.image import small
from mmconvert.formats.dcp.folder import RELEASE, TRACKER, open_dcp
from mmconvert.formats.dcp.format import VERSION_3, Shards
from mmconvert.formats.dcp.generic import GenericFamily, generic_family
from mmconvert.formats.dcp.naming import Naming, Rules
from mmconvert.formats.dcp.output import folder_images, sharded, whole_pieces
from mmconvert.formats.peft.files import read_file
from mmconvert.formats.reading import watched
from mmconvert.formats.wholes import verbatim
from mmconvert.names import NO_EXPERT, number, summarise
from mmconvert.plan.build import build
from mmconvert.plan.parts import whole_of
from mmconvert.plan.plan import Block, Term
from mmconvert.plan.products import Adapter, Delta
from mmconvert.request import End, Request
from mmconvert.result import Result
from mmconvert.run import Conversion
from mmconvert.stored import StoredTensor


@dataclass(frozen=True)
class AdapterToDCP:
    """An adapter that is to be written to DCP.

    Attributes:
        adapter: PEFT's folder, or its file.
        out: what is written.
        naming: of the trainer's model.
        ranks: over which tensors are divided.
    """

    adapter: Path
    out: Path
    naming: Naming
    ranks: int = 1


@dataclass(frozen=True)
class MergeDCP:
    """A merge that is asked for.

    Attributes:
        base, lora, out: the base model, the DCP folder with the adapter, what is written.
        ends: of the names of all adapted modules; empty for any.
        scaling: what B A is multiplied with; None is 1, and said.
    """

    base: Path
    lora: Path
    out: Path
    ends: tuple[str, ...] = ()
    scaling: float | None = None


@watched
def to_dcp(
    asked: AdapterToDCP, options: Options | None = None, events: Events | None = None
) -> Result:
    """An adapter of PEFT as its FSDP2 trainer names it; every tensor keeps its bytes.

    Raises:
        MMConvertError: see the error tree; nothing is left under the final name.
    """
    run = Conversion("lora_hf_to_dcp", asked, asked.out, options, events)
    check_apart(asked.out, [asked.adapter])
    tensors = read_file(asked.adapter)[0].tensors
    src, dst = verbatim(((_trained_name(t, asked.naming), t) for t in tensors), asked.adapter)
    written = whole_pieces(dst.targets, {})
    if asked.ranks > 1:
        dst, written = sharded(dst, asked.ranks)
    plan = run.prove(build(src, dst))
    images = [
        *folder_images(RELEASE, written, dst.targets, VERSION_3),
        small(TRACKER, RELEASE.encode(), pointer=True),
    ]
    result = Result(asked.out, False, plan, Shards(ranks=asked.ranks), 0.0, tuple(images))
    return run.write(result, Placed(side=dst), {"kind": "dcp"}, [asked.adapter])


def _trained_name(tensor: StoredTensor, naming: Naming) -> str:
    """The flat name of an adapter's tensor: PEFT's own, with the name of the adapter in it."""
    key = parse_key(tensor.name)
    if key is None:
        return naming.dcp(tensor.name.removeprefix(PREFIX))
    return naming.dcp(f"{key.module.removeprefix(PREFIX)}.{key.kind}.default{key.leaf}")


@watched
def merge(
    converter: str,
    asked: MergeDCP,
    naming: Naming,
    options: Options | None = None,
    events: Events | None = None,
) -> Result:
    """Base model and adapter -> Hugging Face: products in float32, each sum rounded once.

    Raises:
        CheckpointError: no adapter there; TensorError: modules that the base does not have.
    """
    family = generic_family(converter, asked.base, Rules(naming))
    adapter = _adapter(asked, family)
    request = Request(
        "merge_mm_lora_dcp_weight_to_base_hf",
        End("hf", asked.base),
        End("hf", asked.out),
        original=asked.base,
        cfg=asked,
        adapters=(adapter,),
    )
    return convert(family, request, options, events)


def _adapter(asked: MergeDCP, family: GenericFamily) -> Adapter:
    """The adapter of a DCP folder: by the names of the base model."""
    tensors = open_dcp(asked.lora).tensors
    weights = {family.rules.naming.dcp(row.hf[0]): row.hf[0] for row in _rows(family)}
    found, halves = Adapter(str(asked.lora)), _halves(tensors)
    if not halves:
        raise CheckpointError(
            f"{asked.lora}: no tensor is a matrix of an adapter: {summarise(tensors, 2)}",
            f"names that end in {MM_A} and {MM_B}",
            "give the folder of a LoRA training",
        )
    factor = 1.0 if asked.scaling is None else asked.scaling
    for module, (a, b) in halves.items():
        weight = weights.get(module + WEIGHT)
        if weight is None:
            raise TensorError(
                f"{asked.lora}: {module} is adapted, and {asked.base} has no such weight",
                "an adapter of this model, with the converter of its trainer",
                "give the base model's own converter and folder",
            )
        if asked.ends and not module.endswith(asked.ends):
            raise CheckpointError(
                f"{asked.lora}: {module} is adapted, and is none of --lora_target_modules "
                f"{','.join(asked.ends)}: it would be lost",
                "the ends of the names of all adapted modules",
                "leave the flag out: all that the adapter holds is merged",
            )
        found.deltas.append(Delta(weight, NO_EXPERT, _term(found, module, (a, b), factor)))
    found.notes += _notes(asked, tensors, halves)
    return found


def _rows(family: GenericFamily):  # noqa: ANN202 - an iterator of rows
    return (row for module in family.table(family.variants[0]) for row in module.all_rows())


def _halves(tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """A and B by the flat name of their module."""
    found: dict[str, tuple[StoredTensor, StoredTensor]] = {}
    for name, a in tensors.items():
        module = name.removesuffix(MM_A)
        if module == name and not name.endswith(MM_B):
            continue
        module = module.removesuffix(MM_B)
        pair = tensors.get(module + MM_A), tensors.get(module + MM_B)
        if pair[0] is None or pair[1] is None:
            raise TensorError(
                f"{a.path}: {name} is unpaired", "A and B of every module that is adapted"
            )
        if len(pair[0].shape) != 2 or pair[1].shape[1:] != pair[0].shape[:1]:
            raise TensorError(
                f"{name}: A is {list(pair[0].shape)}, B {list(pair[1].shape)}",
                "B with as many columns as A has rows",
            )
        found[module] = pair[0], pair[1]
    return found


def _term(
    found: Adapter, module: str, pair: tuple[StoredTensor, StoredTensor], factor: float
) -> Term:
    blocks: list[tuple[Block, ...]] = []
    for tensor in pair:
        blocks.append(tuple(whole_of(tensor, len(found.stored)).copies[0]))
        found.stored += [part.tensor for part in tensor.parts] or [tensor]
    (rank, cols), rows = pair[0].shape, pair[1].shape[0]
    return Term(module, blocks[0], blocks[1], rank, rows, cols, factor)


def _notes(
    asked: MergeDCP,
    tensors: Mapping[str, StoredTensor],
    halves: Mapping[str, tuple[StoredTensor, StoredTensor]],
) -> list[str]:
    """What is worth knowing of a merge."""
    notes: list[str] = []
    others = [n for n in tensors if n.removesuffix(MM_A).removesuffix(MM_B) not in halves]
    if others:
        notes.append(
            f"warning: {number(others, 'tensor')} beside the adapter, not merged; the base is "
            f"taken from {asked.base}: {summarise(others)}"
        )
    if asked.scaling is None:
        ranks = sorted({a.shape[0] for a, _ in halves.values()})
        notes.append(
            "warning: --scaling is not given: 1, as MindSpeed-MM takes it; training scales by "
            f"lora_alpha / r (r is {', '.join(map(str, ranks))} here)"
        )
    return notes

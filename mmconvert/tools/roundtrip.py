"""A checkpoint in another format and back, without writing anything: what would come back.

Both plans are made and proven as a conversion makes them. Joined in the tensors between them,
which never exist, they say of every byte that would come back where it was read; those bytes are
digested, and the digests compared with those of the original tensors.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmconvert.adapters import HF_B
from mmconvert.config import Options
from mmconvert.converters.family import Family
from mmconvert.errors import LayoutError, MMConvertError, RequestError
from mmconvert.events import Events
from mmconvert.executor import compare
from mmconvert.executor.digests import digests
from mmconvert.formats.base import Described, Format, NoLayout, Opening, Placing, StoredCheckpoint
from mmconvert.formats.hf.model import config_model
from mmconvert.formats.hf.side import hf_target
from mmconvert.formats.peft.files import named_base
from mmconvert.formats.reading import steady
from mmconvert.formats.registry import load, of_naming, recognise
from mmconvert.names import NO_LAYER
from mmconvert.plan.build import build, in_dtype
from mmconvert.plan.joined import join_plans
from mmconvert.plan.plan import Block, Key, Plan, Whole, matrix
from mmconvert.plan.proof import prove
from mmconvert.stored import StoredTensor, Target

NOWHERE = Path("not written")


@dataclass(frozen=True)
class LayoutOutcome:
    """What one layout gave.

    Attributes:
        name: of the layout.
        layout: the layout; None if it is not possible for this model.
        tensors, nbytes: that came back.
        unequal: names of tensors that came back with other bytes.
        skipped: why the layout was left out; "" if it was not.
        seconds: wall time.
    """

    name: str
    layout: Described | None
    tensors: int
    nbytes: int
    unequal: tuple[str, ...]
    skipped: str
    seconds: float


@steady
def roundtrip(
    family: Family,
    hf_dir: Path,
    layouts: Sequence[tuple[str, object]],
    options: Options | None = None,
    events: Events | None = None,
    base: Path | None = None,
    through: str = "",
) -> list[LayoutOutcome]:
    """Sends a checkpoint of any format through layouts of another and back.

    Args:
        hf_dir: the checkpoint; an adapter of PEFT too.
        base: the original Hugging Face model, where the checkpoint is another; of an adapter else
            that which adapter_config.json names.
        layouts: names and layouts; none takes a few representative ones, as far as the model
            allows them.
        through: the name of the format; "" is that of the family's table.

    Raises:
        LayoutError: a given layout that is impossible.
        MMConvertError: a checkpoint that cannot be read.
    """
    options, events = options or Options(), events or Events()
    kind = load(through or of_naming(family.naming))
    source, original = _open(family, hf_dir, options, base, kind)
    planned = [
        _plan(source, original, kind, name, given, must=bool(layouts))
        for name, given in layouts or kind.samples(source.model)
    ]
    workers = options.workers
    stored = source.side(as_hf=kind.as_hf(family, None)).stored
    before = digests(_straight(stored), stored, workers, events)
    outcomes: list[LayoutOutcome] = []
    for name, found in planned:
        began = time.monotonic()
        if isinstance(found, MMConvertError):
            outcomes.append(LayoutOutcome(name, None, 0, 0, (), str(found.what), 0.0))
            continue
        layout, plan = found
        differing = compare.compare(plan.replicas, plan.sources, plan.sources, workers)
        back = digests(_gathered(plan), plan.sources, workers, events)
        unequal = {n for n, digest in before.items() if back.get(n) != digest}
        unequal |= {d.a.name for d in differing}
        seconds = time.monotonic() - began
        outcomes.append(
            LayoutOutcome(name, layout, len(back), plan.nbytes, tuple(sorted(unequal)), "", seconds)
        )
    return outcomes


def _open(
    family: Family, path: Path, options: Options, base: Path | None, kind: Format
) -> tuple[StoredCheckpoint, StoredCheckpoint | None]:
    """The checkpoint, and the Hugging Face checkpoint of its model where that is needed.

    Raises:
        RequestError: a format that the checkpoint has already, or no original where one is needed.
    """
    form = recognise(path) or "hf"
    if kind.naming and kind.naming not in family.namings:
        raise RequestError(f"{family.name} cannot be stored as {kind.title}", "another format")
    if form == "peft":
        return _adapter(family, path, options, base), None
    if form == kind.name:
        raise RequestError(
            f"{path} is in the format {form} itself",
            "another format",
            "name another with --through",
        )
    if form == "hf":
        if base is not None:
            raise RequestError(
                f"--hf_dir is the original of a checkpoint in another format, which {path} is not",
                "an adapter, or a DCP or torch_dist folder",
                "leave --hf_dir out",
            )
        found = load("hf").open(path, Opening(family, options))
        return found, found
    if base is None:
        raise RequestError(
            f"{path} does not tell all sizes of its model", "the original model", "give --hf_dir"
        )
    original = load("hf").open(base, Opening(family, options))
    return load(form).open(path, Opening(family, options, like=original.model)), original


def _adapter(family: Family, path: Path, options: Options, base: Path | None) -> StoredCheckpoint:
    """An adapter of PEFT.

    Raises:
        RequestError: one without its base model, or whose rank would grow.
    """
    folder = base or named_base(path)
    if folder is None:
        raise RequestError(
            f"{path} is an adapter, and the sizes of its base model are not known",
            "the base model's folder, with its config.json",
            "give --hf_dir",
        )
    found = load("peft").open(path, Opening(family, options, like=config_model(family, folder)))
    ranks = {tensor.shape[1] for tensor in found.side().stored if tensor.name.endswith(HF_B)}
    rank = found.model.adapter.settings.r if found.model.adapter else 0
    if rank > max(ranks, default=rank):
        raise RequestError(
            f"{path}: {family.name} packs layers that have an A of their own: in MM format the "
            f"adapter has rank {rank}, and comes back with it, equal as products",
            "an adapter that comes back with the same bytes",
            "convert it with lora_hf_to_mm, and compare both with verify",
        )
    return found


def _plan(
    source: StoredCheckpoint,
    original: StoredCheckpoint | None,
    kind: Format,
    name: str,
    given: object,
    *,
    must: bool,
) -> tuple[str, tuple[Described, Plan] | MMConvertError]:
    """The joined plan of one layout, or why there is none."""
    path, side = (
        Path(kind.file_name(given)),
        source.side(as_hf=kind.as_hf(source.model.family, None)),
    )
    wholes = in_dtype(side.wholes, "")
    asked = Placing(source, wholes, path, given, "", Options(), original=original)
    try:
        placed = kind.place(asked)
        there = build(side, placed.side)
    except LayoutError as error:
        if must:
            raise
        return name, error
    prove(there)
    stored = [
        StoredTensor(t.name, t.dtype, t.shape, NOWHERE, i) for i, t in enumerate(there.targets)
    ]
    back_side = kind.read_back(stored, placed, asked)
    back = build(back_side, hf_target(side, back_side.wholes))
    prove(back)
    number = [tensor.offset for tensor in back_side.stored]  # of the target that it is
    return name, (placed.layout or NoLayout(), join_plans(there, back, number))


def _straight(stored: Sequence[StoredTensor]) -> dict[Key, Whole]:
    """Every tensor as it stands."""
    return {
        key: Whole(t.shape, t.dtype, [[Block(i, 0, 0, 0, 0, *matrix(t.shape))]])
        for i, (key, t) in enumerate(zip(_keys(stored), stored, strict=True))
    }


def _gathered(plan: Plan) -> dict[Key, Whole]:
    """Every target as it would be put together."""
    blocks: dict[int, list[Block]] = defaultdict(list)
    for c in plan.copies:
        blocks[c.dst].append(
            Block(c.src, c.src_row, c.src_col, c.dst_row, c.dst_col, c.rows, c.cols)
        )
    return {
        key: Whole(t.shape, t.dtype, [blocks[i]])
        for i, (key, t) in enumerate(zip(_keys(plan.targets), plan.targets, strict=True))
    }


def _keys(tensors: Iterable[StoredTensor | Target]) -> Iterator[Key]:
    """A name for each; the pieces of a divided tensor, which share one, are counted."""
    seen: dict[str, int] = defaultdict(int)
    for tensor in tensors:
        seen[tensor.name] += 1
        count = seen[tensor.name]
        yield Key(tensor.name if count == 1 else f"{tensor.name} (piece {count})", NO_LAYER)

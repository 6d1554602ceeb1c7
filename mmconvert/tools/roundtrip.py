"""Hugging Face -> MM or MindSpore, and back, without writing anything: what would come back.

Both plans are made and proven as a conversion makes them. Joined in the tensors of the rank files,
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
from mmconvert.executor.jobs import default_workers
from mmconvert.formats.base import Described, Format, NoLayout, Opening, Placing, StoredCheckpoint
from mmconvert.formats.hf.model import config_model
from mmconvert.formats.hf.side import hf_target
from mmconvert.formats.peft.folder import named_base
from mmconvert.formats.reading import steady
from mmconvert.formats.registry import load, of_naming, recognise
from mmconvert.names import NO_LAYER
from mmconvert.plan.plan import (
    Block,
    Comparison,
    Copy,
    Key,
    Plan,
    Side,
    Whole,
    build,
    in_dtype,
    matrix,
)
from mmconvert.plan.proof import Rect, covers, prove
from mmconvert.stored import StoredTensor

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
) -> list[LayoutOutcome]:
    """Sends a checkpoint, or an adapter of PEFT, through layouts and back.

    Args:
        base: the model that an adapter is of; else that which adapter_config.json names.
        layouts: names and layouts; none takes a few representative ones, as far as the model
            allows them.

    Raises:
        LayoutError: a given layout that is impossible.
        MMConvertError: a checkpoint that cannot be read.
    """
    options, events = options or Options(), events or Events()
    hf = _open(family, hf_dir, options, base)
    kind, side = load(of_naming(family.naming)), hf.side()
    planned = [
        _plan(hf, side, kind, name, given, must=bool(layouts))
        for name, given in layouts or kind.samples(hf.model)
    ]
    workers = options.workers or default_workers()
    original = digests(_straight(side.stored), side.stored, workers, events)
    outcomes: list[LayoutOutcome] = []
    for name, found in planned:
        began = time.monotonic()
        if isinstance(found, MMConvertError):
            outcomes.append(LayoutOutcome(name, None, 0, 0, (), str(found.what), 0.0))
            continue
        layout, plan = found
        differing = compare.compare(plan.replicas, plan.sources, plan.sources, workers)
        back = digests(_gathered(plan), plan.sources, workers, events)
        unequal = {n for n, digest in original.items() if back.get(n) != digest}
        unequal |= {d.a.name for d in differing}
        seconds = time.monotonic() - began
        outcomes.append(
            LayoutOutcome(name, layout, len(back), plan.nbytes, tuple(sorted(unequal)), "", seconds)
        )
    return outcomes


def _open(family: Family, path: Path, options: Options, base: Path | None) -> StoredCheckpoint:
    """A Hugging Face checkpoint, or an adapter.

    Raises:
        RequestError: an adapter without its base model, or one whose rank would grow.
    """
    if recognise(path) != "peft":
        if base is not None:
            raise RequestError(
                f"--hf_dir is the base model of an adapter; {path} is none",
                "an adapter of PEFT",
                "leave --hf_dir out",
            )
        return load("hf").open(path, Opening(family, options))
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
    hf: StoredCheckpoint, side: Side, kind: Format, name: str, given: object, *, must: bool
) -> tuple[str, tuple[Described, Plan] | MMConvertError]:
    """The joined plan of one layout, or why there is none."""
    path = Path(kind.file_name(given))
    asked = Placing(hf, in_dtype(side.wholes, ""), path, given, "", Options())
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


def join_plans(there: Plan, back: Plan, number: Sequence[int]) -> Plan:
    """What two plans do one after the other, as one plan.

    Args:
        number: for each source of ``back``, which target of ``there`` it is.

    Raises:
        MMConvertError: bytes that ``back`` reads and ``there`` does not write.
    """
    written: dict[int, list[Copy]] = defaultdict(list)
    for c in there.copies:
        written[c.dst].append(c)
    filled: dict[int, list[Rect]] = defaultdict(list)
    for fill in there.fills:
        filled[fill.tensor].append(Rect(*fill[2:]))
    for zero in back.zeros:
        inside = [_cut(r, Rect(*zero[2:])) for r in filled[number[zero.tensor]]]
        if not covers([r for r in inside if r], zero.rows, zero.cols, once=False):
            raise MMConvertError(f"{zero.key.name()} holds values where zeros are expected")
    copies = [
        found
        for c in back.copies
        for found in _through(written[number[c.src]], c._replace(src=number[c.src]))
    ]
    replicas = [*there.replicas, *_replicas(written, back, number)]
    plan = Plan(there.sources, back.targets, copies, replicas)
    prove(plan)
    return plan


def _through(written: Iterable[Copy], read: Copy) -> Iterator[Copy]:
    """What a read of a written tensor reads in truth."""
    for w in written:
        row, col = max(w.dst_row, read.src_row), max(w.dst_col, read.src_col)
        rows = min(w.dst_row + w.rows, read.src_row + read.rows) - row
        cols = min(w.dst_col + w.cols, read.src_col + read.cols) - col
        if rows > 0 and cols > 0:
            yield Copy(
                w.src,
                w.src_row + row - w.dst_row,
                w.src_col + col - w.dst_col,
                read.dst,
                read.dst_row + row - read.src_row,
                read.dst_col + col - read.src_col,
                rows,
                cols,
            )


def _replicas(
    written: dict[int, list[Copy]], back: Plan, number: Sequence[int]
) -> Iterator[Comparison]:
    """The comparisons of replicas that are not of one and the same bytes."""
    for key, c in back.replicas:
        for one in _through(written[number[c.src]], c._replace(src=number[c.src])):
            other = Copy(
                number[c.dst],
                one.dst_row,
                one.dst_col,
                one.src,
                one.src_row,
                one.src_col,
                one.rows,
                one.cols,
            )
            for both in _through(written[number[c.dst]], other):
                if both[:3] != both[3:6]:
                    yield Comparison(key, both)


def _cut(rect: Rect, frame: Rect) -> Rect | None:
    """The part of a rectangle inside a frame, seen from the frame's corner."""
    row, col = max(rect.row, frame.row), max(rect.col, frame.col)
    rows = min(rect.row + rect.rows, frame.row + frame.rows) - row
    cols = min(rect.col + rect.cols, frame.col + frame.cols) - col
    return Rect(row - frame.row, col - frame.col, rows, cols) if rows > 0 and cols > 0 else None


def _straight(stored: Sequence[StoredTensor]) -> dict[Key, Whole]:
    """Every tensor as it stands."""
    return {
        Key(t.name, NO_LAYER): Whole(t.shape, t.dtype, [[Block(i, 0, 0, 0, 0, *matrix(t.shape))]])
        for i, t in enumerate(stored)
    }


def _gathered(plan: Plan) -> dict[Key, Whole]:
    """Every target as it would be put together."""
    blocks: dict[int, list[Block]] = defaultdict(list)
    for c in plan.copies:
        blocks[c.dst].append(
            Block(c.src, c.src_row, c.src_col, c.dst_row, c.dst_col, c.rows, c.cols)
        )
    return {
        Key(t.name, NO_LAYER): Whole(t.shape, t.dtype, [blocks[i]])
        for i, t in enumerate(plan.targets)
    }

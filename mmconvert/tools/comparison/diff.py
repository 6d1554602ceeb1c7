"""How far apart are two checkpoints of one family? By tensor, by layer and by module.

Both are opened as for ``verify``. Where that asks whether every copy has the same bits, this
measures numbers: dtypes may differ, the first copy of each tensor counts, and tensors that only
one checkpoint has are listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmconvert.config import Options
from mmconvert.converters.rows import Row
from mmconvert.errors import CheckpointError, RequestError
from mmconvert.events import Events
from mmconvert.executor.differences import place as place_of
from mmconvert.executor.distance import NOTHING, Distance, distances, nbytes_of, pieces_of
from mmconvert.formats.contents import colours
from mmconvert.formats.model import idle_patterns
from mmconvert.formats.reading import steady
from mmconvert.names import NO_LAYER, number
from mmconvert.plan.plan import Block, Key, Whole, matrix
from mmconvert.stored import StoredTensor
from mmconvert.tools.comparison.diffresult import (
    NOT_CONVERTED,
    At,
    Diff,
    Facts,
    OtherShape,
    TensorDistance,
)
from mmconvert.tools.comparison.opened import Opened
from mmconvert.tools.comparison.pairing import open_pair
from mmconvert.tools.comparison.states import differing, kept_of, leave_out_steps

COPIES = (
    "of copies of one tensor (other tp ranks, tied embeddings) the first is compared; "
    "mm-convert verify compares them all"
)
QKV = (
    "all differences are in the vision encoder's linear_qkv: one checkpoint may leave its q, k "
    "and v uninterleaved; mm-convert verify tries that, --vit_qkv concatenated reads it so"
)


@steady
def diff(a: Path, b: Path, options: Options | None = None, events: Events | None = None) -> Diff:
    """Measures how far apart two checkpoints are, HF or MM, in any layouts of one family.

    Raises:
        MMConvertError: a checkpoint that cannot be read, or nothing that can be compared.
    """
    options, events = options or Options(), events or Events()
    if options.workers < 0:
        raise RequestError(f"--workers is {options.workers}", "a number of threads, or 0")
    left, right = open_pair(a, b, options)
    leave_out_steps(left, right)
    _check_structure(left, right)
    notes = _notes(left, right, options)
    notes += _add_carried(left, right)
    ours, theirs = left.side.wholes, right.side.wholes
    both = [key for key in ours if key in theirs]
    same = [key for key in both if ours[key].shape == theirs[key].shape]
    if not same:
        raise CheckpointError(f"{a} and {b} have no tensor of one shape", "two of one model")
    pieces = pieces_of(left.side, right.side, same)
    nbytes = nbytes_of(pieces, left.side.stored, right.side.stored)
    events.start("measuring", nbytes)
    stored = left.side.stored, right.side.stored
    measured = distances(pieces, *stored, options.workers, events.advance)
    places = _Places(left, right)
    tensors = [places.tensor(key, distance) for key, distance in measured.items()]
    found = Diff(
        _facts(left),
        _facts(right),
        tensors,
        [key.name() for key in ours if key not in theirs],
        [key.name() for key in theirs if key not in ours],
        [OtherShape(k.name(), ours[k].shape, theirs[k].shape) for k in both if k not in measured],
        nbytes,
        notes,
        places.colours,
        differing(left.training, right.training),
    )
    found.notes.extend(_findings(found))
    return found


def _check_structure(a: Opened, b: Opened) -> None:
    if a.model.variant.canonical != b.model.variant.canonical:
        one, other = (a, b) if a.model.variant.canonical else (b, a)
        raise CheckpointError(
            f"{one.path} keeps q, k, v and gate, up apart (enable_canonical_hf_struct), "
            f"{other.path} packs them",
            "two MM checkpoints of one structure, or an HF checkpoint on one side",
            "bring one to Hugging Face with mm_to_hf and compare that",
        )


def _notes(a: Opened, b: Opened, options: Options) -> list[str]:
    notes = [f"{side.path}: {note}" for side in (a, b) for note in side.model.notes]
    notes += idle_patterns(options, a.model, b.model)
    wholes = [whole for side in (a, b) for whole in side.side.wholes.values()]
    return notes + ([COPIES] if any(len(whole.copies) > 1 for whole in wholes) else [])


def _add_carried(a: Opened, b: Opened) -> list[str]:
    """Tensors that are not converted: compared between two HF checkpoints, else a note."""
    sides = [
        (side, [(Key(_hub_name(side, t), NO_LAYER), t) for t in side.model.carried])
        for side in (a, b)
    ]
    if a.format == b.format == "hf":
        for side, carried in sides:
            for key, tensor in carried:
                rows, cols = matrix(tensor.shape)
                block = Block(len(side.side.stored), 0, 0, 0, 0, rows, cols)
                side.side.stored.append(tensor)
                side.side.wholes[key] = Whole(tensor.shape, tensor.dtype, [[block]])
        return []
    return [
        f"{side.path}: {number(carried, 'tensor')} without a place in MM format not compared"
        for side, carried in sides
        if carried
    ]


def _hub_name(side: Opened, tensor: StoredTensor) -> str:
    return side.model.family.hub_name(tensor.name)


def _facts(side: Opened) -> Facts:
    sizes: dict[str, int] = {}
    for tensor in side.side.stored:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    dtypes = tuple(sorted(sizes, key=lambda dtype: -sizes[dtype]))
    family = side.model.family.name
    return Facts(side.path, side.format, family, dtypes, side.iteration)


def _findings(found: Diff) -> list[str]:
    notes: list[str] = []
    dtypes: dict[tuple[str, str], int] = {}
    for t in found.tensors:
        if t.dtype_a != t.dtype_b:
            dtypes[t.dtype_a, t.dtype_b] = dtypes.get((t.dtype_a, t.dtype_b), 0) + 1
    notes += [
        f"{count} of {number(found.tensors, 'tensor')} {'is' if count == 1 else 'are'} {a} in A "
        f"and {b} in B: compared as numbers"
        for (a, b), count in dtypes.items()
    ]
    notes += [f"training goes on otherwise: {line}" for line in found.training]
    odd = found.odd()
    if odd:
        notes.append(
            f"warning: NaN or infinite values in {number(odd, 'tensor')}, such as {odd[0].name}: "
            "these are counted, and are in no sum"
        )
    changed = found.changed()
    if changed and all("image_encoder" in t.name and "linear_qkv" in t.name for t in changed):
        notes.append(QKV)
    return notes


class _Places:
    """Names and places of wholes and their elements."""

    def __init__(self, a: Opened, b: Opened) -> None:
        self._a, self._b = a, b
        modules = (*a.model.modules, *b.model.modules)
        hues = colours(a.model.modules) | colours(b.model.modules)
        self.colours = {m.label: hues[m.key] for m in modules}
        self._rows: dict[str, tuple[str, str, Row]] = {}
        for module in (*b.model.modules, *a.model.modules):
            first = module.everywhere + module.before
            for layer, rows in (("in", first), ("", module.layer), ("out", module.after)):
                for r in rows:
                    projector = f"{module.label}.projector"
                    label = projector if r.mm.startswith(projector + ".") else module.label
                    self._rows[r.mm] = (label, layer, r)

    def tensor(self, key: Key, distance: Distance) -> TensorDistance:
        """A whole's distance with everything that has a name."""
        whole, other = self._a.side.wholes[key], self._b.side.wholes[key]
        kept, mm = kept_of(key)
        module, layer, r = self._rows.get(mm, (NOT_CONVERTED, "out", None))
        module += f", {kept}" if kept else ""
        at = distance.place
        return TensorDistance(
            *(key.name(), self._hf_names(key, r), module, layer or key.layer),
            *(whole.shape, whole.dtype, other.dtype, distance.totals),
            _at(self._a, at.tensor_a, at.index_a, at.a) if at else None,
            _at(self._b, at.tensor_b, at.index_b, at.b) if at else None,
            kept,
        )

    def _hf_names(self, key: Key, row: Row | None) -> tuple[str, ...]:
        for side in (self._a, self._b):
            if side.format == "hf":
                numbers = dict.fromkeys(block.tensor for block in side.side.wholes[key].copies[0])
                return tuple(side.side.stored[number].name for number in numbers)
        return tuple(row.hf_names(key.layer, key.expert)) if row else ()


def _at(side: Opened, number: int, index: Sequence[int], value: float) -> At:
    if number == NOTHING:
        return At("", (), value)
    tensor = side.side.stored[number]
    row, rest = index
    inner: list[int] = []
    for size in reversed(tensor.shape[1:]):
        rest, last = divmod(rest, size)
        inner.insert(0, last)
    return At(place_of(tensor), (row, *inner) if tensor.shape else (), value)

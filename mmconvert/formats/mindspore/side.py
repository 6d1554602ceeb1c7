"""MindSpore checkpoints as sides of a plan: what each device holds, by its tensor's slicing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mmconvert.errors import LayoutError, ReplicaError, TensorError
from mmconvert.formats.faults import STRICT, Faults
from mmconvert.names import number, summarise
from mmconvert.plan.plan import Block, Key, Side, Whole
from mmconvert.sharding.slices import Slicing, slice_parts
from mmconvert.sharding.spans import Span
from mmconvert.stored import StoredTensor, Target, transpose

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Spread:
    """Where every tensor lives.

    Attributes:
        stages: for each pipeline stage the slicings of its tensors, in the order of the file.
        devices: number of devices of one stage.
    """

    stages: Sequence[Mapping[Key, Slicing]]
    devices: int = 1

    @property
    def ranks(self) -> int:
        """Number of devices, each with a file of its own."""
        return self.devices * len(self.stages)


def whole_spread(shapes: Mapping[Key, Shape]) -> Spread:
    """Everything in one file."""
    return Spread([{key: Slicing((1,), ((),) * len(shape)) for key, shape in shapes.items()}])


class _Slice(NamedTuple):
    """What a rank holds of a tensor."""

    tensor: int
    box: tuple[Span, ...]


def device_target(wholes: Mapping[Key, Whole], spread: Spread) -> tuple[Side, list[list[int]]]:
    """A MindSpore checkpoint to be written, and for each rank the numbers of its targets.

    Raises:
        LayoutError: a tensor that its slicing does not divide, or that no stage holds.
    """
    side = Side()
    held: list[list[int]] = []
    slices: dict[Key, list[_Slice]] = {key: [] for key in wholes}
    for rank in range(spread.ranks):
        stage = spread.stages[rank // spread.devices]
        mine: list[int] = []
        for key, whole in wholes.items():
            if key not in stage:
                continue
            box = stage[key].box(whole.shape, rank % spread.devices, key.name())
            shape = tuple(span.length for span in box)
            mine.append(len(side.targets))
            slices[key].append(_Slice(len(side.targets), box))
            side.targets.append(Target(key.name(), whole.dtype, shape))
        held.append(mine)
    homeless = [key.name() for key, found in slices.items() if not found]
    if homeless:
        raise LayoutError(
            f"{number(homeless, 'tensor')} with a place on no device: {summarise(homeless)}",
            "a strategy that names every tensor",
            "give the strategy files of this very model, or leave tensors out with --drop 'NAME'",
        )
    for key, whole in wholes.items():
        copies = _copies(slices[key], whole.shape)
        side.wholes[key] = Whole(whole.shape, whole.dtype, copies)
    return side, held


def _copies(slices: Sequence[_Slice], shape: Shape) -> list[list[Block]]:
    """Complete sets of blocks; a slice that several ranks hold is in several of them."""
    seen: dict[tuple[Span, ...], int] = {}
    copies: list[list[Block]] = []
    for tensor, box in slices:
        turn = seen.get(box, 0)
        seen[box] = turn + 1
        if turn == len(copies):
            copies.append([])
        copies[turn] += [
            Block(tensor, 0, p.col, p.whole_row, p.whole_col, p.rows, p.cols)
            for p in slice_parts(box, shape)
        ]
    return copies


def device_source(
    parts: Sequence[Mapping[Key, StoredTensor]],
    spread: Spread,
    transposed: frozenset[str] = frozenset(),
    faults: Faults = STRICT,
) -> Side:
    """An existing MindSpore checkpoint as wholes.

    Args:
        parts: for each rank its tensors.
        faults: where those go after which reading goes on.
        transposed: templates of MM names whose wholes have the orientation of Hugging Face: seen
            transposed.

    Raises:
        TensorError: slices that are missing or do not fit together; ReplicaError: slices of one
            tensor in several shapes or dtypes.
    """
    side = Side()
    shapes: dict[Key, Shape] = {}
    slices: dict[Key, list[_Slice]] = {}
    for rank, tensors in enumerate(parts):
        stage = spread.stages[rank // spread.devices]
        missing = [key.name() for key in stage if key not in tensors]
        if missing:
            fault = TensorError(
                f"rank {rank}: {number(missing, 'tensor')} of the strategy missing: "
                f"{summarise(missing)}",
                "all tensors that the strategy names on the stage of this rank",
                "copy the rank folder again, or give the strategy files of this checkpoint",
            )
            faults.add(fault)
        for key, tensor in tensors.items():
            slicing = stage[key]
            shape = _whole_shape(tensor, slicing)
            first = shapes.setdefault(key, shape)
            whole = side.wholes.setdefault(key, Whole(first, tensor.dtype))
            if (shape, tensor.dtype) != (first, whole.dtype):
                fault = ReplicaError(
                    f"{tensor.name} in {tensor.path} is a slice of {tensor.dtype} {list(shape)}; "
                    f"ranks before it have {whole.dtype} {list(first)}",
                    "slices of one tensor on all ranks",
                    "copy the rank folders of one checkpoint, with its strategy files",
                )
                faults.add(fault)
                continue
            box = slicing.box(shape, rank % spread.devices, tensor.name)
            slices.setdefault(key, []).append(_Slice(len(side.stored), box))
            side.stored.append(tensor)
    for key, whole in side.wholes.items():
        whole.copies = _copies(slices[key], whole.shape)
        if key.mm in transposed and len(whole.shape) == 2:
            _turn(side, whole)
    return side


def _whole_shape(tensor: StoredTensor, slicing: Slicing) -> Shape:
    slicing.check(len(tensor.shape), f"{tensor.name} in {tensor.path}")
    shape = [n * slicing.parts(dim) for dim, n in enumerate(tensor.shape)]
    if shape:
        shape[0] *= slicing.optimizer_parts
    return tuple(shape)


def _turn(side: Side, whole: Whole) -> None:
    """Exchanges rows and columns of a whole and of the tensors that make it."""
    for tensor in {block.tensor for blocks in whole.copies for block in blocks}:
        side.stored[tensor] = transpose(side.stored[tensor])
    whole.shape = (whole.shape[1], whole.shape[0])
    whole.copies = [
        [Block(b.tensor, b.col, b.row, b.whole_col, b.whole_row, b.cols, b.rows) for b in blocks]
        for blocks in whole.copies
    ]

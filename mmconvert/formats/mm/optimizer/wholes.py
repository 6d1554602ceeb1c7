"""Optimizer state in a plan: further wholes, cut and joined exactly as the weights' are.

Adam is elementwise, so masters and moments of a parameter have its rectangles. The rows of the plan
are the weights' rows with other tensors in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mmconvert.errors import CheckpointError, RequestError
from mmconvert.formats.mm.optimizer.guesses import is_expert
from mmconvert.formats.mm.optimizer.state import (
    FIELDS,
    MASTER,
    PREFIX,
    STEP,
    GroupKey,
    Learnt,
    OptimizerState,
    state_key,
)
from mmconvert.plan.plan import Block, Comparison, Copy, Key, Side, Whole, matrix
from mmconvert.sharding.layout import Rank
from mmconvert.stored import StoredTensor, Target


def with_state(side: Side, state: OptimizerState) -> Side:
    """A side with the optimizer's wholes, and with the proof that they are of its weights.

    Raises:
        CheckpointError: a weight whose copies have not all the same state.
    """
    made = _Stateful(side, state)
    for key, whole in list(side.wholes.items()):
        made.add(key, whole)
    if left := [one for one in state.learnt if _place(one.weight) not in made.used]:
        raise RequestError(
            f"{left[0].weight.path}: the optimizer state of {left[0].name} belongs to none of the "
            "weights as they are read",
            "weights in the form in which they are stored",
            "leave --optimizer out: the weights alone are resplit",
        )
    return replace(side, stored=made.stored, wholes=made.wholes, rounded=made.rounded)


def groups_of(side: Side, state: OptimizerState) -> dict[Key, GroupKey]:
    """The group of each weight that learns.

    Raises:
        CheckpointError: copies of one weight in groups of two kinds.
    """
    made = _Stateful(side, state)
    found: dict[Key, GroupKey] = {}
    for key, whole in side.wholes.items():
        ones = [one for blocks in whole.copies for b in blocks if (one := made.of(b.tensor))]
        odd = [one for one in ones if one.group != ones[0].group]
        if odd:
            raise CheckpointError(
                f"{key.name()} is in groups of two kinds: {ones[0].weight.path}, "
                f"{odd[0].weight.path}",
                "the same learning settings for all copies of a tensor",
            )
        if ones:
            found[key] = ones[0].group
    return found


Place = tuple[Path, int, str]


def _place(tensor: StoredTensor) -> Place:
    """What a weight is told by."""
    return tensor.path, tensor.offset, tensor.name


class _Stateful:
    def __init__(self, side: Side, state: OptimizerState) -> None:
        self.stored, self.wholes = list(side.stored), dict(side.wholes)
        self.rounded = list(side.rounded)
        self._learnt = {_place(one.weight): one for one in state.learnt}
        self.used: set[Place] = set()
        self._bare = state.bare

    def add(self, key: Key, whole: Whole) -> None:
        """Adds what the optimizer keeps of one weight."""
        copies: list[list[tuple[Block, Learnt]]] = []
        for blocks in whole.copies:
            found = [(block, self.of(block.tensor)) for block in blocks]
            some = [(block, one) for block, one in found if one is not None]
            if some and len(some) < len(found):
                self._refuse(key, next(b for b, one in found if one is None))
            if some or not self._may_lack(blocks):
                copies.append(some)
        if not any(copies):
            return
        if not all(copies):
            self._refuse(key, whole.copies[copies.index([])][0])
        kept = {name for copy in copies for _, one in copy for name in one.fields}
        for name in sorted(kept):
            made = Whole(whole.shape if name != STEP else (), "F32", keeps_dtype=True)
            for copy in copies:
                made.copies += self._copies(key, name, copy)
            self.wholes[state_key(key, name)] = made

    def of(self, number: int) -> Learnt | None:
        """The parameter that a stored weight is."""
        return self._learnt.get(_place(self.stored[number]))

    def _may_lack(self, blocks: Sequence[Block]) -> bool:
        """Whether a copy is on ranks whose state another rank's file has."""
        return all(self.stored[b.tensor].path in self._bare for b in blocks)

    def _refuse(self, key: Key, block: Block) -> None:
        tensor = self.stored[block.tensor]
        raise CheckpointError(
            f"{tensor.name} in {tensor.path} has no optimizer state, other ranks have some for "
            f"{key.name()}",
            "the same parameters frozen on all ranks",
        )

    def _copies(
        self, key: Key, name: str, copy: Sequence[tuple[Block, Learnt]]
    ) -> list[list[Block]]:
        """One field of a parameter, as a copy of its whole; each step is a copy by itself."""
        numbers: dict[int, int] = {}
        blocks: list[Block] = []
        for block, one in copy:
            if name not in one.fields:
                raise CheckpointError(
                    f"{one.name} in {one.weight.path} has no {name}, other ranks have one",
                    "the same optimizer on all ranks",
                )
            if block.tensor not in numbers:
                numbers[block.tensor] = self._store(key, block.tensor, one, name)
            blocks.append(block._replace(tensor=numbers[block.tensor]))
        if name == STEP:
            return [[Block(number, 0, 0, 0, 0, 1, 1)] for number in numbers.values()]
        return [blocks]

    def _store(self, key: Key, weight: int, one: Learnt, name: str) -> int:
        """Adds a tensor; returns its number."""
        number = len(self.stored)
        self.used.add(_place(one.weight))
        tensor = one.fields[name]
        self.stored.append(tensor._replace(name=f"{PREFIX}{name}.{one.name}"))
        if name == MASTER:
            rows, cols = matrix(tensor.shape)
            self.rounded.append(Comparison(key, Copy(weight, 0, 0, number, 0, 0, rows, cols)))
        return number


@dataclass(frozen=True)
class PlacedState:
    """Where the optimizer state is to be written.

    Attributes:
        weights: how many of the targets are weights; the others follow them.
        fields: of a weight's number -> of what is kept of it, its number; nothing of a weight whose
            state another rank's file has.
        groups: of a weight's number -> its group.
    """

    weights: int
    fields: dict[int, dict[str, int]] = field(default_factory=dict[int, dict[str, int]])
    groups: dict[int, GroupKey] = field(default_factory=dict[int, GroupKey])


def place_state(
    side: Side, wholes: Mapping[Key, Whole], groups: Mapping[Key, GroupKey], ep: int, *, once: bool
) -> PlacedState:
    """Adds the targets of the optimizer to a side that has those of the weights.

    Args:
        wholes: what is to be written, the optimizer's wholes among that.
        groups: of the weights that learn.
        ep: expert-parallel size of the output.
        once: of expert-parallel ranks the first alone has what is no expert's.
    """
    placed = PlacedState(len(side.targets))
    for key, group in groups.items():
        if key not in side.wholes:
            continue
        expert = is_expert(key.mm) and ep > 1
        copies = side.wholes[key].copies
        placed.groups.update({b.tensor: group._replace(expert=expert) for c in copies for b in c})
        if once and not expert:
            copies = [c for c in copies if not all(_rank(side, b).ep for b in c)]
        for name in (*FIELDS, STEP):
            of = wholes.get(state_key(key, name))
            if of is not None:
                made = Whole(of.shape, of.dtype)
                side.wholes[state_key(key, name)] = made
                for copy in copies:
                    made.copies += _placed(side, placed, copy, name, of)
    return placed


def _rank(side: Side, block: Block) -> Rank:
    chunk = side.targets[block.tensor].chunk
    assert chunk is not None  # noqa: S101 - narrows the type of an MM target
    return chunk.rank


def _placed(
    side: Side, placed: PlacedState, copy: Sequence[Block], name: str, of: Whole
) -> list[list[Block]]:
    """One field of a parameter on the ranks that share one copy of it."""
    numbers: dict[int, int] = {}
    for block in copy:
        if block.tensor in numbers:
            continue
        numbers[block.tensor] = len(side.targets)
        weight = side.targets[block.tensor]
        shape = () if name == STEP else weight.shape
        side.targets.append(Target(f"{PREFIX}{name}.{weight.name}", of.dtype, shape, weight.chunk))
        placed.fields.setdefault(block.tensor, {})[name] = numbers[block.tensor]
    if name == STEP:
        return [[Block(number, 0, 0, 0, 0, 1, 1)] for number in numbers.values()]
    return [[block._replace(tensor=numbers[block.tensor]) for block in copy]]

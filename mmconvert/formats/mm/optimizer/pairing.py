"""Which moments belong to which weight: guesses by Megatron's rules, decided by shapes and values.

A file numbers its parameters and does not name them. So the numbers are tried with each rule by
which training may have grouped them and each part of the model that it may have left frozen; what
fits in number and shape stays, and the plan proves it: masters, rounded, are the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from mmconvert.errors import CheckpointError
from mmconvert.executor.compare import compare
from mmconvert.formats.mm.optimizer.buffers import BufferPlaces, observed, places
from mmconvert.formats.mm.optimizer.guesses import EMBEDDINGS, Guess, guesses
from mmconvert.formats.mm.optimizer.rankstate import ALONE, Buffer, Group, OptimizerEntry, RankState
from mmconvert.formats.mm.optimizer.state import MASTER, Buckets, GroupKey, Learnt
from mmconvert.names import NO_LAYER
from mmconvert.plan.plan import Comparison, Copy, Key, matrix
from mmconvert.sharding.layout import Chunk
from mmconvert.stored import ITEM_SIZE, StoredTensor

BUFFERS = ("expert_bias",)  # ends of the names of tensors that no gradient reaches
HALF = ("BF16", "F16")


class LearntParam(NamedTuple):
    """A parameter that is taken to learn."""

    chunk: Chunk
    name: str
    weight: StoredTensor
    group: GroupKey


class MismatchError(Exception):
    """Why a guess does not fit."""


def paired(ranks: Sequence[RankState]) -> tuple[list[Learnt], Buckets]:
    """The parameters that learn, with what the optimizer keeps of each; and its buckets.

    Raises:
        CheckpointError: no guess fits, or several do.
    """
    first = ""
    found: list[tuple[list[Learnt], Guess]] = []
    for guess in guesses(ranks):
        if guess.frozen and any(not other.frozen for _, other in found):
            break  # everything learns, and it fits
        try:
            learnt = [one for rank in ranks for one in _fit(rank, guess)]
            _check_groups(ranks, learnt)
        except MismatchError as error:
            first = first or str(error)
            continue
        if not any(_same(learnt, other) for other, _ in found):
            found.append((learnt, guess))
    if len(found) > 1:
        found = [(learnt, guess) for learnt, guess in found if proven(learnt)]
    if len(found) != 1:
        what = first if not found else f"{len(found)} ways fit"
        raise CheckpointError(
            f"which moments belong to which weights cannot be told: {what}",
            "an optimizer state saved with these very weights, in their order",
            f"was a tensor added, frozen or removed since? Else {ALONE}",
        )
    learnt, guess = found[0]
    return learnt, guess.buckets


def _same(a: Sequence[Learnt], b: Sequence[Learnt]) -> bool:
    return len(a) == len(b) and all(
        (one.weight, one.group, one.fields) == (two.weight, two.group, two.fields)
        for one, two in zip(a, b, strict=True)
    )


def proven(learnt: Sequence[Learnt]) -> bool:
    """Whether the masters, rounded, are the weights."""
    pairs = [(one.weight, one.fields[MASTER]) for one in learnt if MASTER in one.fields]
    sides = [list(side) for side in zip(*pairs, strict=True)] or [[], []]
    checks = [
        Comparison(Key(w.name, NO_LAYER), Copy(i, 0, 0, i, 0, 0, *matrix(w.shape)))
        for i, w in enumerate(sides[0])
    ]
    return not compare(checks, sides[0], sides[1], 1)


def _check_groups(ranks: Sequence[RankState], learnt: Sequence[Learnt]) -> None:
    """Every group has parameters somewhere."""
    groups = {group.key for rank in ranks for entry in rank.entries for group in entry.groups}
    if groups - {one.group for one in learnt}:
        raise MismatchError(f"{len(groups)} groups of parameters, of which some would be empty")


# -------------------------------------------------------------------------------- fitting
def _fit(rank: RankState, guess: Guess) -> list[Learnt]:
    """The parameters of a rank file by a guess.

    Raises:
        MismatchError: it does not fit.
    """
    params = list(_params(rank, guess))
    if not rank.entries:
        if params and not guess.named:
            raise MismatchError(
                f"{rank.pt.path} has no optimizer state, and {params[0].name} learns"
            )
        return []
    if rank.kind == "distributed":
        return _fit_buffers(rank, params, guess.buckets)
    return _fit_groups(rank, params)


def _params(rank: RankState, guess: Guess) -> Iterator[LearntParam]:
    """What learns in a rank file, in the order of its names; one of two that are one tensor."""
    views = rank.views if rank.kind == "distributed" else frozenset[StoredTensor]()
    seen: set[tuple[int, int]] = set()
    for chunk, weights in rank.chunks.items():
        for name, weight in weights.items():
            region = (weight.offset, weight.nbytes)
            if region in seen or (views and weight not in views):
                continue
            if not views and (name.startswith(guess.frozen) or name.endswith(BUFFERS)):
                continue
            seen.add(region)
            yield LearntParam(chunk, name, weight, guess.key(name, weight))


def _check_keys(
    rank: RankState, params: Sequence[LearntParam]
) -> dict[GroupKey, tuple[OptimizerEntry, int]]:
    """The optimizer and the number of each group."""
    found = {
        group.key: (entry, number)
        for entry in rank.entries
        for number, group in enumerate(entry.groups)
        if group.params != ()
    }
    needed = {param.group for param in params}
    given = {g.key for e in rank.entries for g in e.groups if g.params or not rank.everywhere}
    if not needed <= found.keys() or not given <= needed:
        raise MismatchError(
            f"{rank.pt.path} has {len(found)} groups of parameters, {len(needed)} by the rules"
        )
    return found


def _fit_groups(rank: RankState, params: Sequence[LearntParam]) -> list[Learnt]:
    """Parameters by their numbers in the groups."""
    named = [g for e in rank.entries for g in e.groups if g.names]
    if named:
        params = _by_name(rank, params, named)
    groups = _check_keys(rank, params)
    by_group: dict[GroupKey, list[LearntParam]] = {}
    for param in params:
        by_group.setdefault(param.group, []).append(param)
    learnt: dict[LearntParam, Learnt] = {}
    for key, mine in by_group.items():
        entry, number = groups[key]
        numbers = entry.groups[number].params or ()
        if len(numbers) != len(mine):
            raise MismatchError(
                f"{rank.pt.path}: a group has {len(numbers)} parameters, but there are "
                f"{len(mine)} weights of its kind"
            )
        masters = iter(entry.masters[number] if entry.masters else ())
        for param, index in zip(mine, numbers, strict=True):
            fields = dict(entry.state.get(index, {}))
            if entry.masters is not None and param.weight.dtype in HALF:
                master = next(masters, None)
                if master is None:
                    raise MismatchError(f"{rank.pt.path}: {param.name} has no master")
                fields = {MASTER: master, **fields}
            learnt[param] = _learnt(rank, param, fields)
        if next(masters, None) is not None:
            raise MismatchError(f"{rank.pt.path}: a group has more masters than 16-bit weights")
    return [learnt[param] for param in params]


def _by_name(
    rank: RankState, params: Sequence[LearntParam], groups: Sequence[Group]
) -> list[LearntParam]:
    """The parameters in the groups that name them."""
    of = {name: group.key for group in groups for name in group.names}
    mine = {name_in(rank, param.chunk, param.name): param for param in params}
    if unknown := of.keys() - mine.keys():
        raise CheckpointError(
            f"{rank.pt.path}: the optimizer state names {sorted(unknown)[0]}, not a weight",
            "weights and optimizer state of one save",
            ALONE,
        )
    found = [param._replace(group=of[name]) for name, param in mine.items() if name in of]
    for group in groups:
        order = [name for name in mine if of.get(name) == group.key]
        if order != list(group.names):
            raise MismatchError(f"{rank.pt.path}: a group has another order than the weights")
    return found


def name_in(rank: RankState, chunk: Chunk, name: str) -> str:
    """The name of a parameter among those of all model chunks of a rank."""
    return param_name(chunk.virtual if len(rank.chunks) > 1 else None, name)


def param_name(virtual: int | None, name: str) -> str:
    """The name of a parameter in a group; with its model chunk where there are several."""
    return name if virtual is None else f"model{virtual}.{name}"


def _learnt(rank: RankState, param: LearntParam, fields: Mapping[str, StoredTensor]) -> Learnt:
    shape = param.weight.shape
    for kept, tensor in fields.items():
        if tensor.shape not in ((), shape):
            raise MismatchError(
                f"{rank.pt.path}: {kept} of {param.name} would be {list(tensor.shape)}, the weight "
                f"is {list(shape)}"
            )
    return Learnt(param.chunk, param.name, param.weight, param.group, fields)


# ------------------------------------------------------------------------------- buffers
def _fit_buffers(rank: RankState, params: Sequence[LearntParam], buckets: Buckets) -> list[Learnt]:
    """Parameters by their places in the buffers."""
    _check_keys(rank, params)
    found: dict[LearntParam, Learnt] = {}
    several = len(rank.entries) > 1
    for number, entry in enumerate(rank.entries):
        mine = [p for p in params if not several or p.group.expert == bool(number)]
        if entry.buffers is None:
            continue
        held = list(entry.buffers)
        for some in _by_buffer(mine):
            if not held or held[0].dtypes[0] != some[0].weight.dtype:
                raise MismatchError(f"{rank.pt.path} has no buffer for {some[0].name}")
            for one in _fit_buffer(rank, some[::-1], held.pop(0), buckets):
                found[LearntParam(*one[:4])] = one
        if held:
            raise MismatchError(f"{rank.pt.path} has {len(held)} buffers too many")
    return [found[param] for param in params if param in found]


def _by_buffer(params: Sequence[LearntParam]) -> list[list[LearntParam]]:
    """Parameters by chunk and dtype, in the order of the buffers."""
    found: dict[tuple[Chunk, str], list[LearntParam]] = {}
    for param in params:
        found.setdefault((param.chunk, param.weight.dtype), []).append(param)
    chunks = dict.fromkeys(param.chunk for param in params)
    return [some for chunk in chunks for (of, _), some in found.items() if of == chunk]


def _fit_buffer(
    rank: RankState, params: Sequence[LearntParam], buffer: Buffer, buckets: Buckets
) -> list[Learnt]:
    """The parameters of one buffer, in its order."""
    ways = _ways(rank, params, buffer, buckets)
    if not ways:
        raise MismatchError(
            f"{rank.pt.path}: a buffer has {buffer.total} elements, other than its "
            f"{len(params)} parameters would take"
        )
    made = [
        [_within(rank, p, buffer, at) for p, at in zip(params, w.starts, strict=True)] for w in ways
    ]
    if len(made) > 1:
        made = [learnt for learnt in made if proven(learnt)]
    if len(made) != 1:
        raise MismatchError(
            f"{rank.pt.path}: where the parameters of a buffer begin cannot be told"
        )
    return made[0]


def _ways(
    rank: RankState, params: Sequence[LearntParam], buffer: Buffer, buckets: Buckets
) -> list[BufferPlaces]:
    """Where parameters may lie, given in the order of the buffer."""
    chunk = params[0].chunk
    shared = [param.name.endswith(EMBEDDINGS) for param in params]
    held = {rank.pt.storage_of(p.weight) for p in params}
    if rank.views and len(held) == 1:
        (begin, _), = held  # fmt: skip
        item = ITEM_SIZE[params[0].weight.dtype]
        starts = [(p.weight.offset - begin) // item for p in params]
        sizes = [_size(p) for p in params]
        if starts != sorted(starts):
            raise MismatchError(
                f"{rank.pt.path}: the weights are in another order than in the buffer"
            )
        return observed(starts, sizes, shared, buffer.total)
    first = chunk.virtual == 0 and chunk.rank.pp == 0
    rule = buckets if first else buckets._replace(size=0)
    way = places([_size(p) for p in params], shared, rule)
    return [way] if way.total == buffer.total else []


def _size(param: LearntParam) -> int:
    rows, cols = matrix(param.weight.shape)
    return rows * cols


def _within(rank: RankState, param: LearntParam, buffer: Buffer, at: int) -> Learnt:
    """A parameter's part of a buffer's fields."""
    fields = {
        name: flat._replace(
            name=param.name,
            shape=param.weight.shape,
            offset=flat.offset + at * ITEM_SIZE[flat.dtype],
            strides=None,
        )
        for name, flat in buffer.fields.items()
    }
    return _learnt(rank, param, fields)

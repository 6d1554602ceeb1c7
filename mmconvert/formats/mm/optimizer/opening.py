"""Opens the optimizer state of a whole checkpoint: paired with its weights, alike on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mmconvert.errors import CheckpointError, RequestError
from mmconvert.formats.mm.optimizer.order import Order
from mmconvert.formats.mm.optimizer.pairing import paired
from mmconvert.formats.mm.optimizer.rankstate import ALONE, RankState, arguments
from mmconvert.formats.mm.optimizer.reading import is_plain, read_rank_state
from mmconvert.formats.mm.optimizer.state import (
    KINDS,
    Buckets,
    GroupKey,
    Kind,
    OptimizerState,
)
from mmconvert.formats.mm.optimizer.telling import CARRIED, LEFT_BEHIND
from mmconvert.sharding.layout import Chunk, Rank
from mmconvert.stored import StoredTensor


def open_state(
    parts: Mapping[Chunk, Mapping[str, StoredTensor]], folder: Path, iteration: str
) -> OptimizerState:
    """The optimizer of a checkpoint.

    Args:
        parts: its weights by chunk, in the order of the files.
        iteration: what its tracker file says.

    Raises:
        CheckpointError: there is none, or it does not fit its weights.
        RequestError: it is of a kind that is not carried over.
    """
    ranks = [read_rank_state(*one) for one in _files(parts)]
    filled = [rank for rank in ranks if rank.entries]
    if not filled:
        raise CheckpointError(
            f"{folder} holds no optimizer state",
            "what training saves without --no-save-optim",
            ALONE,
        )
    kinds: set[Kind] = {rank.kind for rank in filled}
    if len(kinds) > 1:
        raise CheckpointError(
            f"{folder} holds the state of several optimizers: "
            f"{', '.join(sorted(KINDS[kind] for kind in kinds))}",
            "rank files of one save",
        )
    _refuse_halves(ranks[0])
    learnt, buckets = paired(ranks)
    if filled[0].kind == "fp32" and not _named(filled):
        raise RequestError(
            f"{folder} comes from fp32 training, which saves no masters: nothing proves which "
            "moments belong to which weights",
            "fp32 masters beside the weights, or groups with param_names",
            f"save it once with mixed precision, or {ALONE}",
        )
    order = Order()
    for part in parts.values():
        order.learn(part)
    told = arguments(ranks[0].pt)
    return OptimizerState(
        kind=filled[0].kind,
        learnt=learnt,
        groups=_groups(filled),
        order=order,
        everywhere=any(rank.everywhere for rank in filled),
        listed=any(rank.listed and len(rank.entries) == 1 for rank in filled),
        named=_named(filled),
        bare=frozenset(r.pt.path for r in filled if any(e.buffers is None for e in r.entries))
        if filled[0].kind == "distributed"
        else frozenset(),
        scaler=_alike(filled, "grad_scaler", lambda r: r.entries[0].scaler),
        content=_content(ranks, iteration) | {"args": _plain(told)},
        left_out=tuple(name for name, value in told.items() if not is_plain(value)),
        buckets=_written(buckets, told),
        notes=tuple(words for name, words in LEFT_BEHIND.items() if _has(ranks, name)),
    )


def _files(
    parts: Mapping[Chunk, Mapping[str, StoredTensor]],
) -> list[tuple[Rank, Path, dict[Chunk, Mapping[str, StoredTensor]]]]:
    """The rank files, and the weights in each."""
    chunks: dict[Rank, dict[Chunk, Mapping[str, StoredTensor]]] = {}
    paths: dict[Rank, Path] = {}
    for chunk, tensors in parts.items():
        chunks.setdefault(chunk.rank, {})[chunk] = tensors
        for tensor in tensors.values():
            paths[chunk.rank] = tensor.path
    return [(rank, paths[rank], own) for rank, own in chunks.items() if rank in paths]


def _refuse_halves(rank: RankState) -> None:
    """Raises RequestError for masters that are stored in halves."""
    if arguments(rank.pt).get("reuse_fp32_param") is True:
        raise RequestError(
            f"{rank.pt.path} comes from training with --reuse-fp32-param, which "
            "stores each master in two halves",
            "fp32 masters",
            ALONE,
        )


def _named(ranks: Sequence[RankState]) -> bool:
    """Whether all groups name their parameters."""
    groups = [g for r in ranks for e in r.entries for g in e.groups if g.params]
    return bool(groups) and all(g.names for g in groups)


def _groups(ranks: Sequence[RankState]) -> dict[GroupKey, Mapping[str, object]]:
    """The values of every group; of one kind they are the same on all ranks."""
    found: dict[GroupKey, tuple[Mapping[str, object], RankState]] = {}
    for rank in ranks:
        for group in (g for entry in rank.entries for g in entry.groups):
            values, first = found.setdefault(group.key, (group.values, rank))
            odd = [
                k
                for k in values.keys() | group.values.keys()
                if values.get(k) != group.values.get(k)
            ]
            if odd:
                raise CheckpointError(
                    f"the optimizer's groups differ: {odd[0]} is {group.values.get(odd[0])} in "
                    f"{rank.pt.path}, {values.get(odd[0])} in {first.pt.path}",
                    "rank files of one step",
                )
    return {key: values for key, (values, _) in found.items()}


def _alike(ranks: Sequence[RankState], what: str, of: Callable[[RankState], object]) -> object:
    """What must be the same on all ranks."""
    for rank in ranks[1:]:
        if of(rank) != of(ranks[0]):
            raise CheckpointError(
                f"{what} differs between {ranks[0].pt.path} and {rank.pt.path}",
                "rank files of one step",
            )
    return of(ranks[0])


def _content(ranks: Sequence[RankState], iteration: str) -> dict[str, object]:
    """What training goes on with."""
    found: dict[str, object] = {}
    for name in CARRIED:
        value = _alike(ranks, name, lambda rank, key=name: rank.pt.content.get(key))
        if value is not None and is_plain(value):
            found[name] = value
    step = found.setdefault("iteration", int(iteration) if iteration.isdigit() else None)
    if type(step) is not int or (iteration.isdigit() and step != int(iteration)):
        raise CheckpointError(
            f"{ranks[0].pt.path} belongs to iteration {step}, the checkpoint to {iteration}",
            "the number of an iteration, the same in both",
            ALONE,
        )
    return found


def _plain(told: Mapping[str, object]) -> object:
    """The arguments of plain values; None if there are none."""
    found = {name: value for name, value in told.items() if is_plain(value)}
    return found or None


def _written(buckets: Buckets, told: Mapping[str, object]) -> Buckets:
    """How the buffers of the run are cut, which goes on with the output."""
    if told.get("overlap_grad_reduce") is not True:
        return buckets._replace(shared=True)
    from mmconvert.formats.mm.optimizer.buffers import USUAL_BUCKET

    size = told.get("ddp_bucket_size")
    return Buckets(size if isinstance(size, int) and size > 0 else USUAL_BUCKET, shared=True)


def _has(ranks: Sequence[RankState], name: str) -> bool:
    return any(rank.pt.content.get(name) is not None for rank in ranks)

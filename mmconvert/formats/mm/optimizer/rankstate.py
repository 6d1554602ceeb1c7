"""The optimizers of a rank file, as values: groups, moments, buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from mmconvert.formats.containers.pickles import Inert
from mmconvert.formats.containers.ptfile import PtFile
from mmconvert.formats.mm.optimizer.state import GroupKey, Kind
from mmconvert.narrow import is_dict
from mmconvert.sharding.layout import Chunk, Rank
from mmconvert.stored import StoredTensor

ALONE = "leave --optimizer out: the weights alone are resplit"


class Group(NamedTuple):
    """A group of parameters.

    Attributes:
        key: what it is told by.
        values: its learning rate and so on.
        params: the numbers of its parameters; None in a distributed optimizer's.
        names: of its parameters, where it has them.
    """

    key: GroupKey
    values: Mapping[str, object]
    params: tuple[int, ...] | None
    names: tuple[str, ...] = ()


class Buffer(NamedTuple):
    """A flat buffer of a distributed optimizer.

    Attributes:
        dtypes: of its parameters and of their gradients.
        fields: flat tensors by field.
        total: their elements.
    """

    dtypes: tuple[str, str]
    fields: Mapping[str, StoredTensor]
    total: int


@dataclass(frozen=True)
class OptimizerEntry:
    """One optimizer of a rank file.

    Attributes:
        state: what it keeps of each parameter, by number.
        masters: fp32 copies of the 16-bit parameters, group by group; None in fp32 training.
        buffers: of a distributed optimizer; None where another rank's file has them.
        scaler: of the loss.
    """

    groups: Sequence[Group]
    state: Mapping[int, Mapping[str, StoredTensor]] = field(
        default_factory=dict[int, Mapping[str, StoredTensor]]
    )
    masters: Sequence[Sequence[StoredTensor]] | None = None
    buffers: Sequence[Buffer] | None = None
    scaler: object = None


@dataclass(frozen=True)
class RankState:
    """The optimizers of one rank file.

    Attributes:
        pt: the file.
        chunks: the weights of each model chunk, in the order of the file.
        entries: its optimizers: one, or a dense one and that of the experts.
        listed: they stand in a list.
    """

    rank: Rank
    pt: PtFile
    kind: Kind
    chunks: Mapping[Chunk, Mapping[str, StoredTensor]]
    entries: Sequence[OptimizerEntry]
    listed: bool = False

    @property
    def everywhere(self) -> bool:
        """Whether it has the groups of all ranks, as Megatron saves them from 0.13 on."""
        groups = [group for entry in self.entries for group in entry.groups]
        return any(g.params == () or "default_config" in g.values for g in groups)

    @cached_property
    def views(self) -> frozenset[StoredTensor]:
        """The weights that are views into a common buffer: those that learn with a distributed
        optimizer. None where each has a storage of its own.
        """
        held: dict[str, list[StoredTensor]] = {}
        for weights in self.chunks.values():
            for weight in weights.values():
                held.setdefault(self.pt.storage_of(weight)[1], []).append(weight)
        sizes = self.pt.storage_bytes
        return frozenset(
            weight
            for storage, weights in held.items()
            if len(weights) > 1 or weights[0].nbytes < sizes.get(storage, 0)
            for weight in weights
        )


def arguments(pt: PtFile) -> dict[str, object]:
    """The arguments of training that a rank file holds; {} without them."""
    found = pt.content.get("args")
    state = found.state if isinstance(found, Inert) else None
    return {str(k): v for k, v in state.items()} if is_dict(state) else {}

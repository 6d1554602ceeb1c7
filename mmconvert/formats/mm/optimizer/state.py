"""Optimizer state as values: what each parameter that learns has beside its weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from mmconvert.formats.mm.optimizer.order import Order
from mmconvert.plan.plan import Key
from mmconvert.sharding.layout import Chunk
from mmconvert.stored import StoredTensor

Kind = Literal["plain", "distributed", "fp32"]
KINDS: dict[Kind, str] = {
    "plain": "mixed precision",
    "distributed": "distributed optimizer",
    "fp32": "fp32",
}
MASTER, STEP = "master", "step"
MOMENTS = ("exp_avg", "exp_avg_sq")
# What Adam keeps of a parameter, in its shape; the last two are of AMSGrad and of moving averages.
FIELDS = (MASTER, *MOMENTS, "max_exp_avg_sq", "ema_params")
PREFIX = "optimizer."  # of the names of optimizer tensors, among those of the weights


class GroupKey(NamedTuple):
    """What distinguishes the groups of an optimizer (Megatron's ``_get_param_groups``)."""

    no_decay: bool
    scaled: bool = False
    expert: bool = False
    decoupled: bool = False


class Learnt(NamedTuple):
    """A parameter that learns, in one rank file.

    Attributes:
        chunk, name: its place.
        weight: as it is stored.
        group: the group that it is in.
        fields: what the optimizer keeps of it, by :data:`FIELDS` and :data:`STEP`.
    """

    chunk: Chunk
    name: str
    weight: StoredTensor
    group: GroupKey
    fields: Mapping[str, StoredTensor]


class Buckets(NamedTuple):
    """How a distributed optimizer cuts its buffers.

    Attributes:
        size: elements from which a bucket is closed, on the first chunk; 0 for one bucket.
        shared: a tied embedding over several stages is a bucket of its own.
    """

    size: int = 0
    shared: bool = False


ONE_BUCKET = Buckets()


@dataclass(frozen=True)
class OptimizerState:
    """The optimizer of a checkpoint.

    Attributes:
        kind: which of Megatron's optimizers saved it.
        learnt: every parameter with state, of every rank file.
        groups: values of each group, such as its learning rate.
        everywhere: each rank has all groups, in this order (Megatron from 0.13 on).
        listed: it stands in a list even where it is alone, as several optimizers do.
        named: its groups name their parameters.
        bare: rank files that leave out what another has too.
        scaler: of the loss; None without one.
        content: what else training goes on with: iteration, schedule, arguments.
        left_out: arguments that are not plain values.
        order: of the parameters.
        buckets: of a distributed optimizer.
        notes: what is not carried over, in words.
    """

    kind: Kind
    learnt: Sequence[Learnt]
    groups: Mapping[GroupKey, Mapping[str, object]]
    order: Order
    everywhere: bool = False
    listed: bool = False
    named: bool = False
    bare: frozenset[Path] = frozenset()
    scaler: object = None
    content: Mapping[str, object] = field(default_factory=dict[str, object])
    left_out: tuple[str, ...] = ()
    buckets: Buckets = ONE_BUCKET
    notes: tuple[str, ...] = ()

    @property
    def iteration(self) -> int:
        """The last step that is done."""
        found = self.content["iteration"]
        assert isinstance(found, int)  # noqa: S101 - the reader has looked
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all masters and moments, copies included."""
        return sum(t.nbytes for one in self.learnt for t in one.fields.values())


def state_key(key: Key, kept: str) -> Key:
    """The whole that a field of a parameter is.

    Args:
        key: of the weight.
        kept: the field.
    """
    return Key(f"{PREFIX}{kept}.{key.mm}", key.layer, key.expert)

"""The optimizer state of a rank file that is to be written, as Megatron's optimizers load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

from mmconvert.formats.containers.ptpickle import Namespace
from mmconvert.formats.containers.ptwriter import Slot
from mmconvert.formats.containers.torch_objects import TORCH_DTYPE, Global
from mmconvert.formats.mm.optimizer.buffers import places
from mmconvert.formats.mm.optimizer.guesses import EMBEDDINGS
from mmconvert.formats.mm.optimizer.pairing import HALF, param_name
from mmconvert.formats.mm.optimizer.state import (
    MASTER,
    STEP,
    GroupKey,
    OptimizerState,
)
from mmconvert.formats.mm.optimizer.wholes import PlacedState
from mmconvert.narrow import is_dict
from mmconvert.sharding.layout import Layout, Rank
from mmconvert.stored import Target

_DTYPES = {dtype: Global("torch", name) for name, dtype in TORCH_DTYPE.items()}
# Arguments that a new layout makes untrue.
_NOT_CARRIED = ("data_parallel_size", "world_size", "rank", "local_rank")


class WrittenParam(NamedTuple):
    """A parameter that learns, to be written.

    Attributes:
        target: its weight.
        fields: numbers of what is kept of it.
        virtual: its model chunk.
    """

    target: Target
    group: GroupKey
    fields: Mapping[str, int]
    virtual: int


class StateFiles(NamedTuple):
    """What a rank has beside its weights.

    Attributes:
        content: more of the rank file.
        beside: the content of ``distrib_optim.pt``; None without one.
    """

    content: Mapping[str, object]
    beside: object = None


class StateWriter:
    """Lays out the optimizer state of every rank."""

    def __init__(
        self,
        state: OptimizerState,
        placed: PlacedState,
        targets: Sequence[Target],
        layout: Layout,
        *,
        tied: bool,
    ) -> None:
        self._state, self._layout, self._targets = state, layout, targets
        self._shared = tied and layout.pp_size > 1
        self._params: dict[Rank, list[WrittenParam]] = {}
        found: dict[Rank, list[WrittenParam]] = {}
        for number, group in placed.groups.items():
            target = targets[number]
            assert target.chunk is not None  # noqa: S101 - narrows the type of an MM target
            fields = placed.fields.get(number, {})
            param = WrittenParam(target, group, fields, target.chunk.virtual)
            found.setdefault(target.chunk.rank, []).append(param)
        for rank, params in found.items():
            self._params[rank] = sorted(
                params, key=lambda p: (p.virtual, state.order.key(p.target.name))
            )
        used = dict.fromkeys(placed.groups.values())
        self._experts = any(key.expert for key in used)
        # In the order of the source's; Megatron from 0.13 on has those of any rank on each.
        known = [key._replace(expert=e) for key in state.groups for e in (False, True)]
        self._groups = [key for key in dict.fromkeys(known) if key in used]

    def ordered(self, chunk: Mapping[str, Slot]) -> dict[str, Slot]:
        """The weights of a model chunk in the order in which training registers them."""
        return {name: chunk[name] for name in sorted(chunk, key=self._state.order.key)}

    def rank(self, rank: Rank) -> StateFiles:
        """What one rank has."""
        state, params = self._state, self._params.get(rank, [])
        content = dict(state.content)
        args = content.pop("args", None)
        if is_dict(args):
            content["args"] = Namespace(self._arguments({str(k): v for k, v in args.items()}))
        split = [[p for p in params if not p.group.expert]]
        experts = [p for p in params if p.group.expert]
        split += [experts] if experts or (self._experts and state.everywhere) else []
        listed = len(split) > 1 or state.listed
        if not params:
            return StateFiles(content | ({"optimizer": []} if listed else {}))
        entries = [self._entry(some, bool(i)) for i, some in enumerate(split)]
        content["optimizer"] = entries if listed else entries[0]
        beside: object = None
        if state.kind == "distributed":
            # What is no expert's is in the file of the first expert-parallel rank alone.
            trees = [None if rank.ep and not i else self._buffers(p) for i, p in enumerate(split)]
            beside = trees if len(split) > 1 else trees[0]
        return StateFiles(content, beside)

    # ------------------------------------------------------------------------------- entries
    def _entry(self, params: Sequence[WrittenParam], expert: bool) -> dict[str, object]:
        """One optimizer."""
        kind = self._state.kind
        keys = self._keys(params, expert)
        ordered = [p for key in keys for p in params if p.group == key]
        numbers = {id(p): i for i, p in enumerate(ordered)}
        groups: list[dict[str, object]] = []
        for key in keys:
            mine = [p for p in ordered if p.group == key]
            group = dict(self._values(key))
            if kind != "distributed":
                group["params"] = [numbers[id(p)] for p in mine]
            if self._state.named:
                group["param_names"] = [self._name(p) for p in mine]
            groups.append(group)
        inner: dict[str, object] = {"param_groups": groups}
        if kind != "distributed":
            kept = {i: self._slots(p) for i, p in enumerate(ordered)}
            inner = {"state": {i: slots for i, slots in kept.items() if slots}, **inner}
        if kind == "fp32":
            return inner
        entry: dict[str, object] = {"optimizer": inner}
        if self._state.scaler is not None:
            entry["grad_scaler"] = self._state.scaler
        if kind == "plain":
            entry["fp32_from_fp16_params"] = [
                [
                    self._slot(p.fields[MASTER])
                    for p in ordered
                    if p.group == key and p.target.dtype in HALF
                ]
                for key in keys
            ]
        return entry

    def _keys(self, params: Sequence[WrittenParam], expert: bool) -> list[GroupKey]:
        """The groups, as a run of this layout has them."""
        if self._state.everywhere:
            return [key for key in self._groups if key.expert == expert]
        return list(dict.fromkeys(p.group for p in params))

    def _values(self, key: GroupKey) -> dict[str, object]:
        """A group's values; experts have a group of their own where ranks share them only."""
        found = (
            self._state.groups.get(key) or self._state.groups[key._replace(expert=not key.expert)]
        )
        values = dict(found)
        if "is_expert_parallel" in values:
            values["is_expert_parallel"] = key.expert
        return values

    def _name(self, param: WrittenParam) -> str:
        several = self._layout.vpp_size > 1
        return param_name(param.virtual if several else None, param.target.name)

    def _slot(self, number: int) -> Slot:
        target = self._targets[number]
        return Slot(target.dtype, target.shape, number)

    def _slots(self, param: WrittenParam) -> dict[str, object]:
        """The moments of a parameter."""
        fields = sorted(param.fields.items(), key=lambda item: item[0] != STEP)
        return {name: self._slot(number) for name, number in fields if name != MASTER}

    # ------------------------------------------------------------------------------- buffers
    def _buffers(self, params: Sequence[WrittenParam]) -> dict[object, object]:
        """The content of distrib_optim.pt: by chunk and dtype, the last parameter first."""
        tree: dict[object, object] = {"buckets_coalesced": True}
        for virtual in range(self._layout.vpp_size):
            chunk = [p for p in params if p.virtual == virtual]
            for dtype in dict.fromkeys(p.target.dtype for p in chunk):
                mine = [p for p in chunk if p.target.dtype == dtype][::-1]
                tree[len(tree) - 1] = {(_DTYPES[dtype], _DTYPES["F32"]): self._buffer(mine)}
        return tree

    def _buffer(self, params: Sequence[WrittenParam]) -> dict[str, object]:
        """The fields of a buffer, with the parameters in its order."""
        sizes = [prod(p.target.shape) for p in params]
        chunk = params[0].target.chunk
        assert chunk is not None  # noqa: S101 - narrows the type of an MM target
        buckets = self._state.buckets
        if chunk.virtual or chunk.rank.pp:
            buckets = buckets._replace(size=0)
        shared = [self._shared and p.target.name.endswith(EMBEDDINGS) for p in params]
        starts, total = places(sizes, shared, buckets)
        found: dict[str, object] = {}
        for name in dict.fromkeys(n for p in params for n in p.fields):
            parts = tuple(
                (at, p.fields[name], size)
                for at, p, size in zip(starts, params, sizes, strict=True)
                if name in p.fields
            )
            found["param" if name == MASTER else name] = Slot("F32", (total,), parts=parts)
        return {**found, "numel_unpadded": total}

    # ----------------------------------------------------------------------------- arguments
    def _arguments(self, args: Mapping[str, object]) -> dict[str, object]:
        """The arguments of training, in the new layout."""
        layout = self._layout
        virtual = layout.vpp_size if layout.vpp_size > 1 else None
        sizes: dict[str, object] = {
            "tensor_model_parallel_size": layout.tp_folders,
            "pipeline_model_parallel_size": layout.pp_size,
            "transformer_pipeline_model_parallel_size": layout.pp_size,
            "virtual_pipeline_model_parallel_size": virtual,
            "num_layers_per_virtual_pipeline_stage": None,
            "expert_model_parallel_size": layout.ep,
            "use_distributed_optimizer": self._state.kind == "distributed",
        }
        kept = {name: value for name, value in args.items() if name not in _NOT_CARRIED}
        return kept | {name: value for name, value in sizes.items() if name in kept}

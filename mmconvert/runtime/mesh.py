"""The processes of a run: replicas, in each the pipeline, expert and tensor-parallel ranks."""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from mmconvert.runtime.collectives import TensorGroup
from mmconvert.runtime.experts import ExpertGroup
from mmconvert.sharding.layout import Layout, Rank
from mmconvert.sharding.stages import first_stage, last_stage


@dataclass(frozen=True)
class Mesh:
    """The place of this process among the others.

    Attributes:
        rank: its coordinates in its replica; process number = ((replica * pp size + pp rank) *
            ep size + ep rank) * tp folders + tp rank.
        replica: which copy of the model it belongs to, of ``replicas``.
        data: the processes with its coordinates in the other replicas; None where there are none.
        model: the processes of its replica.
        pipe: the processes of its pipeline.
        tp_groups: by module key, the processes that share that module with it.
        experts: the processes that share the experts of its text layers with it.
        tied: the processes of the first and the last text stage with its tp and ep rank, if they
            are two.
        device: what it computes on.
    """

    layout: Layout
    rank: Rank
    replica: int
    replicas: int
    data: dist.ProcessGroup | None
    model: dist.ProcessGroup
    pipe: dist.ProcessGroup
    tp_groups: dict[str, TensorGroup]
    experts: ExpertGroup
    tied: dist.ProcessGroup | None
    device: torch.device

    @property
    def stages(self) -> int:
        """Number of stages, virtual ones counted."""
        return self.layout.pp_size * self.layout.vpp_size

    @property
    def lead(self) -> bool:
        """Whether this is the process that reports."""
        return dist.get_rank() == 0

    def share_from_last(self, tensor: torch.Tensor) -> None:
        """Overwrites a tensor on all pipeline ranks with the last one's."""
        source = dist.get_global_rank(self.pipe, self.layout.pp_size - 1)
        dist.broadcast(tensor, source, group=self.pipe)

    def share_from_end(self, tensor: torch.Tensor) -> None:
        """Overwrites a tensor on all processes of this replica with one's of the last stage."""
        stage = self.layout.ep * self.layout.tp_folders  # processes
        size = self.layout.pp_size * stage
        if size > 1:
            dist.broadcast(tensor, (self.replica + 1) * size - stage, group=self.model)


def build(layout: Layout, device: torch.device, replicas: int = 1) -> Mesh:
    """Makes the groups of a layout; every process calls this.

    A module with a smaller tp size than the widest one is held several times: tp rank r has its
    piece r % size, and the ranks of one copy follow each other.

    Args:
        replicas: copies of the model that share the samples of a step.
    """
    folders, pp, ep = layout.tp_folders, layout.pp_size, layout.ep
    names = ("dp", "pp", "ep", "tp")
    mesh = init_device_mesh(device.type, (replicas, pp, ep, folders), mesh_dim_names=names)
    d, p, e, t = (mesh.get_local_rank(name) for name in names)
    pipe = mesh.get_group("pp")
    data = mesh.get_group("dp") if replicas > 1 else None
    world = pp * ep * folders
    starts = range(0, replicas * world, world)  # of each replica's processes
    model = _mine([range(start, start + world) for start in starts])
    assert model is not None  # noqa: S101 - every process is in a replica
    groups = {folders: TensorGroup(folders, t, mesh.get_group("tp")), 1: TensorGroup()}
    for size in sorted({*layout.tp.values()} - {1, folders}):
        group = _mine([range(i, i + size) for i in range(0, replicas * world, size)])
        groups[size] = TensorGroup(size, t % size, group)
    tp_groups = {key: groups[size] for key, size in layout.tp.items()}
    size = layout.tp[layout.decoder]
    experts = ExpertGroup(ep, e, _sharing_experts(layout, replicas, groups[size]))
    ends = [end(layout.grids[layout.decoder]) % pp for end in (first_stage, last_stage)]
    tied = None
    if ends[0] != ends[1]:
        stage = ep * folders  # processes
        pairs = [[s + rank * stage + i for rank in ends] for s in starts for i in range(stage)]
        tied = _mine(pairs)
    rank = Rank(t, p, e)
    return Mesh(layout, rank, d, replicas, data, model, pipe, tp_groups, experts, tied, device)


def _sharing_experts(layout: Layout, replicas: int, tensors: TensorGroup) -> TensorGroup:
    """The processes that share a layer's experts: the tensor-parallel ranks of all ep ranks."""
    if layout.ep == 1:
        return tensors
    folders, size = layout.tp_folders, tensors.size
    stage = layout.ep * folders
    some = [
        [first + copy + e * folders + t for e in range(layout.ep) for t in range(size)]
        for first in range(0, replicas * layout.pp_size * stage, stage)
        for copy in range(0, folders, size)
    ]
    group = _mine(some)
    return TensorGroup(layout.ep * size, 0 if group is None else dist.get_rank(group), group)


def _mine(members: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
    """Makes a group of each; the one that this process is in."""
    found: Any = None
    for ranks in members:
        group: Any = dist.new_group(list(ranks))  # a number where this process is not in it
        found = group if dist.get_rank() in ranks else found
    return found

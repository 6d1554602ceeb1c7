"""The processes of a run: replicas times pipeline ranks times tensor-parallel ranks."""

# Some functions of torch have no types, or types that are open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from mmconvert.runtime.parallel import TensorGroup
from mmconvert.sharding.layout import Layout, Rank
from mmconvert.sharding.stages import first_stage, last_stage


@dataclass(frozen=True)
class Mesh:
    """The place of this process among the others.

    Attributes:
        rank: its coordinates in its replica; process number = (replica * pp size + pp rank) *
            tp folders + tp rank.
        replica: which copy of the model it belongs to, of ``replicas``.
        data: the processes with its coordinates in the other replicas; None where there are none.
        model: the processes of its replica.
        pipe: the processes of its pipeline.
        line: the processes with its pp rank.
        tp_groups: by module key, the processes that share that module with it.
        tied: the processes of the first and the last text stage with its tp rank, if they are two.
        device: what it computes on.
    """

    layout: Layout
    rank: Rank
    replica: int
    replicas: int
    data: dist.ProcessGroup | None
    model: dist.ProcessGroup
    pipe: dist.ProcessGroup
    line: dist.ProcessGroup
    tp_groups: dict[str, TensorGroup]
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


def build(layout: Layout, device: torch.device, replicas: int = 1) -> Mesh:
    """Makes the groups of a layout; every process calls this.

    A module with a smaller tp size than the widest one is held several times: tp rank r has its
    piece r % size, and the ranks of one copy follow each other.

    Args:
        replicas: copies of the model that share the samples of a step.
    """
    folders, pp = layout.tp_folders, layout.pp_size
    mesh = init_device_mesh(device.type, (replicas, pp, folders), mesh_dim_names=("dp", "pp", "tp"))
    d, p, t = (mesh.get_local_rank(name) for name in ("dp", "pp", "tp"))
    line, pipe = mesh.get_group("tp"), mesh.get_group("pp")
    data = mesh.get_group("dp") if replicas > 1 else None
    world = pp * folders
    starts = range(0, replicas * world, world)  # of each replica's processes
    model = _mine([range(start, start + world) for start in starts])
    assert model is not None  # noqa: S101 - every process is in a replica
    groups: dict[int, TensorGroup] = {1: TensorGroup(), folders: TensorGroup(folders, t, line)}
    if folders == 1:
        groups[1] = TensorGroup()
    for size in sorted({*layout.tp.values()} - {1, folders}):
        group = _mine([range(i, i + size) for i in range(0, replicas * world, size)])
        groups[size] = TensorGroup(size, t % size, group)
    tp_groups = {key: groups[size] for key, size in layout.tp.items()}
    ends = [end(layout.grids["llm"]) % pp for end in (first_stage, last_stage)]
    tied = None
    if ends[0] != ends[1]:
        pairs = [
            [s + rank * folders + tp for rank in ends] for s in starts for tp in range(folders)
        ]
        tied = _mine(pairs)
    return Mesh(layout, Rank(t, p), d, replicas, data, model, pipe, line, tp_groups, tied, device)


def _mine(members: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
    """Makes a group of each; the one that this process is in."""
    found: Any = None
    for ranks in members:
        group: Any = dist.new_group(list(ranks))  # a number where this process is not in it
        found = group if dist.get_rank() in ranks else found
    return found

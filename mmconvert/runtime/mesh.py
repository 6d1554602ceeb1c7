"""The processes of a run: pipeline ranks times tensor-parallel ranks."""

from __future__ import annotations

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
        rank: its coordinates; process number = pp rank * tp folders + tp rank.
        pipe: the processes of its pipeline.
        line: the processes with its pp rank.
        tp_groups: by module key, the processes that share that module with it.
        tied: the processes of the first and the last text stage with its tp rank, if they are two.
        device: what it computes on.
    """

    layout: Layout
    rank: Rank
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


def build(layout: Layout, device: torch.device) -> Mesh:
    """Makes the groups of a layout; every process calls this.

    A module with a smaller tp size than the widest one is held several times: tp rank r has its
    piece r % size, and the ranks of one copy follow each other.
    """
    folders, pp = layout.tp_folders, layout.pp_size
    mesh = init_device_mesh(device.type, (pp, folders), mesh_dim_names=("pp", "tp"))
    p, t = mesh.get_local_rank("pp"), mesh.get_local_rank("tp")
    line, pipe = mesh.get_group("tp"), mesh.get_group("pp")
    groups: dict[int, TensorGroup] = {1: TensorGroup(), folders: TensorGroup(folders, t, line)}
    if folders == 1:
        groups[1] = TensorGroup()
    for size in sorted({*layout.tp.values()} - {1, folders}):
        for start in range(0, pp * folders, size):
            group: Any = dist.new_group(list(range(start, start + size)))
            if start <= dist.get_rank() < start + size:
                groups[size] = TensorGroup(size, t % size, group)
    tp_groups = {key: groups[size] for key, size in layout.tp.items()}
    ends = [end(layout.grids["llm"]) % pp for end in (first_stage, last_stage)]
    tied: Any = None  # torch types a group that this process is not in as a number
    if ends[0] != ends[1]:
        for tp in range(folders):
            group = dist.new_group([rank * folders + tp for rank in ends])
            tied = group if tp == t and p in ends else tied
    return Mesh(layout, Rank(t, p), pipe, line, tp_groups, tied, device)

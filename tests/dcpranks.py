"""Processes of torch.distributed that save and load DCP folders, as trainers do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

State = dict[str, Any]


def run(ranks: int, work: Callable[..., None], *args: object) -> None:
    """Runs ``work(rank, ranks, *args)`` in that many processes."""
    folder = Path(str(args[0])).parent
    init = folder / f"init-{work.__name__}-{ranks}"
    given = (ranks, f"file://{init}", work, args)
    # Forked: torch takes ten seconds to import anew in each.
    mp.start_processes(_started, given, nprocs=ranks, start_method="fork")


def _started(rank: int, ranks: int, init: str, work: Callable[..., None], args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=ranks)
    try:
        work(rank, ranks, *args)
    finally:
        dist.destroy_process_group()


def divided(tensor: torch.Tensor, ranks: int, how: str) -> DTensor:
    """A tensor as FSDP2, or FSDP2 with tensor parallelism, holds it."""
    if how == "rows" or ranks < 4:
        mesh = init_device_mesh("cpu", (ranks,))
        return distribute_tensor(tensor, mesh, [Shard(0) if tensor.dim() else Replicate()])
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("dp", "tp"))
    last = Shard(1) if tensor.dim() == 2 else Replicate()
    return distribute_tensor(tensor, mesh, [Shard(0) if tensor.dim() else Replicate(), last])


def save(rank: int, ranks: int, folder: str, source: str, how: str, threads: int) -> None:
    """Saves the tensors of a torch file, divided."""
    whole = torch.load(source, weights_only=True)
    state = {name: divided(t, ranks, how) for name, t in whole.items()}
    writer = dcp.FileSystemWriter(folder, thread_count=threads)
    dcp.save({"model": state, "checkpoint_version": 3.0}, storage_writer=writer)


def load(rank: int, ranks: int, folder: str, source: str, how: str) -> None:
    """Loads a folder into divided tensors; they must be those of a torch file."""
    whole = torch.load(source, weights_only=True)
    state = {name: divided(torch.zeros_like(t), ranks, how) for name, t in whole.items()}
    dcp.load({"model": state}, checkpoint_id=folder)
    for name, tensor in whole.items():
        assert torch.equal(state[name].full_tensor(), tensor), name


if __name__ == "__main__":
    sys.exit("imported by tests")
